"""Stage 3b: put INT8 into the graph as explicit Q/DQ, where TensorRT wants it.

Q/DQ sits on the inputs of weighted layers (int8, symmetric, per tensor), weights are int8 per output channel, biases
stay FP32. Tensors that meet in a Concat, or pass a MaxPool or Pad, share one scale, and these operators read and write
quantized tensors: rounding twice with one scale is rounding once, so the data stays INT8 at no cost in accuracy. Where
two convolutional branches meet in an Add, its inputs get Q/DQ, except one that is a convolution's direct output:
TensorRT fuses that convolution with the addition. Transformer residual streams, norms and softmax are never touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.recipe import Int8Rules
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.placement import (
    SAME_RANGE,
    activation_inputs,
    add_inputs,
    carried_inputs,
    channel_axis,
    eligible,
)

INT8_MAX = 127
# Sixteen of FP16's smallest steps: below it, scales would be too coarse to be of use.
MIN_SCALE = 2.0**-20
NOT_CHOSEN = "left out of INT8"
NEVER_SEEN = "calibration saw only zeros in what it reads"


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """quantized: nodes that compute in INT8, of ``weighted`` in the graph that multiply. int8: their names, in graph
    order. activations: tensors with a Q/DQ pair. reasons: every node that multiplies and is not INT8, with the reason.
    """

    output: Path
    quantized: int
    weighted: int
    activations: int
    int8: tuple[str, ...]
    reasons: Mapping[str, str]


def quantize(
    source: Path, ranges: Ranges, rules: Int8Rules, output: Path, only: Collection[str] | None = None
) -> QuantizeResult:
    """Insert Q/DQ into a simplified FP32 graph by calibrated ranges and rules.

    only: names of the nodes that shall be INT8, among those that the rules allow; None for all of these. Raises
    GraphError if the ranges belong to another graph or ``only`` names a node that the rules do not allow.
    """
    if ranges.graph_sha256 != sha256_file(source):
        raise GraphError(f"the calibration ranges were taken on another graph than {source}: calibrate again")
    model = graphs.load(source)
    chosen, reasons = _choose(model, ranges, rules, only)
    amax = _shared_amax(model, ranges.amax)
    inserter = _Inserter(model, amax)
    adds = add_inputs(model, {n.name for n in chosen}, rules)
    for node in chosen:
        indices = activation_inputs(node, inserter.values)
        if indices == [0]:
            inserter.weight(node)
        for index in indices:
            inserter.activation(node, index)
    for node, index in adds:
        if amax.get(node.input[index]):
            inserter.activation(node, index)
    inserter.carriers()
    graphs.sort_nodes(model)
    graphs.drop_unused_constants(model)
    origin = {"stage": "quantize", "encoding": "tensorrt", "calibration_digest": ranges.images_digest}
    graphs.save(model, output, {**origin, "parent_sha256": sha256_file(source)})
    names = tuple(node.name for node in chosen)
    return QuantizeResult(output, len(names), len(names) + len(reasons), inserter.activations, names, reasons)


def _choose(
    model: onnx.ModelProto, ranges: Ranges, rules: Int8Rules, only: Collection[str] | None
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """The nodes to quantize, in graph order, and why the others that multiply are not."""
    allowed, reasons = eligible(model, rules)
    if only is not None and (unknown := sorted(set(only) - set(allowed))):
        why = reasons.get(unknown[0], "the graph has no such node that multiplies")
        raise GraphError(f"cannot quantize '{unknown[0]}': {why}")
    values = graphs.constants(model)
    by_name = {node.name: node for node in model.graph.node}
    chosen = []
    for name in allowed:
        node = by_name[name]
        if not all(ranges.amax.get(node.input[i], 0.0) > 0.0 for i in activation_inputs(node, values)):
            reasons[name] = NEVER_SEEN
        elif only is not None and name not in only:
            reasons[name] = NOT_CHOSEN
        else:
            chosen.append(node)
    return chosen, reasons


class _Inserter:
    """Adds each Q/DQ pair once and rewires its readers; new nodes go to the end, the caller sorts them."""

    def __init__(self, model: onnx.ModelProto, amax: Mapping[str, float]) -> None:
        self.model = model
        self.amax = amax
        self.values = graphs.constants(model)
        self.pairs: dict[str, str] = {}

    @property
    def activations(self) -> int:
        return len(self.pairs)

    def weight(self, node: onnx.NodeProto) -> None:
        """Replace the node's float weight by int8 values and a DequantizeLinear per output channel."""
        name = node.input[1]
        weight, axis = self.values[name], channel_axis(node)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = _scale(np.abs(weight).max(axis=others))
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        rounded = np.clip(np.rint(weight / scale.reshape(shape)), -INT8_MAX, INT8_MAX).astype(np.int8)
        out = f"{node.name}:weight_dq"
        self._constant(f"{node.name}:weight_int8", rounded)
        self._constant(f"{node.name}:weight_scale", scale)
        self._constant(f"{node.name}:weight_zero", np.zeros(scale.shape, dtype=np.int8))
        inputs = [f"{node.name}:weight_int8", f"{node.name}:weight_scale", f"{node.name}:weight_zero"]
        self.model.graph.node.append(helper.make_node("DequantizeLinear", inputs, [out], name=out, axis=axis))
        node.input[1] = out

    def activation(self, node: onnx.NodeProto, index: int) -> None:
        """Let ``node`` read input ``index`` through a Q/DQ pair; readers of one tensor share the pair."""
        name = node.input[index]
        if name not in self.pairs:
            self.pairs[name] = f"{name}:dq"
            self._pair(name)
        node.input[index] = self.pairs[name]

    def carriers(self) -> None:
        """Concat, MaxPool and Pad before a quantized tensor read quantized tensors too."""
        for node in reversed(self.model.graph.node):
            if node.op_type in SAME_RANGE and node.output[0] in self.pairs:
                for index in carried_inputs(node):
                    self.activation(node, index)

    def _pair(self, name: str) -> None:
        if name not in self.amax:
            raise GraphError(f"calibration has no range for tensor '{name}': calibrate again")
        scale = _scale(np.array(self.amax[name]))
        self._constant(f"{name}:scale", scale)
        self._constant(f"{name}:zero", np.array(0, dtype=np.int8))
        extra = [f"{name}:scale", f"{name}:zero"]
        self.model.graph.node.append(
            helper.make_node("QuantizeLinear", [name, *extra], [f"{name}:q"], name=f"{name}:q")
        )
        self.model.graph.node.append(
            helper.make_node("DequantizeLinear", [f"{name}:q", *extra], [f"{name}:dq"], name=f"{name}:dq")
        )

    def _constant(self, name: str, value: npt.NDArray[Any]) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))


def _scale(amax: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The step that covers |x| <= amax, rounded up to a number that FP16 has.

    Scales are FP16 where the rest of the graph is; taken from one set for every variant, they round alike everywhere.
    """
    exact = np.maximum(amax.astype(np.float64) / INT8_MAX, MIN_SCALE)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    return np.where(np.isfinite(half), half, exact).astype(np.float32)


def _shared_amax(model: onnx.ModelProto, amax: Mapping[str, float]) -> dict[str, float]:
    """amax per tensor, with tensors tied by a Concat, MaxPool or Pad raised to the largest of their group."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for node in model.graph.node:
        if node.op_type in SAME_RANGE:
            for index in carried_inputs(node):
                parent[root(node.input[index])] = root(node.output[0])
    largest: dict[str, float] = {}
    for name, value in amax.items():
        largest[root(name)] = max(value, largest.get(root(name), 0.0))
    return {name: largest[root(name)] for name in amax}
