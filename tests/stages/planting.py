"""Outliers planted into graphs without changing what they compute in FP32, and what masks are worth afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgesam_deploy.bundle import ANSWERS, load_bundle, open_graphs
from edgesam_deploy.measure.accuracy import Answers, compare, load_answers
from edgesam_deploy.runtime import SessionOptions
from edgesam_deploy.stages import graph as graphs

# The channels-first norm of SAM's mask decoder, and what writes its input.
UPSCALING = "mask_decoder.output_upscaling"


def plant_channels(source: Path, output: Path, seed: int, powers: int) -> Path:
    """Channels of one convolution times 2⁰, 2¹, … 2^(powers - 1), in random order, the next one's weights divided."""
    model = graphs.load(source)
    values, users, made_by = graphs.constants(model), graphs.consumers(model), graphs.producers(model)
    for second in reversed(model.graph.node):
        relu = made_by.get(second.input[0])
        first = made_by.get(relu.input[0]) if relu is not None and relu.op_type == "Relu" else None
        if (
            second.op_type == "Conv"
            and first is not None
            and first.op_type == "Conv"
            and len(users[relu.output[0]]) == 1
        ):
            break
    else:
        raise AssertionError("the model has no Conv -> Relu -> Conv")
    channels = values[first.input[1]].shape[0]
    scale = np.exp2(np.random.default_rng(seed).permutation(np.arange(channels) % powers)).astype(np.float32)
    for node, index, shape in ((first, 1, (-1, 1, 1, 1)), (first, 2, (-1,)), (second, 1, (1, -1, 1, 1))):
        factor = 1 / scale if node is second else scale
        _replace(model, node, index, values[node.input[index]] * factor.reshape(shape))
    graphs.drop_unused_constants(model)
    graphs.save(model, output, {})
    return output


def plant_norm(source: Path, output: Path, factor: float) -> tuple[Path, str]:
    """(graph, name of the norm's input): the input of the upscaling's LayerNorm times ``factor``, a power of two.

    A norm undoes the scale of its input: LN(c x; c² epsilon) = LN(x; epsilon).
    """
    model = graphs.load(source)
    values, made_by = graphs.constants(model), graphs.producers(model)
    norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization" and n.name.startswith(UPSCALING))
    convolution = made_by[made_by[norm.input[0]].input[0]]
    assert convolution.op_type == "ConvTranspose"
    for index in (1, 2):
        _replace(model, convolution, index, values[convolution.input[index]] * factor)
    epsilon = next(a for a in norm.attribute if a.name == "epsilon")
    epsilon.f *= factor**2
    graphs.drop_unused_constants(model)
    graphs.save(model, output, {})
    return output, norm.input[0]


def write_norms_out(source: Path, output: Path) -> Path:
    """Every LayerNormalization over the last axis as mean, difference, square, mean, root and quotient.

    So exporters write it below opset 17, and SAM's channels-first LayerNorm2d at any: in FP16 the square overflows.
    """
    model = graphs.load(source)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _written_out(model, node) if node.op_type == "LayerNormalization" else [node]
    graphs.replace_nodes(model, nodes)
    graphs.save(model, output, {})
    return output


def _written_out(model: onnx.ModelProto, norm: onnx.NodeProto) -> list[onnx.NodeProto]:
    attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
    assert attributes["axis"] == -1
    x, weight, bias = norm.input
    name = norm.name

    def constant(suffix: str, value: Any) -> str:
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}:{suffix}"))
        return f"{name}:{suffix}"

    axes = constant("axes", np.array([-1], dtype=np.int64))
    two = constant("two", np.array(2.0, dtype=np.float32))
    epsilon = constant("epsilon", np.array(attributes["epsilon"], dtype=np.float32))
    steps = (
        ("ReduceMean", [x, axes], "mean"),
        ("Sub", [x, f"{name}:mean"], "difference"),
        ("Pow", [f"{name}:difference", two], "square"),
        ("ReduceMean", [f"{name}:square", axes], "variance"),
        ("Add", [f"{name}:variance", epsilon], "shifted"),
        ("Sqrt", [f"{name}:shifted"], "deviation"),
        ("Div", [f"{name}:difference", f"{name}:deviation"], "quotient"),
        ("Mul", [f"{name}:quotient", weight], "scaled"),
    )
    nodes = [helper.make_node(op, inputs, [f"{name}:{out}"], name=f"{name}:{out}_node") for op, inputs, out in steps]
    return [*nodes, helper.make_node("Add", [f"{name}:scaled", bias], [norm.output[0]], name=name)]


def _replace(model: onnx.ModelProto, node: onnx.NodeProto, index: int, value: Any) -> None:
    """Give one constant input of a node another value; other readers keep the old one."""
    name = f"{node.input[index]}:planted"
    model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    node.input[index] = name


def mask_iou_of(encoder: Path, decoder: Path, bundle_path: Path, images: int = 3) -> float:
    """Mean mask IoU of two graphs against the PyTorch model's first answers in a bundle."""
    bundle, whole = load_bundle(bundle_path), load_answers(bundle_path / ANSWERS)
    answers = Answers(**{name: getattr(whole, name)[:images] for name in Answers.__slots__})
    files = {"encoder": encoder, "decoder": decoder}
    with open_graphs(files, bundle, SessionOptions(), "onnxruntime") as predictor:
        return compare(predictor, answers, bundle_path / "verify", "test").mask_iou.mean
