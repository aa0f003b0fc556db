"""Stage 2: fold what can be folded. onnxsim first; whatever it returns is accepted only if it proves itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import TEMPORARY_PREFIX, sha256_file
from edgesam_deploy.stages import external_data
from edgesam_deploy.stages import graph as graphs


@dataclass(frozen=True, slots=True)
class SimplifyResult:
    """tool: the simplifier that was accepted. rejected: those tried before it, each with the reason.

    max_error: output difference to the input graph, relative (graph.relative_error).
    """

    output: Path
    tool: str
    rejected: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    max_error: float


def simplify(source: Path, output: Path) -> SimplifyResult:
    """Simplify ``source`` into ``output``.

    A simplifier's answer is accepted if every operator is in the default ONNX domain (onnxsim plants
    com.microsoft::Attention in SAM decoders, which TensorRT refuses), it has no more nodes than before, and its
    outputs agree with the input graph; otherwise the next one is tried. Raises GraphError when none passes.
    """
    before = graphs.load(source, weights=False)
    nodes_before = len(before.graph.node)
    rejected: list[str] = []
    trial = output.parent / f"{TEMPORARY_PREFIX}{output.name}" / output.name
    try:
        for tool, run in _TOOLS.items():
            model = graphs.load(source)
            try:
                candidate = _candidate(model, run)
            except Exception as error:  # three third-party tools, each with its own exceptions
                rejected.append(f"{tool}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}")
                continue
            finally:
                del model
            nodes_after = len(candidate.graph.node)
            if fault := _fault(candidate, nodes_before):
                rejected.append(f"{tool}: {fault}")
                continue
            graphs.save(candidate, trial, {"stage": "simplify", "tool": tool, "parent_sha256": sha256_file(source)})
            del candidate  # or large weights would be in memory twice, here and in a session
            moved = graphs.disagreement(source, trial, graphs.example_feeds(before))
            if moved > graphs.AGREEMENT:
                rejected.append(f"{tool}: outputs moved by {moved:.2g}")
                continue
            graphs.move(trial, output)
            return SimplifyResult(output, tool, tuple(rejected), nodes_before, nodes_after, moved)
    finally:
        shutil.rmtree(trial.parent, ignore_errors=True)
    raise GraphError(f"no simplifier gave an acceptable graph for {source}: {'; '.join(rejected)}")


def fold_affine_after_relu(model: onnx.ModelProto) -> int:
    """Rewrite Conv -> Relu -> Mul(s) -> Add(b), s > 0 and b scalar, as Conv' -> Clip(min=b); how many were.

    HGNetV2's learnable affine block. s * relu(y) + b = max(s*y + b, b) holds exactly, s and b go into the
    convolution, and what is left between two convolutions is an operator that integer kernels can absorb.
    """
    values, users, made_by = graphs.constants(model), graphs.consumers(model), graphs.producers(model)
    outputs = {o.name for o in model.graph.output}
    folded = 0
    for add in [n for n in model.graph.node if n.op_type == "Add"]:
        chain = _affine_chain(add, values, users, made_by, outputs)
        if chain is None:
            continue
        conv, relu, mul, scale, shift = chain
        _scale_conv(model, conv, values, scale, shift)
        low = f"{add.output[0]}_min"
        model.graph.initializer.append(numpy_helper.from_array(np.array(shift, dtype=np.float32), low))
        clip = helper.make_node("Clip", [conv.output[0], low], [add.output[0]], name=f"{relu.name}_affine")
        model.graph.node.insert(list(model.graph.node).index(add), clip)
        for node in (add, mul, relu):
            model.graph.node.remove(node)
        folded += 1
    graphs.drop_unused_constants(model)
    return folded


def _affine_chain(
    add: onnx.NodeProto, values: dict[str, Any], users: dict[str, Any], made_by: dict[str, Any], outputs: set[str]
) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto, float, float] | None:
    """The Conv, Relu, Mul before ``add`` with their scalars, if they form the pattern and nobody else reads between."""
    shift, tensor = _scalar_operand(add, values)
    mul = made_by.get(tensor)
    if shift is None or mul is None or mul.op_type != "Mul":
        return None
    scale, tensor = _scalar_operand(mul, values)
    relu = made_by.get(tensor)
    if scale is None or scale <= 0 or relu is None or relu.op_type != "Relu":
        return None
    conv = made_by.get(relu.input[0])
    if conv is None or conv.op_type != "Conv" or len(conv.input) < 3 or not {*conv.input[1:]} <= set(values):
        return None
    between = [conv.output[0], relu.output[0], mul.output[0]]
    if any(len(users[name]) != 1 or name in outputs for name in between):
        return None
    return conv, relu, mul, scale, shift


def halve_gelu_last(model: onnx.ModelProto) -> int:
    """Rewrite x * (0.5 * (1 + erf)) as (x * (1 + erf)) * 0.5; in place; how many were.

    The same numbers, since halving is exact; in this order ONNX Runtime makes one kernel of it.
    """
    values, users, made_by = graphs.constants(model), graphs.consumers(model), graphs.producers(model)
    outputs = {o.name for o in model.graph.output}
    found = 0
    for halving in [n for n in model.graph.node if n.op_type == "Mul"]:
        half, tensor = _scalar_operand(halving, values)
        add, readers = made_by.get(tensor), users.get(halving.output[0], [])
        if half != 0.5 or add is None or add.op_type != "Add" or not any(_is_erf(made_by.get(i)) for i in add.input):
            continue
        if len(readers) != 1 or readers[0].op_type != "Mul" or halving.output[0] in outputs:
            continue
        constant = next(i for i, name in enumerate(halving.input) if name in values)
        x = next((i for i, name in enumerate(readers[0].input) if name != halving.output[0]), None)
        if x is None:
            continue
        halving.input[constant], readers[0].input[x] = readers[0].input[x], halving.input[constant]
        found += 1
    return found


def _is_erf(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "Erf"


def _scalar_operand(node: onnx.NodeProto, values: dict[str, Any]) -> tuple[float | None, str]:
    """(the constant scalar operand or None, the name of the other operand)."""
    for constant, other in (node.input, reversed(node.input)):
        if constant in values and values[constant].size == 1:
            return float(values[constant].reshape(())), other
    return None, ""


def _scale_conv(
    model: onnx.ModelProto, conv: onnx.NodeProto, values: dict[str, Any], scale: float, shift: float
) -> None:
    weight, bias = values[conv.input[1]], values[conv.input[2]]
    for index, array in ((1, weight * scale), (2, bias * scale + shift)):
        name = f"{conv.input[index]}_affine"
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        conv.input[index] = name


def _candidate(model: onnx.ModelProto, run: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """What a tool makes of a graph, and our own rewriting of that."""
    hidden: list[onnx.TensorProto] = []
    if external_data.is_large(model):
        # The tools hand a graph on as one message, too small for such weights; the exporter has folded those.
        model, hidden = external_data.hide_weights(model)
    candidate = run(model)
    external_data.reveal_weights(candidate, hidden)
    fold_affine_after_relu(candidate)
    halve_gelu_last(candidate)
    return candidate


def _fault(candidate: onnx.ModelProto, nodes_before: int) -> str:
    """What is wrong with a simplified graph as it stands, or an empty string."""
    if foreign := graphs.foreign_nodes(candidate):
        return f"planted {', '.join(foreign)}"
    if len(candidate.graph.node) > nodes_before:
        return f"grew the graph from {nodes_before} to {len(candidate.graph.node)} nodes"
    return ""


def _onnxsim(model: onnx.ModelProto, optimize: bool) -> onnx.ModelProto:
    import onnxsim

    simplified: onnx.ModelProto = onnxsim.simplify(model, perform_optimization=optimize)[0]
    return simplified


def _onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    slim: onnx.ModelProto = onnxslim.slim(model)
    return slim


_TOOLS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "onnxsim": lambda model: _onnxsim(model, optimize=True),
    "onnxsim without optimizer passes": lambda model: _onnxsim(model, optimize=False),
    "onnxslim": _onnxslim,
}
