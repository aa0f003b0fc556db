"""Bias correction: take the mean error that INT8 leaves in a layer's output out again, by its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2: rounding a
weight shifts the mean of its output channel, whatever the image; E[y_int8] - E[y_fp32] belongs into the bias. Here both
means are measured on calibration images, layer after layer in graph order, those before a layer corrected already.
Weights, scales and the FP32 graph stay as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.contract import IMAGE
from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.images import read_image
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import external_data
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.transforms import to_encoder_input

_SUM, _SIZE = ":bias_sum", ":bias_size"
# Per output channel of a tensor, by its name.
Means = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class BiasResult:
    """layers: whose bias was corrected. largest: what was taken out of one channel, in the tensor's own units."""

    output: Path
    layers: int
    largest: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """tensor: an INT8 node's output, channels on ``axis``. owner, index: the node and input that hold its bias."""

    tensor: str
    axis: int
    owner: str
    index: int


def correct_biases(
    source: Path,
    quantized: Path,
    images: Sequence[Path],
    recipe: Recipe,
    output: Path,
    progress: Callable[[Iterable[_Layer]], Iterable[_Layer]] = iter,
) -> BiasResult:
    """Correct an INT8 encoder (TensorRT's encoding, float32 beside it) towards the FP32 graph that it was made from.

    One pass over the images per layer, up to that layer; one image at a time. progress: wraps the iteration over
    layers. Raises GraphError if ``quantized`` holds tensors that ``source`` lacks.
    """
    model = graphs.load(quantized)
    layers = list(_layers(model))
    reference = graphs.load(source)
    if missing := {layer.tensor for layer in layers} - graphs.producers(reference).keys():
        raise GraphError(f"{quantized} was not made from {source}, which has no tensor '{min(missing)}'")

    def feeds() -> Iterator[dict[str, npt.NDArray[Any]]]:
        for path in images:
            size, padding, resize = recipe.geometry.image_size, recipe.pixels.padding, recipe.geometry.resize
            yield {IMAGE: to_encoder_input(read_image(path), size, padding, resize)}

    wanted = _means(reference, layers, feeds())
    largest = 0.0
    for layer in progress(layers):
        error = _means(model, [layer], feeds())[layer.tensor] - wanted[layer.tensor]
        _subtract(model, layer, error)
        largest = max(largest, float(np.abs(error).max()))
    graphs.drop_unused_constants(model)
    graphs.save(model, output, {"stage": "correct-biases", "parent_sha256": sha256_file(quantized)})
    return BiasResult(output, len(layers), largest)


def _layers(model: onnx.ModelProto) -> Iterator[_Layer]:
    """INT8 nodes that have a bias, or a place for one: input 2, or an addition of a constant behind a MatMul."""
    values, users, made_by = graphs.constants(model), graphs.consumers(model), graphs.producers(model)
    for node in model.graph.node:
        weight = made_by.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in values:
            continue
        name, readers = node.output[0], users.get(node.output[0], [])
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            if len(node.input) > 2 and node.input[2] and node.input[2] not in values:
                continue  # computed, not a constant
            yield _Layer(name, 1, node.name, 2)
        elif node.op_type == "MatMul" and len(readers) == 1 and readers[0].op_type == "Add":
            constant = [i for i, n in enumerate(readers[0].input) if n in values and values[n].ndim == 1]
            if constant:
                yield _Layer(name, -1, readers[0].name, constant[0])


def _means(model: onnx.ModelProto, layers: Sequence[_Layer], feeds: Iterable[Mapping[str, Any]]) -> Means:
    """Mean of every channel of the layers' outputs over all images and positions."""
    inferred = graphs.inferred(model)
    rank = {v.name: len(v.type.tensor_type.shape.dim) for v in (*inferred.graph.value_info, *inferred.graph.output)}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for layer in layers:
        name, axes = layer.tensor, f"{layer.tensor}:bias_axes"
        others = [i for i in range(rank[name]) if i != layer.axis % rank[name]]
        watched.graph.initializer.append(numpy_helper.from_array(np.array(others, dtype=np.int64), axes))
        watched.graph.node.append(helper.make_node("ReduceSum", [name, axes], [name + _SUM], keepdims=0))
        watched.graph.node.append(helper.make_node("Size", [name], [name + _SIZE]))
        for suffix, kind in ((_SUM, TensorProto.FLOAT), (_SIZE, TensorProto.INT64)):
            watched.graph.output.append(helper.make_tensor_value_info(name + suffix, kind, None))
    totals: Means = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        external_data.write(watched, path)
        with open_session(path) as session:
            for feed in feeds:
                outputs = session.run(feed)
                for name in (layer.tensor for layer in layers):
                    totals[name] = totals.get(name, 0.0) + outputs[name + _SUM].astype(np.float64)
                    sizes[name] = sizes.get(name, 0) + int(outputs[name + _SIZE])
    return {name: total * total.size / sizes[name] for name, total in totals.items()}


def _subtract(model: onnx.ModelProto, layer: _Layer, error: npt.NDArray[np.float64]) -> None:
    """Take ``error`` (C,) out of the layer's bias, or give it one; a bias that others read too keeps its value."""
    owner = next(node for node in model.graph.node if node.name == layer.owner)
    held = owner.input[layer.index] if layer.index < len(owner.input) else ""
    bias = graphs.constants(model)[held] if held else np.zeros(error.shape)
    name = f"{layer.owner}:corrected_bias"
    model.graph.initializer.append(numpy_helper.from_array((bias - error).astype(np.float32), name))
    if layer.index < len(owner.input):
        owner.input[layer.index] = name
    else:
        owner.input.append(name)
