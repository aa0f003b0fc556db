"""Weights in a file beside the graph: one ONNX file is one protobuf message, which ends at 2 GB.

``encoder.onnx`` then keeps its small constants, and names for every large one its place in ``encoder.onnx.data``. The
graph states the sha256 of that file, so the hash of the graph alone still identifies what it computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file, write_bytes, writing

SUFFIX = ".data"
DATA_SHA256 = "data_sha256"
# Of weights, in one file; a message may have 2³¹ - 1 bytes, the rest is room for nodes and names.
LIMIT_BYTES = (1 << 31) - (1 << 26)
# What is not larger stays in the graph: shape inference and simplifiers read shapes, axes and factors.
SMALL_BYTES = 1024
# Of a page, so that readers may map the file into memory.
ALIGNMENT = 4096


def data_file(graph: Path) -> Path:
    """Where the weights of ``graph`` are if they are not in it."""
    return graph.with_name(graph.name + SUFFIX)


def is_large(model: onnx.ModelProto) -> bool:
    """Whether a graph's weights are too many for one file."""
    return sum(map(_size, model.graph.initializer)) > LIMIT_BYTES


def is_external(model: onnx.ModelProto) -> bool:
    """Whether a graph, as it was parsed, has weights in another file."""
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with names, types and shapes of large weights, and not their values: what fits into one message."""
    copied = onnx.ModelProto()
    _copy(model, copied, ("graph",))
    _copy(model.graph, copied.graph, ("initializer",))
    for tensor in model.graph.initializer:
        stub = copied.graph.initializer.add()
        if tensor.data_location == TensorProto.EXTERNAL or _size(tensor) <= SMALL_BYTES:
            stub.CopyFrom(tensor)
        else:
            stub.name, stub.data_type, stub.data_location = tensor.name, tensor.data_type, TensorProto.EXTERNAL
            stub.dims.extend(tensor.dims)
    return copied


def write(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph to ``path`` and, if it is large, its weights beside it; each file whole or not at all.

    Raises GraphError for a graph whose weights are still in another file.
    """
    if is_external(model):
        raise GraphError(f"cannot write {path}: its weights were not read; load the graph with them")
    if not is_large(model):
        write_bytes(path, model.SerializeToString(deterministic=True))
        # Of a larger graph that was here before.
        data_file(path).unlink(missing_ok=True)
        return
    light = skeleton(model)
    data = data_file(path)
    with writing(data) as temporary, temporary.open("wb") as file:
        digest = hashlib.sha256()
        for stub, tensor in zip(light.graph.initializer, model.graph.initializer, strict=True):
            if stub.data_location == TensorProto.EXTERNAL:
                _append(file, digest, stub, tensor, data.name)
    light.metadata_props.add(key=DATA_SHA256, value=digest.hexdigest())
    write_bytes(path, light.SerializeToString(deterministic=True))


def read_weights(model: onnx.ModelProto, path: Path) -> None:
    """Read the weights of the graph of ``path`` from the files that it names; in place.

    Raises GraphError if one is missing, cut, outside the graph's folder, or not the one the graph was written with.
    """
    stated = next((p.value for p in model.metadata_props if p.key == DATA_SHA256), None)
    if stated is not None and data_file(path).is_file() and (found := sha256_file(data_file(path))) != stated:
        raise GraphError(
            f"{data_file(path)} is not of this graph: expected sha256 {stated}, found {found}. Copy both files "
            "together, or run the stage that makes them again"
        )
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.raw_data = _read(tensor, path)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")


def copy(model: onnx.ModelProto, source: Path, output: Path) -> None:
    """Write the graph that was parsed from ``source``, weights unread, to ``output``, and its weights beside it."""
    names = {_entries(t)["location"] for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    if names != {data_file(source).name}:
        raise GraphError(f"{source} keeps its weights in {sorted(names)}, expected {data_file(source).name}")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data_file(output).name
    with writing(data_file(output)) as temporary, temporary.open("wb") as target, data_file(source).open("rb") as file:
        while chunk := file.read(1 << 24):
            target.write(chunk)
    write_bytes(output, model.SerializeToString(deterministic=True))


def hide_weights(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[TensorProto]]:
    """(a copy in which large weights are inputs, those weights): for tools that hand a graph on as one message."""
    light = skeleton(model)
    hidden = [
        tensor
        for tensor, stub in zip(model.graph.initializer, light.graph.initializer, strict=True)
        if stub.data_location == TensorProto.EXTERNAL
    ]
    kept = [stub for stub in light.graph.initializer if stub.data_location != TensorProto.EXTERNAL]
    del light.graph.initializer[:]
    light.graph.initializer.extend(kept)
    for tensor in hidden:
        light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light, hidden


def reveal_weights(model: onnx.ModelProto, hidden: Sequence[TensorProto]) -> None:
    """Undo ``hide_weights`` on what a tool made of its copy; in place. Weights that no node reads stay out."""
    names = {tensor.name for tensor in hidden}
    inputs = [spec for spec in model.graph.input if spec.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(tensor for tensor in hidden if tensor.name in used)


def _size(tensor: TensorProto) -> int:
    """Bytes of a tensor's values, wherever they are."""
    if tensor.data_type == TensorProto.STRING:
        return 0
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _append(file: BinaryIO, digest: Any, stub: TensorProto, tensor: TensorProto, name: str) -> None:
    """Write a tensor's values to the data file and their place into its stub."""
    values = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
    padding = bytes(-file.tell() % ALIGNMENT)
    place = {"location": name, "offset": file.tell() + len(padding), "length": len(values)}
    for part in (padding, values):
        file.write(part)
        digest.update(part)
    for key, value in place.items():
        stub.external_data.add(key=key, value=str(value))


def _read(tensor: TensorProto, path: Path) -> bytes:
    """The values of one tensor, from a file in the folder of its graph ``path``."""
    place = _entries(tensor)
    data = path.with_name(place["location"]) if Path(place["location"]).name == place["location"] else None
    if data is None:
        raise GraphError(f"{path} names weights outside its folder: '{place['location']}'")
    try:
        with data.open("rb") as file:
            file.seek(int(place.get("offset", 0)))
            values = file.read(_size(tensor))
    except OSError as error:
        raise GraphError(
            f"cannot read the weights of {path} in {data}: {error.strerror or error}; keep both files together"
        ) from error
    if len(values) != _size(tensor):
        raise GraphError(f"{data} is cut: it ends within '{tensor.name}' of {path}. Copy it whole")
    return values


def _entries(tensor: TensorProto) -> dict[str, str]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries.get("location"):
        raise GraphError(f"the weight '{tensor.name}' has no values, in its graph or in another file")
    return entries


def _copy(source: Message, target: Message, without: Sequence[str]) -> None:
    """Copy all fields that are set, but for some, into an empty message."""
    for field, value in source.ListFields():
        if field.name in without:
            continue
        place = getattr(target, field.name)
        if hasattr(place, "extend"):
            place.extend(value)
        elif isinstance(place, Message):
            place.CopyFrom(value)
        else:
            setattr(target, field.name, value)
