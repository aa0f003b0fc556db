"""Calibration: histograms and calibrators against numpy and ONNX Runtime, ranges against the graph run by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.bundle import load_bundle
from edgesam_deploy.contract import IMAGE_EMBEDDINGS, MASK_INPUT
from edgesam_deploy.errors import GraphError, InputError
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.recipe import CALIBRATORS, Int8Rules, load_recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import calibrate as module
from edgesam_deploy.stages.calibrate import calibrate, calibration_images, load_ranges
from edgesam_deploy.stages.histogram import BINS, Histogram

from ..conftest import PHOTOS

DRAWS = {
    "normal": lambda rng: rng.normal(size=1_000_000),
    "laplace": lambda rng: rng.laplace(size=1_000_000),
    "outliers": lambda rng: np.concatenate([rng.normal(size=1_000_000), np.full(3, 50.0)]),
    "student": lambda rng: rng.standard_t(3, size=1_000_000),
}


def sources(built: SimpleNamespace) -> dict[str, Path]:
    return {name: built.stages / f"simplify-{name}" / f"{name}.onnx" for name in ("encoder", "decoder")}


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
def test_histogram_percentile_is_numpys(percent: float) -> None:
    """Fed in pieces of growing size of range, against numpy on everything at once; one bin of tolerance."""
    rng = np.random.default_rng(0)
    pieces = [rng.normal(scale=s, size=20_000).astype(np.float32) for s in (0.1, 1.0, 5.0, 0.5)]
    histogram = Histogram()
    for piece in pieces:
        histogram.add(piece)
    values = np.abs(np.concatenate(pieces))
    assert histogram.counts.sum() == values.size
    assert histogram.absmax == values.max()
    assert histogram.percentile(percent) == pytest.approx(
        np.percentile(values, percent), abs=2 * histogram.limit / BINS
    )


def test_histogram_refuses_infinity() -> None:
    with pytest.raises(GraphError, match="not finite"):
        Histogram().add(np.array([1.0, np.inf], dtype=np.float32))


@pytest.mark.parametrize("draw", DRAWS)
def test_entropy_agrees_with_onnxruntimes(draw: str) -> None:
    """Both follow Migacz's description and differ in the treatment of the tail: the same threshold to a third."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = DRAWS[draw](np.random.default_rng(0)).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    largest = float(np.abs(values).max())
    counts, edges = np.histogram(values, 4095, range=(-largest, largest))
    collector = HistogramCollector("entropy", True, 4095, 128, 99.99, "same")
    theirs = collector.get_entropy_threshold((counts, edges, values.min(), values.max(), largest), 128)[1]
    assert histogram.entropy() == pytest.approx(float(theirs), rel=0.33)
    assert histogram.entropy() <= largest


def test_entropy_of_few_values_is_their_maximum() -> None:
    histogram = Histogram()
    assert histogram.entropy() == 0.0
    histogram.add(np.full(10, 3.0, dtype=np.float32))
    assert histogram.entropy() == 3.0


def test_calibrators_are_ordered_as_they_should_be(built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path) -> None:
    """minmax takes everything, the others no more than that; all see the same images."""
    recipe, images = load_recipe(tiny_recipe), list_images(PHOTOS / "calibration")[:2]
    amax = {}
    for name in CALIBRATORS:
        ranges = calibrate(sources(built), images, recipe, Int8Rules(calibrator=name), tmp_path / f"{name}.json")
        assert load_ranges(tmp_path / f"{name}.json") == ranges
        amax[name] = ranges["encoder"].amax
        assert ranges["encoder"].calibrator == name
    assert all(amax["minmax"][t] == ranges["encoder"].absmax[t] for t in amax["minmax"])
    for name in ("entropy", "percentile"):
        assert all(0 < amax[name][t] <= largest for t, largest in amax["minmax"].items())
        assert any(amax[name][t] < largest for t, largest in amax["minmax"].items())


def test_memory_is_bounded_by_passes(
    built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching a few tensors at a time finds the same ranges as fetching all at once."""
    recipe, images = load_recipe(tiny_recipe), list_images(PHOTOS / "calibration")[:1]
    whole = calibrate(sources(built), images, recipe, Int8Rules(), tmp_path / "whole.json")
    monkeypatch.setattr(module, "_PASS_BYTES", 1 << 18)
    assert len(module._passes({"a": 1 << 18, "b": 1, "c": 1})) == 2
    parts = calibrate(sources(built), images, recipe, Int8Rules(), tmp_path / "parts.json")
    for name in whole:
        assert parts[name].absmax == pytest.approx(whole[name].absmax, rel=1e-5)
        assert parts[name].amax == pytest.approx(whole[name].amax, rel=1e-2)


def test_maxima_are_those_of_the_tensors(built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path) -> None:
    """Against one image run by hand through the same graph."""
    images = list_images(PHOTOS / "calibration")[:1]
    ranges = calibrate(sources(built), images, load_recipe(tiny_recipe), Int8Rules(), tmp_path / "ranges.json")
    assert 0 < ranges["encoder"].absmax["image"] <= 255
    with (
        load_bundle(built.bundle).open(backend="onnxruntime") as predictor,
        open_session(sources(built)["encoder"]) as session,
    ):
        embedding = session.run(predictor.preprocess(read_image(images[0])))[IMAGE_EMBEDDINGS]
    largest = float(np.abs(embedding).max())
    assert ranges["encoder"].absmax[IMAGE_EMBEDDINGS] == pytest.approx(largest, rel=1e-6)
    assert ranges["decoder"].absmax[IMAGE_EMBEDDINGS] == ranges["encoder"].absmax[IMAGE_EMBEDDINGS]


def test_every_float_tensor_has_a_maximum(built: SimpleNamespace, tiny_recipe: Path, tmp_path: Path) -> None:
    """Also those that never become INT8: FP16 needs them. Mask prompts are asked too."""
    images = list_images(PHOTOS / "calibration")[:1]
    ranges = calibrate(sources(built), images, load_recipe(tiny_recipe), Int8Rules(), tmp_path / "ranges.json")
    for name, source in sources(built).items():
        model = onnx.shape_inference.infer_shapes(onnx.load(source))
        floats = {v.name for v in model.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
        assert floats <= set(ranges[name].absmax)
        assert set(ranges[name].amax) < set(ranges[name].absmax)
    assert ranges["decoder"].absmax[MASK_INPUT] > 1


def test_wrong_files_and_too_few_images_are_refused(tiny_recipe: Path, built: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 32 images"):
        calibration_images(PHOTOS / "verify")
    with pytest.raises(GraphError, match="not an image encoder"):
        calibrate({"encoder": sources(built)["decoder"]}, [], load_recipe(tiny_recipe), Int8Rules(), tmp_path / "r")
    (tmp_path / "ranges.json").write_text('{"encoder": {"images": 3}}')
    with pytest.raises(GraphError, match="not a file of calibration ranges"):
        load_ranges(tmp_path / "ranges.json")
