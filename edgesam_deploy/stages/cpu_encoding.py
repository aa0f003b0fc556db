"""Stage 3c: the CPU twin of an INT8 graph: the same arithmetic in the encoding that ONNX Runtime runs fast on x86.

TensorRT wants int8 with zero point 0; ONNX Runtime's fast kernels take uint8. uint8 with zero point 128 and the same
scale is the same set of representable values, so the twin is made by rewriting the TensorRT graph, with no
calibration of its own:

- every activation Q/DQ becomes uint8 with zero point 128;
- ONNX Runtime fuses a convolution only if its output is quantized, so Q moves in front of a following Relu or Clip
  (both commute with rounding), which becomes a Clip on uint8; where TensorRT returns a convolution in float to an
  addition or a resize, the twin rounds it, with the range that the one calibration recorded;
- biases become int32 with scale (input scale x weight scale), the precision of the accumulator.

A quantized convolution that ends in a graph output keeps computing in float on the rounded values, exactly as TensorRT
would return it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.quantize import INT8_MAX

ZERO_POINT = 128


@dataclass(frozen=True, slots=True)
class CpuEncodingResult:
    """fused: convolutions with a quantized output, which ONNX Runtime runs wholly in INT8, of ``quantized``."""

    output: Path
    fused: int
    quantized: int


def encode_for_cpu(source: Path, ranges: Ranges, output: Path) -> CpuEncodingResult:
    """Rewrite a Q/DQ graph in TensorRT's encoding into its CPU twin. ranges: those the graph was quantized with."""
    model = graphs.load(source)
    _unsigned_activations(model)
    _move_quantize_before_activations(model)
    _round_float_outputs(model, ranges)
    fused, quantized = _integer_biases(model)
    graphs.drop_unused_constants(model)
    origin = {"stage": "encode", "encoding": "cpu", "parent_sha256": sha256_file(source)}
    graphs.save(model, output, origin)
    return CpuEncodingResult(output, fused, quantized)


def _unsigned_activations(model: onnx.ModelProto) -> None:
    """int8 zero point 0 -> uint8 zero point 128 for every scalar (activation) zero point."""
    zeros = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in zeros:
            tensor.CopyFrom(numpy_helper.from_array(np.array(ZERO_POINT, dtype=np.uint8), tensor.name))


def _move_quantize_before_activations(model: onnx.ModelProto) -> None:
    """Conv -> Relu|Clip(min) -> Q  becomes  Conv -> Q -> Clip on uint8, where Q is the activation's only reader."""
    values, users, made_by = graphs.constants(model), graphs.consumers(model), graphs.producers(model)
    for quantize in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:
        activation = made_by.get(quantize.input[0])
        if activation is None or len(users[activation.output[0]]) != 1:
            continue
        low = _lower_bound(activation, values)
        conv = made_by.get(activation.input[0])
        if low is None or conv is None or conv.op_type != "Conv" or len(users[conv.output[0]]) != 1:
            continue
        bound = np.clip(np.rint(low / float(values[quantize.input[1]])) + ZERO_POINT, 0, 255).astype(np.uint8)
        name = f"{quantize.name}:low"
        model.graph.initializer.append(numpy_helper.from_array(np.array(bound), name))
        raw = f"{quantize.output[0]}:raw"
        clip = helper.make_node("Clip", [raw, name], [quantize.output[0]], name=activation.name)
        quantize.input[0], quantize.output[0] = conv.output[0], raw
        position = next(i for i, n in enumerate(model.graph.node) if n.name == quantize.name)
        model.graph.node.insert(position + 1, clip)
        model.graph.node.remove(activation)


def _round_float_outputs(model: onnx.ModelProto, ranges: Ranges) -> None:
    """Add Q/DQ behind quantized convolutions whose output is read in float, so that they run in INT8.

    Where another reader quantizes the output already, the float readers take that pair's values.
    """
    users, made_by = graphs.consumers(model), graphs.producers(model)
    for position, conv in reversed(list(enumerate(model.graph.node))):
        name = conv.output[0]
        readers = users.get(name, [])
        in_float = [reader for reader in readers if reader.op_type != "QuantizeLinear"]
        if not _is_quantized_conv(conv, made_by) or not in_float:
            continue
        if len(in_float) == len(readers):
            for node in reversed(_pair(model, name, ranges)):
                model.graph.node.insert(position + 1, node)
        for reader in in_float:
            for index, read in enumerate(reader.input):
                if read == name:
                    reader.input[index] = f"{name}:dq"
    graphs.sort_nodes(model)


def _pair(model: onnx.ModelProto, name: str, ranges: Ranges) -> list[onnx.NodeProto]:
    """A uint8 Q and DQ for tensor ``name`` by its calibrated range; the constants go into the model."""
    if name not in ranges.amax:
        raise GraphError(f"calibration has no range for tensor '{name}': calibrate again")
    scale = np.array(max(ranges.amax[name], 1e-12) / INT8_MAX, dtype=np.float32)
    parameters = [f"{name}:scale", f"{name}:zero"]
    values: list[npt.NDArray[Any]] = [scale, np.array(ZERO_POINT, dtype=np.uint8)]
    for parameter, value in zip(parameters, values, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(value, parameter))
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}:q"], name=f"{name}:q"),
        helper.make_node("DequantizeLinear", [f"{name}:q", *parameters], [f"{name}:dq"], name=f"{name}:dq"),
    ]


def _is_quantized_conv(node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto]) -> bool:
    inputs = [made_by.get(name) for name in node.input[:2]]
    return node.op_type == "Conv" and all(n is not None and n.op_type == "DequantizeLinear" for n in inputs)


def _lower_bound(node: onnx.NodeProto, values: dict[str, npt.NDArray[np.float32]]) -> float | None:
    """The minimum that a Relu or a Clip without maximum enforces; None for any other node."""
    if node.op_type == "Relu":
        return 0.0
    if node.op_type == "Clip" and len(node.input) == 2 and node.input[1] in values:
        return float(values[node.input[1]])
    return None


def _integer_biases(model: onnx.ModelProto) -> tuple[int, int]:
    """int32 biases where a Q reads the convolution's output; (how many such convolutions, all quantized ones)."""
    values, users, made_by = graphs.constants(model), graphs.consumers(model), graphs.producers(model)
    fused = quantized = 0
    for position, conv in reversed(list(enumerate(model.graph.node))):
        if not _is_quantized_conv(conv, made_by):
            continue
        quantized += 1
        if not users.get(conv.output[0]):
            continue
        fused += 1
        if len(conv.input) < 3:
            continue
        x, w = (values[made_by[name].input[1]] for name in conv.input[:2])
        scale = (x * w).astype(np.float32)
        bias = np.rint(values[conv.input[2]] / scale.astype(np.float64))
        limits = np.iinfo(np.int32)
        name = f"{conv.name}:bias"
        for suffix, array in (
            ("int32", np.clip(bias, limits.min, limits.max).astype(np.int32)),
            ("scale", scale),
            ("zero", np.zeros(scale.shape, dtype=np.int32)),
        ):
            model.graph.initializer.append(numpy_helper.from_array(array, f"{name}_{suffix}"))
        inputs = [f"{name}_int32", f"{name}_scale", f"{name}_zero"]
        model.graph.node.insert(
            position, helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}_dq", axis=0)
        )
        conv.input[2] = f"{name}_dq"
    return fused, quantized
