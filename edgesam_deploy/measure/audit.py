"""What each ONNX node was compiled to compute in, against what its typed graph means.

How a node's type is told:

- A weighted node (Conv, ConvTranspose, Gemm, MatMul) computes in the type of the operands of the layer that multiplies:
  its activation and its weight. Scales, biases and what the layer writes do not count: an INT8 convolution of TensorRT
  for RTX reads int8 and int8, holds float scales and writes float. Kernels before and after it name the node too
  (they pad, scale or add the bias); they are passed over.
- Any other node, and a product that was generated as part of a kernel, computes in the float types of the kernel, or in
  its integer type if it has no float. A kernel that reads half and writes float counts as both: "mixed".

What cannot be seen: types inside a kernel, the type in which products are summed, and TF32, which is listed as Float.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.layers import UNKNOWN, WEIGHTS, CompiledLayer, TensorInfo

PRECISIONS = ("int8", "fp16", "fp32")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MIXED = "mixed"

_FLOATS = ("fp32", "fp16", "bf16")
_MULTIPLIES = re.compile(r"conv|corr|gemm|matrix|matmul", re.IGNORECASE)
_FUSED_PRODUCT = re.compile(r"gemm|mha|__myl_\w*(?:Corr|Conv|Fc|Bmm)")
# What a kernel does, as its name spells it in short: these only move, re-lay or convert data.
_MOVES = {"Cast", "Copy", "Move", "Resh", "Tran"}
_MOVING_KINDS = {"cast", "copy", "reformat", "shuffle"}


@dataclass(frozen=True, slots=True)
class AuditRow:
    """wanted, compiled: "int8", "fp16", "fp32"; compiled may be any type, "mixed" or "unknown".

    reason: why it counts as compiled otherwise than meant, or None.
    """

    node: str
    op: str | None
    wanted: str
    compiled: str
    layer: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What ``audit`` found.

    nodes: how many by compiled type. missing: nodes that no layer names: folded away, or fused without being named.
    layers: how many by kind and type ("none": no tensors, such as signals between streams). overhead: names of the
    layers that only move, re-lay or convert data.
    """

    rows: tuple[AuditRow, ...]
    nodes: dict[str, int]
    mismatched: tuple[AuditRow, ...]
    missing: tuple[str, ...]
    layers: dict[str, dict[str, int]]
    overhead: tuple[str, ...]


def audit(
    layers: Sequence[CompiledLayer], wanted: Mapping[str, str], ops: Mapping[str, str] | None = None
) -> AuditResult:
    """Compare what each ONNX node computes in with what its typed graph means (``wanted``: node → precision).

    ``ops`` (node → operator) tells weighted nodes; without it a node is one if it is wanted in INT8. A weighted node
    must be compiled exactly as wanted. For any other node the wanted type must be among the kernel's, or the kernel
    have no float at all: a MaxPool or Concat between Q/DQ moves int8.

    Raises InputError for a precision that is none of ``PRECISIONS``.
    """
    wrong = sorted({p for p in wanted.values() if p not in PRECISIONS})
    if wrong:
        raise InputError(f"a wanted precision must be one of {', '.join(PRECISIONS)}, got '{wrong[0]}'")
    by_node: dict[str, list[CompiledLayer]] = {}
    for layer in layers:
        for node in layer.onnx_nodes:
            by_node.setdefault(node, []).append(layer)
    found = [_row(n, (ops or {}).get(n), p, by_node[n]) for n, p in wanted.items() if n in by_node]
    kinds: dict[str, Counter[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, Counter())[_layer_type(layer)] += 1
    return AuditResult(
        rows=tuple(found),
        nodes=dict(Counter(row.compiled for row in found)),
        mismatched=tuple(row for row in found if row.reason is not None),
        missing=tuple(n for n in wanted if n not in by_node),
        layers={kind: dict(count) for kind, count in sorted(kinds.items())},
        overhead=tuple(layer.name for layer in layers if _only_moves(layer)),
    )


def _row(node: str, op: str | None, wanted: str, layers: Sequence[CompiledLayer]) -> AuditRow:
    weighted = op in WEIGHTED if op is not None else wanted == "int8"
    best = min(map(_rank, layers)) if weighted else 2
    if best < 2:
        layers = [layer for layer in layers if _rank(layer) == best]
        types = {t for layer in layers for t in _operands(layer)}
        right = types == {wanted}
    else:
        types = {t for layer in layers for t in _kernel_types(layer)}
        right = wanted in types or not types & {*_FLOATS, UNKNOWN}
    seen = " and ".join(sorted(types))
    reason = None if right else f"meant {wanted}, layer {layers[0].name} ({layers[0].kind}) computes in {seen}"
    return AuditRow(node, op, wanted, _one(types), layers[0].name, reason)


def _rank(layer: CompiledLayer) -> int:
    """0: a convolution or matrix product; 1: a fusion that holds one; 2: anything else."""
    if _MULTIPLIES.search(layer.kind):
        return 0
    return 1 if "fusion" in layer.kind or _FUSED_PRODUCT.search(f"{layer.name} {layer.tactic}") else 2


def _layer_type(layer: CompiledLayer) -> str:
    if not layer.inputs and not layer.outputs:
        return "none"
    return _one(_operands(layer) if _rank(layer) < 2 else _kernel_types(layer))


def _operands(layer: CompiledLayer) -> set[str]:
    """Types of activation and weight, or of both activations of a product without a weight.

    A convolution's activation is its first input. In other layers it is the one of the weight's type, if any is: the
    skip input of a fused addition may come first.
    """
    weight = max(filter(_is_matrix, layer.constants), key=_elements, default=None)
    inputs = [t for t in layer.inputs if _is_matrix(t)] or list(layer.inputs)
    if weight is None:
        return {t.dtype for t in inputs[:2]} or {UNKNOWN}
    if _rank(layer) == 1 and any(t.dtype == weight.dtype for t in inputs):
        return {weight.dtype}
    return {weight.dtype, *(t.dtype for t in inputs[:1])}


def _kernel_types(layer: CompiledLayer) -> set[str]:
    """Float types of all that a kernel reads and writes; its integer type if it has none.

    Constants count only in kernels generated for this graph: elsewhere they are FP32 scales, alpha and beta, whatever
    the layer computes in.
    """
    constants = layer.constants if _rank(layer) == 2 and layer.name.startswith("__myl_") else ()
    tensors = (*layer.inputs, *constants, *layer.outputs)
    floats = {t.dtype for t in tensors if t.dtype in (*_FLOATS, UNKNOWN)}
    return floats or {t.dtype for t in layer.outputs} or {t.dtype for t in layer.inputs} or {UNKNOWN}


def _one(types: set[str]) -> str:
    return next(iter(types)) if len(types) == 1 else MIXED


def _is_matrix(tensor: TensorInfo) -> bool:
    """Not a scalar or vector, which scales, biases and alpha are."""
    return tensor.name == WEIGHTS or sum(size != 1 for size in tensor.shape) > 1


def _elements(tensor: TensorInfo) -> int:
    return math.prod(abs(size) for size in tensor.shape)


def _only_moves(layer: CompiledLayer) -> bool:
    steps = re.match(r"__myl_((?:[A-Z][a-z]+)+)_myl", layer.name)
    if steps:
        return set(re.findall(r"[A-Z][a-z]+", steps.group(1))) <= _MOVES
    return layer.kind.lower() in _MOVING_KINDS
