"""Stage 3 for FP16: a typed half-precision graph, and its FP32 emulation in which rounding and overflow are real.

ONNX Runtime's CPU provider has few half kernels: it wraps nodes in casts and removes the pairs between them, so whole
chains run in FP32 and an overflow never shows. The emulated graph does the arithmetic in FP32 but rounds every tensor
that is half on the device through FP16, so that it overflows to infinity where the device does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.files import sha256_file
from edgesam_deploy.recipe import PrecisionRules
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.placement import point_encoding

FP16_MAX = 65504.0
POINT_ENCODING = "point encoding: half coordinates step by half a pixel"
# Calibration sees some images, a device sees others.
MARGIN = 2.0
# They square their input on the way: x² leaves FP16 long before x does (LayerNorm in SAM encoders: |x| up to 1418).
_SQUARING = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceL2", "ReduceSumSquare", "Pow"}


@dataclass(frozen=True, slots=True)
class Fp16Result:
    """half: nodes that compute in FP16, of ``nodes``. kept: those held in FP32, with the reason."""

    output: Path
    half: int
    nodes: int
    kept: Mapping[str, str]


def convert_to_fp16(
    source: Path, rules: PrecisionRules, output: Path, absmax: Mapping[str, float] | None = None
) -> Fp16Result:
    """Convert an FP32 graph to FP16 with FP32 inputs and outputs.

    Point encoding (all that leads to Sin and Cos) stays FP32: half coordinates step by half a pixel between 512 and
    1024 before they pass through sine and cosine. So does what the recipe's ``precision.fp16.keep`` names, and every
    node whose inputs, outputs or squares on the way can leave FP16. absmax: largest |x| by tensor, as
    ``stages.calibrate`` recorded it; None looks at no ranges.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = graphs.load(source)
    kept = kept_nodes(model, rules, absmax or {})
    types = graphs.inferred(model).graph.value_info
    del model.graph.value_info[:]
    model.graph.value_info.extend(types)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights below half's smallest number: they round to 0, as on the device
        # Inferring shapes itself, it would hand the whole graph on as one message.
        half = convert_float_to_float16(
            model, keep_io_types=True, disable_shape_infer=True, node_block_list=sorted(kept), op_block_list=[]
        )
    _join_kept(half)
    graphs.sort_nodes(half)
    graphs.save(half, output, {"stage": "fp16", "parent_sha256": sha256_file(source)})
    types = _tensor_types(half)
    count = sum(any(types.get(o) == TensorProto.FLOAT16 for o in n.output) for n in half.graph.node)
    return Fp16Result(output, count, len(half.graph.node), kept)


def kept_nodes(model: onnx.ModelProto, rules: PrecisionRules, absmax: Mapping[str, float]) -> dict[str, str]:
    """Names of the nodes that must not be FP16, with the reason."""
    return _overflowing(model, absmax) | _named(model, rules) | dict.fromkeys(point_encoding(model), POINT_ENCODING)


def _join_kept(model: onnx.ModelProto) -> None:
    """Let a kept node read an FP32 tensor as it is; in place.

    The converter makes every tensor half and casts it back before a kept node: without this, coordinates would be
    rounded to FP16 ahead of each step of the point encoding.
    """
    made_by, types = graphs.producers(model), _tensor_types(model)
    types |= {i.name: i.type.tensor_type.elem_type for i in model.graph.input}

    def cast(name: str, to: int) -> onnx.NodeProto | None:
        node = made_by.get(name)
        return node if node is not None and node.op_type == "Cast" and node.attribute[0].i == to else None

    for node in model.graph.node:
        for index, name in enumerate(node.input):
            back = cast(name, TensorProto.FLOAT)
            there = cast(back.input[0], TensorProto.FLOAT16) if back is not None else None
            # A cast from another type, such as a comparison's bool, is the model's own.
            if there is not None and types.get(there.input[0]) == TensorProto.FLOAT:
                node.input[index] = there.input[0]
    outputs = {o.name for o in model.graph.output}
    while dead := [
        n
        for n in model.graph.node
        if n.op_type == "Cast" and not outputs & {*n.output} and not _read(model, n.output[0])
    ]:
        for node in dead:
            model.graph.node.remove(node)


def _read(model: onnx.ModelProto, name: str) -> bool:
    return any(name in node.input for node in model.graph.node)


def emulate_fp16(source: Path, output: Path) -> Path:
    """Write the FP32 emulation of a typed FP16 graph: every half tensor is rounded through FP16 and read back."""
    model = graphs.load(source)
    half = {name for name, kind in _tensor_types(model).items() if kind == TensorProto.FLOAT16}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            value = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "Cast" and node.output[0] in half:
            node.attribute[0].i = TensorProto.FLOAT
        for index, name in enumerate(node.output):
            if name in half:
                node.output[index] = f"{name}:exact"
                nodes.append(_cast(f"{name}:exact", f"{name}:half", TensorProto.FLOAT16))
                nodes.append(_cast(f"{name}:half", name, TensorProto.FLOAT))
    graphs.replace_nodes(model, nodes)
    graphs.save(model, output, {"stage": "emulate_fp16", "parent_sha256": sha256_file(source)})
    return output


def _cast(source: str, output: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [output], name=f"{output}:cast", to=to)


def _tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type by tensor name, for everything shape inference can tell."""
    inferred = graphs.inferred(model)
    return {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)}


def _overflowing(model: onnx.ModelProto, absmax: Mapping[str, float]) -> dict[str, str]:
    """Nodes that can leave FP16, with the tensor that shows it. Unseen images get a margin."""
    kept = {}
    for node in model.graph.node:
        squared = node.input[0] if node.op_type in _SQUARING else None
        worst = max((*node.input, *node.output), key=_of(absmax))
        limit = FP16_MAX / MARGIN
        if squared is not None and _of(absmax)(squared) > limit**0.5:
            what, worst, limit = f"squares '{squared}'", squared, limit**0.5
        elif _of(absmax)(worst) > limit:
            what = f"'{worst}'"
        else:
            continue
        kept[node.name] = f"{what} reaches {absmax[worst]:.4g}, FP16 with a margin of {MARGIN:g} ends at {limit:.4g}"
    return kept


def _of(absmax: Mapping[str, float]) -> Callable[[str], float]:
    return lambda name: absmax.get(name, 0.0)


def _named(model: onnx.ModelProto, rules: PrecisionRules) -> dict[str, str]:
    return {
        node.name: f"the recipe keeps '{pattern}'"
        for node in model.graph.node
        for pattern in rules.keep
        if re.search(pattern, node.name)
    }
