"""Stage 3: give a simplified FP32 graph its precisions: INT8 on chosen nodes, one float type on the rest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgesam_deploy.errors import GraphError, InputError
from edgesam_deploy.recipe import Int8Rules, PrecisionRules
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.cpu_encoding import encode_for_cpu
from edgesam_deploy.stages.fp16 import convert_to_fp16, kept_nodes
from edgesam_deploy.stages.placement import eligible
from edgesam_deploy.stages.quantize import quantize
from edgesam_deploy.target import ENCODINGS, RESTS

# Q/DQ scales of FP16 exist from this opset on.
HALF_SCALES_OPSET = 19


@dataclass(frozen=True, slots=True)
class Typing:
    """encoding: how INT8 is written, of ``target.ENCODINGS``. rest: the float type beside it, of ``target.RESTS``."""

    encoding: str
    rest: str

    def __post_init__(self) -> None:
        for name, known in (("encoding", ENCODINGS), ("rest", RESTS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if (self.encoding, self.rest) == ("cpu", "fp16"):
            raise InputError("the CPU encoding has FP32 beside INT8: CPUs compute half precision in FP32")


@dataclass(frozen=True, slots=True)
class TypedResult:
    """int8: names of the nodes that compute in INT8, in graph order. reasons: why a node that multiplies is not INT8,
    and why a node is FP32 where the rest is FP16.
    """

    output: Path
    int8: tuple[str, ...]
    reasons: Mapping[str, str]


def type_graph(
    source: Path,
    ranges: Ranges,
    fp16: PrecisionRules,
    rules: Int8Rules,
    how: Typing,
    output: Path,
    int8: Collection[str] | None = None,
    repair: Callable[[Path, Path], object] | None = None,
) -> TypedResult:
    """Write the typed graph of an FP32 graph.

    repair: given the graph with its Q/DQ and FP32 beside them, writes a better one to its second argument.
    int8: names of the nodes that compute in INT8, among those that ``rules`` allow; None for all of these, empty for
    none. fp16: what the recipe keeps in FP32 where the rest is FP16, besides what can leave it by ``ranges``. Raises
    GraphError for ranges of another graph and names that the rules do not allow.
    """
    kept = kept_nodes(graphs.load(source), fp16, ranges.absmax) if how.rest == "fp16" else {}
    with tempfile.TemporaryDirectory() as folder:
        typed, reasons = source, eligible(graphs.load(source), rules)[1]
        names: tuple[str, ...] = ()
        if int8 is None or int8:
            # An INT8 node hands on a float: one that can leave FP16 would have to be cast, which no engine fuses.
            allowed = eligible(graphs.load(source), rules)[0] if int8 is None else int8
            result = quantize(source, ranges, rules, Path(folder) / "int8.onnx", [n for n in allowed if n not in kept])
            typed, names, reasons = result.output, result.int8, dict(result.reasons)
            if repair is not None:
                typed = Path(folder) / "repaired.onnx"
                repair(result.output, typed)
        if how.rest == "fp16":
            _check_opset(source)
            absmax = {**ranges.absmax, **{f"{name}:dq": value for name, value in ranges.absmax.items()}}
            reasons |= dict(convert_to_fp16(typed, fp16, output, absmax).kept)
        elif how.encoding == "cpu" and names:
            encode_for_cpu(typed, ranges, output)
        else:
            graphs.copy(typed, output)
    return TypedResult(output, names, reasons)


def _check_opset(source: Path) -> None:
    opset = next((o.version for o in graphs.load(source, weights=False).opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < HALF_SCALES_OPSET:
        raise GraphError(
            f"{source} has opset {opset}; INT8 beside FP16 needs scales in FP16, opset {HALF_SCALES_OPSET}: set "
            "export.opset in the recipe and export again"
        )
