"""Fitting shares of the peaks: factors that are known come back, and a figure's error is that of a fit without it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.efficiency import Fit, Row, Sample, fit, load_fit
from edgesam_deploy.measure.roofline import Efficiency, Kernel, price
from edgesam_deploy.target import load_target

DEVICE = load_target("agx-orin-64gb").devices[0]


def networks(count: int, truth: Efficiency) -> list[Sample]:
    """Made-up networks of 20 to 150 kernels, some short of arithmetic, some of bandwidth, timed by known factors."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        kernels = [
            Kernel(f"k{i}", (), int(10 ** rng.uniform(7, 10)), int(10 ** rng.uniform(5, 7.5)), "fp16", True)
            for i in range(20 + 20 * index)
        ]
        made.append(Sample(f"n{index}", DEVICE, kernels, price(kernels, DEVICE, truth).ms))
    return made


@pytest.mark.parametrize(
    "truth", [Efficiency(0.4, 0.7, 0.003), Efficiency(0.15, 0.9, 0.0), Efficiency(0.8, 0.3, 0.012)], ids=str
)
def test_known_factors_come_back(truth: Efficiency) -> None:
    found = fit(networks(7, truth))
    assert found.compute == pytest.approx(truth.compute, rel=0.03)
    assert found.memory == pytest.approx(truth.memory, rel=0.03)
    assert found.launch_ms == pytest.approx(truth.launch_ms, abs=2e-4)


def test_fewer_figures_than_factors_are_refused() -> None:
    with pytest.raises(InputError, match="a fit of 3 factors needs as many latencies"):
        fit(networks(2, Efficiency()))


def row(measured: float, model: float, left_out: float | None = None) -> Row:
    return Row("n", "d", "fp16", measured, model, "s", left_out)


def test_errors_are_of_what_was_not_seen() -> None:
    assert row(10.0, 10.0, 12.0).error == pytest.approx(0.2)
    assert row(10.0, 5.0).error == pytest.approx(-0.5)


def test_nine_of_ten_lie_within_the_factor() -> None:
    """By hand: ten rows, off by 1 to 10 %, then one of them by half."""
    rows = tuple(row(100.0, 100.0, 100.0 + n) for n in range(1, 11))
    found = Fit(Efficiency(), rows)
    assert found.factor == pytest.approx(1.09)
    assert found.median_error == pytest.approx(0.055)
    worse = Fit(Efficiency(), rows[:4], (row(100.0, 50.0),))
    assert worse.factor == pytest.approx(2.0), "half as long is off by a factor of two"


def test_the_packaged_fit_says_where_it_comes_from() -> None:
    found = load_fit()
    assert len(found.fitted) >= 5
    assert all(r.source and r.left_out_ms is not None for r in found.fitted)
    assert all(r.source and r.left_out_ms is None for r in found.tried)
    assert 1.0 < found.factor < 10.0
    assert math.isfinite(found.median_error)


@pytest.mark.parametrize("content", ["", "[]", '{"efficiency": {"compute": 2.0}, "fitted": [], "tried": []}'])
def test_a_damaged_fit_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "efficiency.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="efficiency"):
        load_fit(path)


def test_a_fit_is_read_as_it_was_written(tmp_path: Path) -> None:
    from dataclasses import asdict

    written = replace(load_fit(), tried=(row(1.0, 2.0),))
    path = tmp_path / "efficiency.json"
    path.write_text(json.dumps(asdict(written)), encoding="utf-8")
    assert load_fit(path) == written
