"""Weights out of a published ONNX graph, under the names they had in PyTorch."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor

from edgesam_deploy.errors import CheckpointError

# What PyTorch's exporter calls a tensor that it changed, as where it folded a batch normalisation in.
_RENAMED = "onnx::"
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Tensors by name from an .onnx file that ``torch.onnx.export`` wrote, on the CPU.

    A tensor that the exporter changed has lost its name; the weight and bias of a convolution are then named after
    its node, which carries the module's (PyTorch 1.13 and later). Raises CheckpointError.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except (OSError, DecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable ONNX graph: {error}") from error
    stored = {tensor.name: tensor for tensor in graph.initializer}
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in stored.values()):
        raise CheckpointError(f"{path} keeps its weights in other files; expected an ONNX graph that holds them")
    # Equal tensors are stored once, and the other names are made by Identity nodes.
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    named = {name: name for name in (*stored, *source) if not name.startswith(_RENAMED)}
    for node in graph.node:
        if node.op_type in _CONVOLUTIONS:
            for given, role in zip(node.input[1:], ("weight", "bias"), strict=False):
                if given.startswith(_RENAMED):
                    named[f"{_module(node.name)}.{role}"] = given
    found = {name: stored.get(source.get(given, given)) for name, given in named.items()}
    # copy: numpy_helper's arrays may be views of the file's bytes, which cannot be written to.
    weights = {name: torch.from_numpy(numpy_helper.to_array(t).copy()) for name, t in found.items() if t is not None}
    if not weights:
        raise CheckpointError(f"{path} holds no weights; expected an ONNX graph exported from a PyTorch network")
    return weights


def is_onnx(path: Path) -> bool:
    """Whether a file is an ONNX graph: by its suffix, else (downloads may have none) by its first bytes.

    A graph begins with the field of its IR version. torch.save's files never do; a safetensors file may, and has the
    brace of its JSON header after eight bytes.
    """
    if path.suffix or not path.is_file():
        return path.suffix == ".onnx"
    with path.open("rb") as file:
        head = file.read(9)
    return head[:1] == b"\x08" and head[8:] != b"{"


def _module(node: str) -> str:
    """``/layer1/layer1.0/conv1/Conv`` -> ``layer1.0.conv1``: a scope repeats its parent's where that is a list."""
    path: list[str] = []
    for scope in node.split("/")[1:-1]:
        if path and scope.startswith(f"{path[-1]}."):
            path[-1] = scope
        else:
            path.append(scope)
    return ".".join(path)
