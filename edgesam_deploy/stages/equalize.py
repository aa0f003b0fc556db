"""Cross-layer equalization: the same function in FP32, with channels of like size for INT8.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1: where a
convolution's output goes through nothing but a ReLU into one other convolution, a channel may be divided by s > 0 in
the first and multiplied in the second, since relu(x / s) = relu(x) / s. With s = sqrt(r1 / r2), r1 and r2 the ranges of
the channel's weights in either, both ranges become equal, and no channel alone decides the scale of the tensor between.
Here s is rounded to a power of two, so that FP32 results stay equal to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.stages import graph as graphs

# Chains of convolutions settle in a few rounds; each round halves what is left, in powers of two.
MAX_ROUNDS = 32


@dataclass(frozen=True, slots=True)
class EqualizeResult:
    """pairs: of convolutions that could be equalized. channels: scaled, counted once per pair. largest: factor used."""

    output: Path
    pairs: int
    channels: int
    largest: float
    max_error: float


@dataclass(frozen=True, slots=True)
class _Pair:
    """Names of the first weight, its bias (None if there is none) and the second weight; the latter's channel axis."""

    weight: str
    bias: str | None
    following: str
    axis: int


def equalize(source: Path, output: Path) -> EqualizeResult:
    """Equalize every pair of a simplified FP32 graph. Raises GraphError if the result computes anything else."""
    model = graphs.load(source)
    values = {name: np.array(value) for name, value in graphs.constants(model).items()}
    pairs = _pairs(model, values)
    factors = {pair: np.ones(values[pair.weight].shape[0], dtype=np.float32) for pair in pairs}
    for _ in range(MAX_ROUNDS):
        steps = {pair: _balance(pair, values) for pair in pairs}
        for pair, step in steps.items():
            factors[pair] *= step
        if all((step == 1).all() for step in steps.values()):
            break
    for tensor in model.graph.initializer:
        if tensor.name in {n for p in pairs for n in (p.weight, p.bias, p.following)}:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    feeds = graphs.example_feeds(model)
    graphs.save(model, output, {"stage": "equalize", "parent_sha256": sha256_file(source)})
    error = graphs.disagreement(source, output, feeds)
    if error > graphs.AGREEMENT:
        raise GraphError(f"equalizing {source} moved its outputs by {error:.2g}; set precision.int8.equalize = false")
    largest = max((float(np.maximum(f, 1 / f).max()) for f in factors.values()), default=1.0)
    return EqualizeResult(output, len(pairs), sum(int((f != 1).sum()) for f in factors.values()), largest, error)


def _balance(pair: _Pair, values: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """Scale one pair towards equal ranges, in place; the power of two that each channel was divided by."""
    first, second = values[pair.weight], values[pair.following]
    own = np.abs(first).reshape(first.shape[0], -1).max(axis=1)
    next_ = np.abs(np.moveaxis(second, pair.axis, 0)).reshape(first.shape[0], -1).max(axis=1)
    alive = (own > 0) & (next_ > 0)
    ratio = np.sqrt(np.divide(own, next_, out=np.ones_like(own), where=alive))
    step: npt.NDArray[np.float32] = np.exp2(np.rint(np.log2(ratio))).astype(np.float32)
    first /= step.reshape(-1, *[1] * (first.ndim - 1))
    if pair.bias is not None:
        values[pair.bias] /= step
    second *= step.reshape([-1 if i == pair.axis else 1 for i in range(second.ndim)])
    return step


def _pairs(model: onnx.ModelProto, values: dict[str, npt.NDArray[Any]]) -> list[_Pair]:
    """Convolutions with nothing but a ReLU between them, whose tensors and weights nobody else reads."""
    made_by, users = graphs.producers(model), graphs.consumers(model)
    outputs = {o.name for o in model.graph.output}

    def sole(name: str) -> bool:
        return len(users.get(name, ())) == 1 and name not in outputs

    found = []
    for second in (n for n in model.graph.node if n.op_type == "Conv"):
        name = second.input[0]
        node = made_by.get(name)
        if node is not None and node.op_type == "Relu" and sole(name):
            name = node.input[0]
            node = made_by.get(name)
        if node is None or node.op_type != "Conv" or not sole(name):
            continue
        weights = [*node.input[1:], second.input[1]]
        axis = _channel_axis(second, values[second.input[1]]) if all(w in values and sole(w) for w in weights) else None
        if axis is not None:
            found.append(_Pair(node.input[1], node.input[2] if len(node.input) > 2 else None, second.input[1], axis))
    return found


def _channel_axis(conv: onnx.NodeProto, weight: npt.NDArray[Any]) -> int | None:
    """The axis of input channels in a weight; None for grouped convolutions that are not depthwise."""
    groups = next((a.i for a in conv.attribute if a.name == "group"), 1)
    if groups == 1:
        return 1
    return 0 if groups == weight.shape[0] and weight.shape[1] == 1 else None
