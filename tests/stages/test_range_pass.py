"""FP16 that is right: what can leave half stays FP32, on a model made to overflow without changing in FP32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.bundle import ANSWERS, load_bundle, open_graphs
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.accuracy import compare, load_answers
from edgesam_deploy.recipe import PrecisionRules, load_recipe
from edgesam_deploy.runtime import SessionOptions
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.fp16 import FP16_MAX, MARGIN, convert_to_fp16, emulate_fp16
from edgesam_deploy.stages.range_pass import load_maxima, range_pass

from ..conftest import PHOTOS


def planted(source: Path, output: Path, seed: int, powers: int = 17) -> Path:
    """A graph that computes the same: channels of one convolution times 2⁰, 2¹, …, the next one's weights divided."""
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
        name = f"{node.input[index]}:planted"
        array = (values[node.input[index]] * factor.reshape(shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        node.input[index] = name
    graphs.drop_unused_constants(model)
    graphs.save(model, output, {})
    return output


def mask_iou_of(encoder: Path, decoder: Path, bundle_path: Path) -> float:
    bundle = load_bundle(bundle_path)
    files: Mapping[str, Path] = {"encoder": encoder, "decoder": decoder}
    with open_graphs(files, bundle, SessionOptions(), "onnxruntime") as predictor:
        return compare(predictor, load_answers(bundle_path / ANSWERS), bundle_path / "verify", "test").mask_iou.mean


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_outliers_break_plain_fp16_and_not_ours(
    built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path, seed: int
) -> None:
    plain_encoder = built.stages / "simplify-encoder" / "encoder.onnx"
    decoder = built.stages / "simplify-decoder" / "decoder.onnx"
    encoder = planted(plain_encoder, tmp_path / "planted.onnx", seed)
    feeds = graphs.example_feeds(graphs.load(encoder))
    assert graphs.disagreement(plain_encoder, encoder, feeds) <= 1e-4, "the same function in FP32"
    maxima = range_pass(
        {"encoder": encoder, "decoder": decoder},
        list_images(PHOTOS / "calibration")[:4],
        load_recipe(tiny_recipe),
        tmp_path / "maxima.json",
    )
    assert load_maxima(tmp_path / "maxima.json") == maxima
    scores = {}
    for name, absmax in (("plain", None), ("ours", maxima.absmax["encoder"])):
        half = convert_to_fp16(encoder, PrecisionRules(), tmp_path / f"{name}.onnx", absmax)
        emulated = emulate_fp16(half.output, tmp_path / f"{name}.emulated.onnx")
        scores[name] = mask_iou_of(emulated, decoder, built.bundle)
        assert bool(half.kept) == (name == "ours")
        if name == "ours":
            assert len(half.kept) <= 4, "only what overflows"
            assert all("reaches" in reason for reason in half.kept.values())
    assert scores["plain"] < 0.9
    assert scores["ours"] >= 0.99


def test_maxima_are_those_of_the_tensors(built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path) -> None:
    """Against one image run by hand through the same graph."""
    sources = {n: built.stages / f"simplify-{n}" / f"{n}.onnx" for n in ("encoder", "decoder")}
    images = list_images(PHOTOS / "calibration")[:1]
    maxima = range_pass(sources, images, load_recipe(tiny_recipe), tmp_path / "maxima.json")
    assert maxima.absmax["encoder"]["image"] <= 255
    with load_bundle(built.bundle).open() as predictor:
        from edgesam_deploy.images import read_image
        from edgesam_deploy.runtime import open_session

        feeds = predictor.preprocess(read_image(images[0]))
        with open_session(sources["encoder"]) as session:
            embedding = session.run(feeds)["image_embeddings"]
    assert maxima.absmax["encoder"]["image_embeddings"] == pytest.approx(float(np.abs(embedding).max()), rel=1e-6)
    assert maxima.absmax["decoder"]["image_embeddings"] == maxima.absmax["encoder"]["image_embeddings"]


def norm_graph(folder: Path) -> Path:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in ("x", "y")]
    node = helper.make_node("LayerNormalization", ["x", "scale"], ["y"], name="norm", axis=-1)
    weights = [numpy_helper.from_array(np.ones(64, dtype=np.float32), "scale")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    path = folder / "norm.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    return path


@pytest.mark.parametrize(("largest", "kept"), [(100.0, False), (1418.0, True), (FP16_MAX / MARGIN + 1, True)])
def test_a_norm_stays_fp32_where_its_squares_leave_fp16(tmp_path: Path, largest: float, kept: bool) -> None:
    """1418: the input of a SAM encoder's LayerNorm where FP16 was seen to fail; its square is 2 million."""
    result = convert_to_fp16(norm_graph(tmp_path), PrecisionRules(), tmp_path / "half.onnx", {"x": largest, "y": 3.0})
    assert list(result.kept) == (["norm"] if kept else [])
    if kept:
        assert result.kept["norm"].startswith("squares 'x' reaches")
