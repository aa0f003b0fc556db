"""ONNX files as the stages read and write them, and the rules every graph keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from edgesam_deploy.contract import POINT_COORDS, POINT_LABELS
from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import output_errors, write_bytes
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import external_data

# onnxruntime 1.23, the last with Python 3.10 wheels, reads no higher.
MAX_IR_VERSION = 10
PRODUCER = "edgesam-deploy"
# Relative to the largest |output|: what re-ordering float32 sums may change.
AGREEMENT = 1e-4
_NUMBERS = {
    getattr(onnx.TensorProto, name)
    for name in ("BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT", "DOUBLE")
}


def load(path: Path, weights: bool = True) -> onnx.ModelProto:
    """Read and check an ONNX file. Raises GraphError for a missing, empty, truncated or invalid one.

    weights: False leaves those that are in a file of their own (``external_data``) there: for what needs no values.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GraphError(f"cannot read the ONNX graph {path}: {error.strerror or error}") from error
    if not data:
        raise GraphError(f"{path} is empty; expected an ONNX graph. Run the stage that makes it again")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        # By its path, the checker finds the other file too.
        onnx.checker.check_model(str(path) if external_data.is_external(model) else model)
    except (DecodeError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(
            f"{path} is not a valid ONNX graph (truncated or damaged): {reason}. Run the stage that makes it again"
        ) from error
    if not model.graph.node:
        raise GraphError(f"{path} is an ONNX file without a graph. Run the stage that makes it again")
    if weights and external_data.is_external(model):
        external_data.read_weights(model, path)
    return model


def save(model: onnx.ModelProto, path: Path, origin: Mapping[str, str]) -> None:
    """Write a graph whole or not at all, with its origin as metadata and nothing of the machine that made it.

    Exporters leave stack traces with local paths in the node metadata; they are dropped. Weights of more than 2 GB go
    into a file beside it.
    """
    strip(model)
    model.producer_name = PRODUCER
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    for key, value in sorted(origin.items()):
        model.metadata_props.add(key=key, value=value)
    external_data.write(model, path)


def copy(source: Path, output: Path) -> None:
    """Copy an ONNX file, and the file of its weights where it has one."""
    model = load(source, weights=False)
    if external_data.is_external(model):
        external_data.copy(model, source, output)
    else:
        write_bytes(output, source.read_bytes())


def move(source: Path, output: Path) -> None:
    """Rename an ONNX file into another folder of the same disk, and the file of its weights where it has one."""
    data = external_data.data_file(source)
    with output_errors(output):
        if data.exists():
            data.replace(external_data.data_file(output))
        else:
            external_data.data_file(output).unlink(missing_ok=True)
        source.replace(output)


def remove(path: Path) -> None:
    """Delete an ONNX file, and the file of its weights where it has one."""
    for file in (path, external_data.data_file(path)):
        file.unlink(missing_ok=True)


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with what shape inference tells of its tensors; without the values of its weights if they are large."""
    return onnx.shape_inference.infer_shapes(external_data.skeleton(model) if external_data.is_large(model) else model)


def strip(model: onnx.ModelProto) -> None:
    """Drop metadata, doc strings and intermediate shapes; in place."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""


def foreign_nodes(model: onnx.ModelProto) -> list[str]:
    """Operators outside the default ONNX domain, which TensorRT's parser refuses; empty if there is none."""
    return sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")})


def constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Initializers by name, as arrays."""
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def drop_unused_constants(model: onnx.ModelProto) -> None:
    """Remove initializers that no node reads; in place."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def sort_nodes(model: onnx.ModelProto) -> None:
    """Put nodes in topological order, otherwise as they stand; in place. Passes may append nodes anywhere before."""
    made_by = producers(model)
    ordered: list[onnx.NodeProto] = []
    done: set[str] = set()
    for root in model.graph.node:
        waiting = [root]
        while waiting:
            node = waiting[-1]
            missing = [made_by[n] for n in node.input if n in made_by and n not in done]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if not done.issuperset(node.output):
                done.update(node.output)
                ordered.append(node)
    replace_nodes(model, ordered)


def replace_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make ``nodes`` the graph's nodes; they may be the graph's own."""
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def consumers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Nodes that read a tensor, by tensor name."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that writes a tensor, by tensor name."""
    return {name: node for node in model.graph.node for name in node.output}


def example_feeds(model: onnx.ModelProto, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Seeded inputs of plausible size, labels and images in their own range.

    Dynamic axes get 2, 3, 4 … in the order they appear (2 prompts of 3 points); those of one name, one size. Raises
    GraphError for an input that is not a tensor of numbers.
    """
    rng = np.random.default_rng(seed)
    names = [i.name for i in model.graph.initializer]
    feeds: dict[str, npt.NDArray[Any]] = {}
    sizes: dict[str, int] = {}
    for spec in model.graph.input:
        if spec.name in names:
            continue
        tensor = spec.type.tensor_type
        axes = [d.dim_param or f"{spec.name}:{i}" for i, d in enumerate(tensor.shape.dim)]
        shape = [
            d.dim_value if d.HasField("dim_value") else sizes.setdefault(axis, len(sizes) + 2)
            for d, axis in zip(tensor.shape.dim, axes, strict=True)
        ]
        if tensor.elem_type not in _NUMBERS:
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise GraphError(f"the graph's input '{spec.name}' must be a tensor of numbers, is {kind}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.uint8 and len(shape) >= 2:
            feeds[spec.name] = _blocks(rng, shape)
        elif spec.name == POINT_LABELS:
            feeds[spec.name] = rng.integers(-1, 4, shape).astype(dtype)
        else:
            size = 200.0 if spec.name == POINT_COORDS else 1.0
            feeds[spec.name] = (rng.random(shape) * size).astype(dtype)
    return feeds


def _blocks(rng: np.random.Generator, shape: list[int]) -> npt.NDArray[np.uint8]:
    """A picture of coloured blocks with some noise: edges and flat areas, as photographs have."""
    side = -(-shape[-1] // 8)
    coarse = rng.integers(0, 232, (*shape[:-2], 8, 8))
    picture = np.kron(coarse, np.ones((side, side), dtype=np.int64))[..., : shape[-2], : shape[-1]]
    return (picture + rng.integers(0, 24, shape)).astype(np.uint8)


def disagreement(first: Path, second: Path, feeds: Mapping[str, npt.NDArray[Any]]) -> float:
    """Largest |difference| of any output, relative to that output's largest |value|; inf where one is not finite."""
    with open_session(first) as session:
        expected = session.run(feeds)
    # One after the other: both at once would hold the weights of large models twice.
    with open_session(second) as session:
        return relative_error(expected, session.run(feeds))


def relative_error(expected: Mapping[str, npt.NDArray[Any]], got: Mapping[str, npt.NDArray[Any]]) -> float:
    """max over outputs of max|got - expected| / max|expected|; inf for other names, shapes or a value not finite."""
    if set(expected) != set(got):
        return float("inf")
    worst = 0.0
    for name, want in expected.items():
        have = got[name]
        if have.shape != want.shape or not np.isfinite(have).all():
            return float("inf")
        worst = max(worst, float(np.abs(have - want).max() / max(float(np.abs(want).max()), 1e-12)))
    return worst
