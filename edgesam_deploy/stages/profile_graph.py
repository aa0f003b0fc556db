"""What an ONNX graph costs as it stands: for exported, typed and quantized graphs, and for bundles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

from edgesam_deploy.bundle import GRAPHS, load_bundle
from edgesam_deploy.contract import POINTS_AXIS, PROMPTS_AXIS
from edgesam_deploy.measure.profile import GraphProfile, Layer
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.node_work import POINTS, PROMPTS, VIEWS, kernels, macs
from edgesam_deploy.stages.placement import WEIGHTED
from edgesam_deploy.stages.shapes import TensorType, tensor_types
from edgesam_deploy.stages.typed_nodes import node_name

# Constants of other types are shapes, indices and zero points.
_WEIGHTS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
)


def profile_graphs(path: Path, top: int = 10) -> list[GraphProfile]:
    """Of one ONNX file, or of both graphs of a bundle.

    Raises GraphError for a file that is no graph or whose shapes cannot be told, BundleError for a damaged bundle.
    """
    if path.suffix == ".onnx":
        return [profile_graph(path, top)]
    bundle = load_bundle(path, plans=False)
    return [profile_graph(bundle.path / f"{name}.onnx", top) for name in GRAPHS]


def profile_graph(path: Path, top: int = 10) -> GraphProfile:
    """One image, one prompt of two points."""
    model = graphs.load(path)
    types = tensor_types(model, {PROMPTS_AXIS: PROMPTS, POINTS_AXIS: POINTS})
    by_operator: dict[str, int] = {}
    layers = []
    constant = _constants(model)
    for node in model.graph.node:
        if node.op_type in WEIGHTED:
            amount = macs(node, types)
            by_operator[node.op_type] = by_operator.get(node.op_type, 0) + amount
            own = sum(types[name].elements for name in node.input if name in constant)
            layers.append(Layer(node_name(node), node.op_type, own, amount))
    written, peak = _activations(model, types, constant)
    return GraphProfile(
        file=str(path),
        nodes=len(model.graph.node),
        parameters=sum(math.prod(i.dims) for i in model.graph.initializer if i.data_type in _WEIGHTS),
        macs=dict(sorted(by_operator.items())),
        activation_bytes=written,
        peak_bytes=peak,
        moved_bytes=sum(kernel.bytes for kernel in kernels(model)),
        top=tuple(sorted(layers, key=lambda layer: -layer.macs)[:top]),
    )


def _constants(model: onnx.ModelProto) -> frozenset[str]:
    """Initializers, and what nodes make of these alone."""
    found = {i.name for i in model.graph.initializer}
    for node in model.graph.node:
        if all(name in found for name in node.input if name):
            found.update(node.output)
    return frozenset(found)


def _activations(model: onnx.ModelProto, types: Mapping[str, TensorType], constant: frozenset[str]) -> tuple[int, int]:
    """(bytes of all that nodes write, the most alive at a time in graph order)."""
    origin: dict[str, str] = {}
    inputs = [value.name for value in model.graph.input if value.name not in constant]
    last_read: dict[str, int] = {}
    made: dict[int, list[str]] = {}
    for index, node in enumerate(model.graph.node):
        if constant.issuperset(node.output):
            continue
        view = node.op_type in VIEWS or node.op_type == "DequantizeLinear"
        for name in node.input:
            last_read[origin.get(name, name)] = index
        for name in node.output:
            if view:
                origin[name] = origin.get(node.input[0], node.input[0])
            elif name:
                made.setdefault(index, []).append(name)
                last_read.setdefault(name, index)
    end = len(model.graph.node)
    for output in model.graph.output:
        last_read[origin.get(output.name, output.name)] = end
    return _walk(types, inputs, made, last_read)


def _walk(
    types: Mapping[str, TensorType], inputs: list[str], made: Mapping[int, list[str]], last_read: Mapping[str, int]
) -> tuple[int, int]:
    """made: tensors by the position of their node. An input is kept to the end, as a caller keeps it."""
    freed: dict[int, int] = {}
    for names in made.values():
        for name in names:
            freed[last_read[name]] = freed.get(last_read[name], 0) + types[name].bytes
    live = sum(types[name].bytes for name in inputs)
    written, peak = 0, live
    for index in sorted({*made, *freed}):
        new = sum(types[name].bytes for name in made.get(index, ()))
        written += new
        live += new
        peak = max(peak, live)
        live -= freed.get(index, 0)
    return written, peak
