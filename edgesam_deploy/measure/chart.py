"""What charts of models share: axes, the lines around them, names beside marks, and which models no other beats.

A chart is one SVG file that needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 64, 130, 44, 52
# Okabe and Ito's colours, which people with any kind of colour vision tell apart; beyond eight groups they recur.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7500", "#555555")
_LINE = 13
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.title{font-size:12px}.axis{stroke:#333;fill:none}.grid{stroke:#e4e4e4}"
    "circle{fill-opacity:.35;stroke-width:1.5}.lead{stroke:#999;stroke-width:.6}"
)
# Steps of an axis: of its numbers 1, 2 and 5 times powers of ten.
_STEPS = (1, 2, 5)
_LINEAR_TICKS = 10
# Fewer powers and their halves say little of an axis.
_LOG_TICKS = 3


class Axis(Protocol):
    """Data to pixels."""

    def place(self, value: float) -> float: ...

    def ticks(self) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class LogAxis:
    """Logarithmic, of positive numbers."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten within the axis; of a short one even numbers."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [step * 10.0**power for power in powers for step in _STEPS]
        found = [value for value in values if self.low <= value <= self.high]
        return found if len(found) >= _LOG_TICKS else LinearAxis(self.low, self.high, self.start, self.end).ticks()


@dataclass(frozen=True, slots=True)
class LinearAxis:
    """Of any numbers."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most ten even numbers within the axis, 1, 2 or 5 times a power of ten apart."""
        finest = math.floor(math.log10((self.high - self.low) / _LINEAR_TICKS))
        steps = [step * 10.0**power for power in (finest, finest + 1) for step in _STEPS]
        step = next(s for s in steps if (self.high - self.low) / s <= _LINEAR_TICKS)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def log_x(values: Sequence[float]) -> LogAxis:
    """From left to right, a little beyond the data, as all axes here."""
    return LogAxis(min(values) / 1.4, max(values) * 1.4, LEFT, WIDTH - RIGHT)


def log_y(values: Sequence[float]) -> LogAxis:
    return LogAxis(min(values) / 1.4, max(values) * 1.4, HEIGHT - BOTTOM, TOP)


def linear_y(values: Sequence[float]) -> LinearAxis:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.01 or 1.0
    return LinearAxis(low - room, high + room, HEIGHT - BOTTOM, TOP)


def colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each group, in the order in which they occur."""
    return {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(groups))}


def svg(title: str, body: str, style: str = "") -> str:
    """The whole file. style: CSS of the chart's own, beside that of all."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}"><style>{_STYLE}{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="12" y="18">{escape(title)}</text>{body}</svg>\n'
    )


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Both axes with their numbers, and the lines across."""
    parts = []
    for value in x.ticks():
        at = x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for value in y.ticks():
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<polyline class="axis" points="{LEFT},{TOP} {LEFT},{bottom} {WIDTH - RIGHT},{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="{LEFT + 6}" y="{TOP - 6}">{escape(y_label)}</text>')
    return "".join(parts)


def names(marks: Sequence[tuple[str, float, float]]) -> list[str]:
    """Names right of their marks' centres, moved down where they would cover one that is there already.

    marks: name, and the centre in pixels.
    """
    taken: list[tuple[float, float, float]] = []
    found = []
    for name, at, middle in sorted(marks, key=lambda mark: mark[2]):
        left = at + 5
        width, line = 6.0 * len(name), middle
        while any(abs(line - other) < _LINE and left < end and start < left + width for start, end, other in taken):
            line += 2
        taken.append((left, left + width, line))
        if line - middle > _LINE:
            found.append(f'<line class="lead" x1="{left - 5:.1f}" y1="{middle:.1f}" x2="{left:.1f}" y2="{line:.1f}"/>')
        found.append(f'<text x="{left:.1f}" y="{line + 4:.1f}">{escape(name)}</text>')
    return found


def front(places: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (cost, worth) are worth more than everything that costs no more, by rising cost."""
    found: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
        if not found or places[i][1] > places[found[-1]][1]:
            found.append(i)
    return found
