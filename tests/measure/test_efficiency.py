"""What is kept of a fit: a figure's error is that of a fit without it, and nine of ten lie within the factor."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.efficiency import Fit, Row, load_fit
from edgesam_deploy.measure.roofline import Efficiency


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
