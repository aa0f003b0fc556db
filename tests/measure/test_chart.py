"""Charts: numbers on axes, names that do not cover each other, and the models that no other beats."""

from __future__ import annotations

import pytest

from edgesam_deploy.measure.chart import BOTTOM, HEIGHT, LinearAxis, LogAxis, colours, front, linear_y, log_x, names


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 10.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (0.44, 0.53, [0.44, 0.45, 0.46, 0.47, 0.48, 0.49, 0.5, 0.51, 0.52, 0.53]),
        (-30.0, 170.0, [-20, 0, 20, 40, 60, 80, 100, 120, 140, 160]),
        (0.4970, 0.4973, [0.49700, 0.49705, 0.4971, 0.49715, 0.4972, 0.49725, 0.4973]),
    ],
)
def test_a_linear_axis_has_round_numbers(low: float, high: float, wanted: list[float]) -> None:
    ticks = LinearAxis(low, high, 0, 1).ticks()
    assert ticks == pytest.approx(wanted)
    assert len(ticks) <= 11


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.9, 21.0, [1, 2, 5, 10, 20]),
        (3.2, 6.3, [3.5, 4, 4.5, 5, 5.5, 6]),
        (44.8, 96.6, [50, 60, 70, 80, 90]),
    ],
)
def test_a_logarithmic_axis_has_numbers_on_short_ranges_too(low: float, high: float, wanted: list[float]) -> None:
    assert LogAxis(low, high, 0, 1).ticks() == pytest.approx(wanted)


def test_both_axes_run_from_start_to_end() -> None:
    for axis in (LinearAxis(2, 8, 100, 0), LogAxis(2, 8, 100, 0)):
        assert (axis.place(2), axis.place(8)) == (100, 0)
    assert LinearAxis(2, 8, 100, 0).place(5) == LogAxis(2, 8, 100, 0).place(4) == 50
    # A single value has room on both sides.
    for single in (linear_y([0.5]), linear_y([0.0]), log_x([3.0])):
        assert single.low < single.high
    assert linear_y([0.4, 0.5]).place(0.4) < HEIGHT - BOTTOM


# (cost, worth) -> which are on the front
FRONTS = {
    "one": ([(1, 1)], [0]),
    "none-beats-another": ([(3, 3), (1, 1), (2, 2)], [1, 2, 0]),
    "dominated": ([(1, 5), (2, 4), (3, 6)], [0, 2]),
    "same-cost": ([(1, 2), (1, 3)], [1]),
    "same-worth": ([(2, 3), (1, 3)], [1]),
    "twins": ([(1, 3), (1, 3)], [0]),
    "nothing": ([], []),
}


@pytest.mark.parametrize(("places", "wanted"), FRONTS.values(), ids=FRONTS)
def test_front(places: list[tuple[float, float]], wanted: list[int]) -> None:
    assert front(places) == wanted


def test_names_move_down_from_each_other() -> None:
    drawn = names([("first", 10, 50), ("second <2>", 12, 51), ("third", 13, 52), ("far", 500, 50)])
    lines = {text.partition(">")[2].partition("<")[0]: text for text in drawn if text.startswith("<text")}
    heights = {name: float(text.partition(' y="')[2].partition('"')[0]) for name, text in lines.items()}
    assert heights["far"] == heights["first"]
    assert heights["second &lt;2&gt;"] - heights["first"] >= 13
    # One that moved further than a line is led to its mark.
    assert sum("lead" in text for text in drawn) == 1


def test_a_group_keeps_its_colour() -> None:
    assert list(colours(["b", "a", "b"])) == ["b", "a"]
    assert len(set(colours([str(n) for n in range(8)]).values())) == 8
