"""The rule by which masks are compared: hand-made answers with a known result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgesam_deploy.bundle import load_bundle
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.accuracy import answer, compare, load_answers, save_answers, size_class, summarize
from edgesam_deploy.measure.latency import measure_latency, timing
from edgesam_deploy.stages.verify import verify

PHOTOS = Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos" / "verify"


@pytest.mark.parametrize(
    ("area", "name"),
    [(0, "small"), (1023, "small"), (1024, "medium"), (9215, "medium"), (9216, "large"), (1e6, "large")],
)
def test_size_classes_are_cocos(area: float, name: str) -> None:
    assert size_class(area) == name


@pytest.mark.parametrize("area", [float("nan"), float("inf"), float("-inf")])
def test_an_area_that_is_not_finite_has_no_size_class(area: float) -> None:
    with pytest.raises(ValueError, match="expected an area of finitely many pixels, got"):
        size_class(area)


def test_summary_is_numpys() -> None:
    values = np.array([0.2, 1.0, 0.8, 0.6])
    summary = summarize(values)
    assert summary.mean == pytest.approx(0.65)
    assert summary.median == pytest.approx(0.7)
    assert summary.min == pytest.approx(0.2)
    assert summary.p5 == pytest.approx(0.26)
    assert summary.count == 4


def test_a_predictor_agrees_with_itself_and_with_nothing_else(built: SimpleNamespace, tmp_path: Path) -> None:
    """Its own answers: IoU 1. The same answers with every mask inverted: IoU 0."""
    paths = list_images(PHOTOS)[:3]
    with load_bundle(built.bundle).open(threads=1) as predictor:
        recorded = answer(predictor, paths)
        save_answers(recorded, tmp_path / "answers.npz")
        same = compare(predictor, load_answers(tmp_path / "answers.npz"), PHOTOS, "self")
        inverted = dataclasses.replace(recorded, low_res=-recorded.low_res)
        opposite = compare(predictor, inverted, PHOTOS, "self")
    # Not exactly 1: recorded logits are float16.
    assert same.mask_iou.mean >= 0.999
    assert same.embedding_cosine_min >= 0.99999
    assert same.mask_iou.count == recorded.index.size == sum(s.count for s in same.by_size.values())
    assert opposite.mask_iou.mean <= 0.01


def test_the_mask_index_is_the_references(built: SimpleNamespace) -> None:
    """Clicks are compared on one of the candidates 1-3, boxes on mask 0, whatever the measured model prefers."""
    paths = list_images(PHOTOS)[:2]
    with load_bundle(built.bundle).open(threads=1) as predictor:
        recorded = answer(predictor, paths)
        clicks = recorded.points.shape[1]
        assert (recorded.index[:, :clicks] >= 1).all()
        assert (recorded.index[:, clicks:] == 0).all()
        best = 1 + recorded.iou_predictions[:, :clicks, 1:].argmax(axis=2)
        np.testing.assert_array_equal(recorded.index[:, :clicks], best)
        other = dataclasses.replace(recorded, index=np.where(recorded.index > 0, recorded.index % 3 + 1, 0))
        moved = compare(predictor, other, PHOTOS, "self")
    assert moved.by_prompt["box"].mean >= 0.999
    assert moved.by_prompt["point"].mean < 0.999


def test_a_damaged_encoder_is_noticed(built: SimpleNamespace) -> None:
    """verify measures: an embedding with a bias falls below what the intact bundle reaches."""
    bundle = load_bundle(built.bundle)
    intact = verify(bundle, threads=1)
    answers = load_answers(bundle.path / "verify" / "answers.npz")
    with bundle.open(threads=1) as predictor:
        run = predictor.encoder.run
        predictor.encoder.run = lambda feeds: {k: v + 0.5 for k, v in run(feeds).items()}  # type: ignore[method-assign]
        damaged = compare(predictor, answers, bundle.path / "verify", "damaged")
    assert intact.mask_iou.mean == pytest.approx(built.manifest["results"]["mask_iou"]["mean"], abs=1e-6)
    assert damaged.mask_iou.mean < intact.mask_iou.mean - 0.05
    assert damaged.embedding_cosine_mean < intact.embedding_cosine_mean


def test_timing_is_numpys() -> None:
    samples = list(np.random.default_rng(0).gamma(3.0, 2.0, 500))
    result = timing(samples)
    assert result.mean_ms == pytest.approx(np.mean(samples))
    assert result.p99_ms == pytest.approx(np.percentile(samples, 99))
    assert result.throughput_hz == pytest.approx(1000 / np.mean(samples))


def test_latency_names_its_circumstances(built: SimpleNamespace) -> None:
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    result = measure_latency(load_bundle(built.bundle), image, runs=3, warmup=1, threads=1)
    assert set(result.parts) == {"pre", "encoder", "decoder", "post", "total"}
    assert (result.runs, result.warmup, result.threads) == (3, 1, 1)
    assert result.provider == "CPUExecutionProvider"
    assert result.machine
    assert result.peak_rss_mb > 20
