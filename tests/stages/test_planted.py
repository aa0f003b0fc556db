"""Outliers that leave FP32 as it is: plain FP16 and plain INT8 fail on them, what `build` does passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.images import list_images
from edgesam_deploy.recipe import Int8Rules, PrecisionRules, load_recipe
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges, calibrate
from edgesam_deploy.stages.equalize import equalize
from edgesam_deploy.stages.fp16 import FP16_MAX, MARGIN, convert_to_fp16, emulate_fp16
from edgesam_deploy.stages.typed import Typing, type_graph

from ..conftest import PHOTOS
from .planting import mask_iou_of, plant_channels, plant_norm, write_norms_out

SEEDS = (0, 1, 2)
# Lifts the input of the norm from about 12 to 12000: that fits FP16, its square does not.
FACTOR = 2.0**10
IMAGES = list_images(PHOTOS / "calibration")[:4]


def simplified(built: SimpleNamespace, name: str) -> Path:
    return Path(built.stages / f"simplify-{name}" / f"{name}.onnx")


@pytest.fixture(scope="module", params=SEEDS)
def planted(
    request: pytest.FixtureRequest, built: SimpleNamespace, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """The tiny model with both kinds of outliers, and its ranges.

    Its norms are written out, so that their squares are tensors, which the emulation of FP16 rounds as a device does.
    """
    folder = tmp_path_factory.mktemp("planted")
    encoder = plant_channels(simplified(built, "encoder"), folder / "encoder.onnx", request.param, powers=11)
    fused, norm_input = plant_norm(simplified(built, "decoder"), folder / "fused.onnx", FACTOR)
    decoder = write_norms_out(fused, folder / "decoder.onnx")
    sources = {"encoder": encoder, "decoder": decoder}
    ranges = calibrate(sources, IMAGES, load_recipe(tiny_recipe), Int8Rules(), folder / "ranges.json")
    return SimpleNamespace(sources=sources, fused=fused, ranges=ranges, norm_input=norm_input)


def half(source: Path, ranges: Ranges, folder: Path, int8: tuple[str, ...] | None = ()) -> tuple[Path, list[str]]:
    """(the emulation of a graph in FP16, with INT8 in it if asked; the nodes that are FP32 because of their range)."""
    how = Typing("tensorrt", "fp16")
    typed = type_graph(source, ranges, PrecisionRules(), Int8Rules(), how, folder / f"half-{source.name}", int8)
    kept = [name for name, reason in typed.reasons.items() if "reaches" in reason]
    return emulate_fp16(typed.output, folder / f"emulated-{source.name}"), kept


def blind(ranges: Ranges) -> Ranges:
    """Without what decides where FP16 would overflow."""
    return replace(ranges, absmax={})


def test_the_function_is_the_same_in_fp32(planted: SimpleNamespace, built: SimpleNamespace) -> None:
    for name, graph in planted.sources.items():
        plain = simplified(built, name)
        assert graphs.disagreement(plain, graph, graphs.example_feeds(graphs.load(plain))) <= 1e-4
    largest = planted.ranges["decoder"].absmax[planted.norm_input]
    assert 1000 < largest < FP16_MAX / MARGIN, "the norm's input itself fits FP16"


def test_plain_fp16_fails_and_ours_passes(planted: SimpleNamespace, built: SimpleNamespace, tmp_path: Path) -> None:
    scores = {}
    for name, look in (("plain", blind), ("ours", lambda ranges: ranges)):
        graph = {n: half(source, look(planted.ranges[n]), tmp_path) for n, source in planted.sources.items()}
        scores[name] = mask_iou_of(graph["encoder"][0], graph["decoder"][0], built.bundle)
        assert any("output_upscaling.1" in node for node in graph["decoder"][1]) == (name == "ours")
    assert scores["plain"] < 0.9
    assert scores["ours"] >= 0.99


def test_plain_int8_fails_and_ours_passes(
    planted: SimpleNamespace, built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Beside FP32, as on CPUs, and beside FP16, as on devices."""
    source, decoder, how = planted.sources["encoder"], planted.sources["decoder"], Typing("tensorrt", "fp32")
    plain = type_graph(
        source, planted.ranges["encoder"], PrecisionRules(), Int8Rules(), how, tmp_path / "plain.onnx"
    ).output
    assert mask_iou_of(plain, decoder, built.bundle) < 0.8
    equalized = equalize(source, tmp_path / "equalized.onnx")
    assert equalized.largest >= 2.0**4
    rules = Int8Rules(equalize=True)
    sources = {"encoder": equalized.output}
    ranges = calibrate(sources, IMAGES, load_recipe(tiny_recipe), rules, tmp_path / "ranges.json")["encoder"]
    ours = type_graph(equalized.output, ranges, PrecisionRules(), rules, how, tmp_path / "ours.onnx").output
    assert mask_iou_of(ours, decoder, built.bundle) >= 0.95
    on_device, _ = half(equalized.output, ranges, tmp_path, int8=None)
    half_decoder, _ = half(decoder, planted.ranges["decoder"], tmp_path)
    assert mask_iou_of(on_device, half_decoder, built.bundle) >= 0.95


def test_a_fused_norm_is_kept_too(built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path) -> None:
    """What goes on inside one LayerNormalization the emulation cannot show; the rule does not need to see it."""
    encoder = simplified(built, "encoder")
    decoder, norm_input = plant_norm(simplified(built, "decoder"), tmp_path / "decoder.onnx", FACTOR)
    sources = {"encoder": encoder, "decoder": decoder}
    ranges = calibrate(sources, IMAGES, load_recipe(tiny_recipe), Int8Rules(), tmp_path / "ranges.json")
    half_decoder, kept = half(decoder, ranges["decoder"], tmp_path)
    made_by = graphs.consumers(graphs.load(decoder))
    assert made_by[norm_input][0].name in kept
    assert mask_iou_of(encoder, half_decoder, built.bundle) >= 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_channels_that_leave_fp16_stay_fp32(
    built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path, seed: int
) -> None:
    """2⁰ to 2¹⁶: the channels themselves overflow, and few nodes are the cure."""
    decoder = simplified(built, "decoder")
    encoder = plant_channels(simplified(built, "encoder"), tmp_path / "planted.onnx", seed, powers=17)
    ranges = calibrate({"encoder": encoder}, IMAGES, load_recipe(tiny_recipe), Int8Rules(), tmp_path / "ranges.json")
    plain, none = half(encoder, blind(ranges["encoder"]), tmp_path)
    assert none == []
    assert mask_iou_of(plain, decoder, built.bundle) < 0.8
    ours, kept = half(encoder, ranges["encoder"], tmp_path)
    assert 1 <= len(kept) <= 4, "only what overflows"
    assert mask_iou_of(ours, decoder, built.bundle) >= 0.99


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
