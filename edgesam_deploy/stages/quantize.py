"""Stage 3b: put INT8 into the graph as explicit Q/DQ, where TensorRT wants it.

Q/DQ sits on the inputs of weighted layers (int8, symmetric, per tensor), weights are int8 per output channel, biases
stay FP32. Tensors that meet in a Concat, or pass a MaxPool or Pad, share one scale, and these operators read and write
quantized tensors: rounding twice with one scale is rounding once, so the data stays INT8 at no cost in accuracy. Where
two convolutional branches meet in an Add, its inputs get Q/DQ, except one that is a convolution's direct output:
TensorRT fuses that convolution with the addition. Transformer residual streams, norms and softmax are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

INT8_MAX = 127
# Operators whose output holds only values of their inputs: one scale serves both sides.
_SAME_RANGE = ("Concat", "MaxPool", "Pad")
_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """quantized: weighted layers that compute in INT8, of ``weighted`` in the graph."""

    output: Path
    quantized: int
    weighted: int
    activations: int


def quantize(source: Path, ranges: Ranges, rules: Int8Rules, output: Path) -> QuantizeResult:
    """Insert Q/DQ into a simplified FP32 graph by calibrated ranges and a recipe's rules.

    Raises GraphError if the ranges belong to another graph.
    """
    if ranges.graph_sha256 != sha256_file(source):
        raise GraphError(f"the calibration ranges were taken on another graph than {source}: calibrate again")
    model = graphs.load(source)
    weighted = [n for n in model.graph.node if _weight_of(n, graphs.constants(model)) is not None]
    chosen = [n for n in weighted if _wanted(n, rules)]
    inserter = _Inserter(model, _shared_amax(model, ranges.amax))
    for node in chosen:
        inserter.weight(node)
    for node in chosen:
        inserter.activation(node, 0)
    for node, index in _add_inputs(model, {n.name for n in chosen}):
        inserter.activation(node, index)
    inserter.carriers()
    graphs.sort_nodes(model)
    graphs.drop_unused_constants(model)
    origin = {"stage": "quantize", "encoding": "tensorrt", "calibration_digest": ranges.images_digest}
    graphs.save(model, output, {**origin, "parent_sha256": sha256_file(source)})
    return QuantizeResult(output, len(chosen), len(weighted), inserter.activations)


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
        weight, axis = self.values[name], _channel_axis(node)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.maximum(np.abs(weight).max(axis=others), 1e-12).astype(np.float32) / np.float32(INT8_MAX)
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
            if node.op_type in _SAME_RANGE and node.output[0] in self.pairs:
                for index in _carried(node):
                    self.activation(node, index)

    def _pair(self, name: str) -> None:
        if name not in self.amax:
            raise GraphError(f"calibration has no range for tensor '{name}': calibrate again")
        scale = np.array(max(self.amax[name], 1e-12) / INT8_MAX, dtype=np.float32)
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


def _weight_of(node: onnx.NodeProto, values: Mapping[str, Any]) -> str | None:
    """The name of a weighted layer's constant weight, or None."""
    if node.op_type in _WEIGHTED and node.input[1] in values and values[node.input[1]].ndim >= 2:
        return str(node.input[1])
    return None


def _channel_axis(node: onnx.NodeProto) -> int:
    """The output channel axis of the weight: what INT8 scales of weights run along."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
        return 0
    return 1


def _wanted(node: onnx.NodeProto, rules: Int8Rules) -> bool:
    if any(re.search(pattern, node.name) for pattern in rules.keep):
        return False
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    return rules.depthwise or groups == 1


def _shared_amax(model: onnx.ModelProto, amax: Mapping[str, float]) -> dict[str, float]:
    """amax per tensor, with tensors tied by a Concat, MaxPool or Pad raised to the largest of their group."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for node in model.graph.node:
        if node.op_type in _SAME_RANGE:
            for index in _carried(node):
                parent[root(node.input[index])] = root(node.output[0])
    largest: dict[str, float] = {}
    for name, value in amax.items():
        largest[root(name)] = max(value, largest.get(root(name), 0.0))
    return {name: largest[root(name)] for name in amax}


def _carried(node: onnx.NodeProto) -> range:
    """Indices of the inputs whose values appear in the output (not the pads of a Pad)."""
    return range(len(node.input) if node.op_type == "Concat" else 1)


def _add_inputs(model: onnx.ModelProto, chosen: set[str]) -> list[tuple[onnx.NodeProto, int]]:
    """(Add, input index) to quantize: where one input, through Relu or Clip at most, is a quantized convolution's.

    An input that nobody else reads and that is the convolution's direct output stays as it is, one at most.
    """
    made_by, users = graphs.producers(model), graphs.consumers(model)

    def convolution(name: str) -> onnx.NodeProto | None:
        node = made_by.get(name)
        if node is not None and node.op_type in ("Clip", "Relu"):
            node = made_by.get(node.input[0])
        return node if node is not None and node.op_type == "Conv" and node.name in chosen else None

    found: list[tuple[onnx.NodeProto, int]] = []
    for add in model.graph.node:
        if add.op_type != "Add" or not all(name in made_by for name in add.input):
            continue
        branches = [convolution(name) for name in add.input]
        if not any(branches):
            continue
        direct = [
            i
            for i, (conv, name) in enumerate(zip(branches, add.input, strict=True))
            if conv is not None and conv.output[0] == name and len(users[name]) == 1
        ]
        found += [(add, i) for i in range(len(add.input)) if i not in direct[:1]]
    return found
