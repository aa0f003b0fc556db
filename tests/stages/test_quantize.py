"""Calibration, Q/DQ placement, and the CPU twin's promise: the same arithmetic in another encoding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from edgesam_deploy.bundle import load_bundle, open_graphs
from edgesam_deploy.contract import IMAGE, IMAGE_EMBEDDINGS
from edgesam_deploy.errors import GraphError
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.measure.accuracy import answer, compare
from edgesam_deploy.recipe import Int8Rules, load_recipe
from edgesam_deploy.runtime import SessionOptions, open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import load_ranges
from edgesam_deploy.stages.quantize import quantize
from edgesam_deploy.transforms import to_encoder_input

PHOTOS = Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos"


def test_absmax_is_the_graphs(built: SimpleNamespace, tiny_recipe: Path) -> None:
    """The recorded range of the embeddings is the largest value that running the graph gives."""
    recipe = load_recipe(tiny_recipe)
    ranges = load_ranges(built.stages / "calibrate" / "ranges.json")["encoder"]
    with open_session(built.stages / "simplify-encoder" / "encoder.onnx") as session:
        largest = max(
            np.abs(session.run(_feeds(path, recipe.geometry.image_size))[IMAGE_EMBEDDINGS]).max()
            for path in list_images(PHOTOS / "calibration")
        )
    assert ranges.images >= 32
    assert ranges.absmax[IMAGE_EMBEDDINGS] == pytest.approx(largest, rel=1e-5)


def test_placement_is_tensorrts(built: SimpleNamespace) -> None:
    """Every convolution reads int8 activations (symmetric, scalar) and int8 weights per channel; biases stay float."""
    model = graphs.load(built.stages / "quantize-encoder" / "encoder.onnx")
    values, made_by = graphs.constants(model), graphs.producers(model)
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 49
    for conv in convolutions:
        activation, weight = made_by[conv.input[0]], made_by[conv.input[1]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert values[weight.input[0]].dtype == np.int8
        assert values[weight.input[1]].shape == (values[weight.input[0]].shape[0],)
        assert not np.any(values[weight.input[2]])
        assert values[activation.input[1]].shape == ()
        assert values[activation.input[2]] == np.int8(0)
        assert values[conv.input[2]].dtype == np.float32
    assert graphs.foreign_nodes(model) == []


def test_concat_shares_one_scale(built: SimpleNamespace) -> None:
    model = graphs.load(built.stages / "quantize-encoder" / "encoder.onnx")
    values, made_by, users = graphs.constants(model), graphs.producers(model), graphs.consumers(model)
    concats = [n for n in model.graph.node if n.op_type == "Concat"]
    assert concats
    for concat in concats:
        after = next(n for n in users[concat.output[0]] if n.op_type == "QuantizeLinear")
        scales = {float(values[made_by[name].input[1]]) for name in concat.input} | {float(values[after.input[1]])}
        assert len(scales) == 1


def test_rounding_to_int8_is_numpys(built: SimpleNamespace) -> None:
    """Weights dequantize to within half a step of the float weights."""
    before = graphs.constants(graphs.load(built.stages / "simplify-encoder" / "encoder.onnx"))
    model = graphs.load(built.stages / "quantize-encoder" / "encoder.onnx")
    values = graphs.constants(model)
    originals = {
        n.name: before[n.input[1]]
        for n in graphs.load(built.stages / "simplify-encoder" / "encoder.onnx").graph.node
        if n.op_type == "Conv"
    }
    for name, weight in originals.items():
        scale = values[f"{name}:weight_scale"][:, None, None, None]
        error = np.abs(values[f"{name}:weight_int8"] * scale - weight)
        assert (error <= scale * 0.5 + 1e-7).all()


def test_cpu_twin_fuses_and_agrees(built: SimpleNamespace, tiny_recipe: Path) -> None:
    detail = next(r.detail for r in built.result.stages if r.name == "encode-encoder")
    assert detail["quantized"] == 49
    assert detail["fused"] == 48  # all but the one whose output is the embedding
    encoders = [built.stages / stage / "encoder.onnx" for stage in ("quantize-encoder", "encode-encoder")]
    size = load_recipe(tiny_recipe).geometry.image_size
    with open_session(encoders[0]) as tensorrt, open_session(encoders[1]) as cpu:
        for path in list_images(PHOTOS / "verify"):
            a, b = (s.run(_feeds(path, size))[IMAGE_EMBEDDINGS].ravel() for s in (tensorrt, cpu))
            assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) >= 0.9995


def test_masks_of_the_two_encodings_agree(built: SimpleNamespace) -> None:
    bundle = load_bundle(built.bundle)
    graphs_of = {
        stage: {"encoder": built.stages / stage / "encoder.onnx", "decoder": bundle.graph("decoder")}
        for stage in ("quantize-encoder", "encode-encoder")
    }
    paths = list_images(PHOTOS / "verify")
    with open_graphs(graphs_of["quantize-encoder"], bundle, SessionOptions(), "onnxruntime") as predictor:
        recorded = answer(predictor, paths)
    with open_graphs(graphs_of["encode-encoder"], bundle, SessionOptions(), "onnxruntime") as predictor:
        result = compare(predictor, recorded, PHOTOS / "verify", "onnxruntime")
    assert result.mask_iou.mean >= 0.98


def test_rules_keep_layers_in_float(built: SimpleNamespace, tmp_path: Path) -> None:
    source = built.stages / "simplify-encoder" / "encoder.onnx"
    ranges = load_ranges(built.stages / "calibrate" / "ranges.json")["encoder"]
    result = quantize(source, ranges, Int8Rules(keep=(r"^image_encoder\.fuse",), depthwise=False), tmp_path / "q.onnx")
    model = graphs.load(result.output)
    made_by = graphs.producers(model)
    float_convs = [n for n in model.graph.node if n.op_type == "Conv" and n.input[1] not in made_by]
    groups = [next((a.i for a in n.attribute if a.name == "group"), 1) for n in float_convs]
    assert sum(n.name.startswith("image_encoder.fuse") for n in float_convs) == 3
    assert all(g > 1 for n, g in zip(float_convs, groups, strict=True) if ".fuse" not in n.name)
    assert result.quantized == 49 - len(float_convs)


def test_foreign_ranges_are_refused(built: SimpleNamespace, tmp_path: Path) -> None:
    ranges = load_ranges(built.stages / "calibrate" / "ranges.json")["encoder"]
    with pytest.raises(GraphError, match="another graph"):
        quantize(built.stages / "export" / "encoder.onnx", ranges, Int8Rules(), tmp_path / "q.onnx")


def _feeds(path: Path, size: int) -> dict[str, np.ndarray]:
    return {IMAGE: to_encoder_input(read_image(path), size, (124, 116, 104))}
