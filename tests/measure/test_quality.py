"""Summaries of mask records, by hand and by resampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the eval extra")

from edgesam_deploy.measure.evaluate import MaskRecord
from edgesam_deploy.measure.quality import bootstrap, calibrate, mean, summarize


def record(iou: float, **others: Any) -> MaskRecord:
    fields = {
        "dataset": "d", "image": "i", "group": "g", "target": "1", "area": 10.0, "size": "small", "source": None,
        "against": "truth", "prompt": "box", "answer": "single", "predicted_iou": None, "boundary_f": iou,
    }  # fmt: skip
    return MaskRecord(iou=iou, **{**fields, **others})


def test_a_summary_by_hand() -> None:
    records = [
        record(0.2, group="a", source="x"),
        record(0.5, group="a", size="large", source="y"),
        record(0.95, group="b", size="large", source="y", predicted_iou=0.9),
        record(0.1, answer="other"),
        record(0.3, against="teacher"),
    ]
    first, other, teacher = summarize([records[4], *records[:4]], lambda name: False)
    assert (first.answer, other.answer, teacher.against) == ("single", "other", "teacher"), "the truth first"
    assert first.miou == pytest.approx(1.65 / 3)
    assert (first.count, first.groups) == (3, 2)
    assert {k: (s.miou, s.count) for k, s in first.by_size.items()} == {"small": (0.2, 1), "large": (0.725, 2)}
    assert {k: s.count for k, s in first.by_source.items()} == {"x": 1, "y": 2}
    assert first.above == pytest.approx({"0.5": 2 / 3, "0.75": 1 / 3, "0.9": 1 / 3})
    assert first.calibration is not None
    assert first.calibration.count == 1
    assert other.calibration is None
    (by_sequence,) = summarize(records[:3], lambda name: True)
    assert by_sequence.miou == pytest.approx((0.35 + 0.95) / 2)


def test_calibration_by_hand() -> None:
    predicted = np.array([0.05, 0.72, 0.78, 1.0, 1.2, -0.1])
    measured = np.array([0.10, 0.50, 0.70, 0.9, 1.0, 0.0])
    found = calibrate(predicted, measured)
    assert found is not None
    assert [b.count for b in found.bins] == [2, 0, 0, 0, 0, 0, 0, 2, 0, 2]
    assert found.bins[7].predicted == pytest.approx(0.75)
    assert found.bins[7].measured == pytest.approx(0.6)
    assert (found.bins[7].low, found.bins[7].high) == (0.7, 0.8)
    assert found.bins[1].predicted is None
    expected = 2 / 6 * abs(-0.025 - 0.05) + 2 / 6 * 0.15 + 2 / 6 * abs(1.1 - 0.95)
    assert found.error == pytest.approx(expected)
    assert (found.predicted, found.measured) == pytest.approx((predicted.mean(), measured.mean()))


@pytest.mark.parametrize("by_group", [False, True])
def test_the_interval_is_that_of_resampled_groups(by_group: bool) -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    values = rng.uniform(0, 1, len(groups)) * 0.2 + rng.uniform(0, 0.8, 40)[groups]
    low, high = bootstrap(values, groups, by_group)
    assert low < mean(values, groups, by_group) < high
    means = []
    for _ in range(2000):  # the same by hand, with other numbers
        drawn = rng.integers(40, size=40)
        parts = [values[groups == g] for g in drawn]
        means.append(np.mean([p.mean() for p in parts]) if by_group else np.concatenate(parts).mean())
    assert (low, high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))), abs=0.015)
    assert bootstrap(values, groups, by_group) == (low, high), "seeded"
    assert bootstrap(np.array([0.5, 0.7]), np.zeros(2, np.int64), by_group) == pytest.approx((0.6, 0.6))
