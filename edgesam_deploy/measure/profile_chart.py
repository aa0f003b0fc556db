"""Models by their parameters and multiply-adds, both on logarithmic axes, as one SVG file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgesam_deploy.errors import InputError

_WIDTH, _HEIGHT = 960, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 130, 44, 52
# Radii in pixels: of the slowest model, and of all where there are no times.
_LARGEST, _SAME = 34.0, 6.0
_LINE = 13
# Okabe and Ito's colours, which people with any kind of colour vision tell apart; beyond eight families they recur.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7500", "#555555")
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.title{font-size:12px}.axis{stroke:#333;fill:none}.grid{stroke:#e4e4e4}"
    "circle{fill-opacity:.35;stroke-width:1.5}.lead{stroke:#999;stroke-width:.6}"
)


@dataclass(frozen=True, slots=True)
class Bubble:
    """One model. params_m: 10⁶. macs_g: 10⁹. ms: its area, None where nothing was timed."""

    name: str
    family: str
    params_m: float
    macs_g: float
    ms: float | None = None

    def __post_init__(self) -> None:
        if not self.params_m > 0 or not self.macs_g > 0 or (self.ms is not None and not self.ms > 0):
            raise InputError(f"a chart on logarithmic axes shows positive numbers only, got {self}")

    @property
    def words(self) -> str:
        time = f", {self.ms:.4g} ms" if self.ms is not None else ""
        return f"{self.name} ({self.family}): {self.params_m:.4g} M parameters, {self.macs_g:.4g} GMACs{time}"


@dataclass(frozen=True, slots=True)
class _Axis:
    """Data to pixels, logarithmic."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten within the axis."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        return [value for value in values if self.low <= value <= self.high]


def chart(bubbles: Sequence[Bubble], size_label: str) -> str:
    """The whole file. size_label: what a bubble's area stands for. Raises InputError where there is no model."""
    if not bubbles:
        raise InputError("a chart needs at least one model")
    x = _Axis(*_span([b.params_m for b in bubbles]), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(*_span([b.macs_g for b in bubbles]), _HEIGHT - _BOTTOM, _TOP)
    families = list(dict.fromkeys(b.family for b in bubbles))
    colours = {family: _COLOURS[i % len(_COLOURS)] for i, family in enumerate(families)}
    # The largest first, so that no bubble hides a smaller one.
    ordered = sorted(bubbles, key=lambda b: -(b.ms or 0.0))
    slowest = max((b.ms or 0.0) for b in bubbles)
    radii = {b: _LARGEST * math.sqrt(b.ms / slowest) if b.ms is not None else _SAME for b in bubbles}
    title = f"Parameters and multiply-adds{f'; area of a bubble: {size_label}' if slowest else ''}"
    title += "; hollow: not timed" if slowest and any(b.ms is None for b in bubbles) else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{escape(title)}"><style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="12" y="18">{escape(title)}</text>{_axes(x, y)}'
        f"{''.join(_circle(b, x, y, radii[b], colours[b.family]) for b in ordered)}"
        f"{''.join(_labels(bubbles, x, y))}</svg>\n"
    )


def _circle(bubble: Bubble, x: _Axis, y: _Axis, radius: float, colour: str) -> str:
    fill = colour if bubble.ms is not None else "none"
    return (
        f'<circle cx="{x.place(bubble.params_m):.1f}" cy="{y.place(bubble.macs_g):.1f}" r="{max(radius, 2.0):.1f}" '
        f'fill="{fill}" stroke="{colour}"><title>{escape(bubble.words)}</title></circle>'
    )


def _labels(bubbles: Sequence[Bubble], x: _Axis, y: _Axis) -> list[str]:
    """Names right of their bubbles' centres, moved down where they would cover one that is there already."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for bubble in sorted(bubbles, key=lambda b: -b.macs_g):
        left, middle = x.place(bubble.params_m) + 5, y.place(bubble.macs_g)
        width, line = 6.0 * len(bubble.name), middle
        while any(abs(line - other) < _LINE and left < end and start < left + width for start, end, other in taken):
            line += 2
        taken.append((left, left + width, line))
        if line - middle > _LINE:
            found.append(f'<line class="lead" x1="{left - 5:.1f}" y1="{middle:.1f}" x2="{left:.1f}" y2="{line:.1f}"/>')
        found.append(f'<text x="{left:.1f}" y="{line + 4:.1f}">{escape(bubble.name)}</text>')
    return found


def _axes(x: _Axis, y: _Axis) -> str:
    parts = []
    for value in x.ticks():
        at = x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for value in y.ticks():
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    bottom = _HEIGHT - _BOTTOM
    parts.append(f'<polyline class="axis" points="{_LEFT},{_TOP} {_LEFT},{bottom} {_WIDTH - _RIGHT},{bottom}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">parameters, 10⁶</text>')
    parts.append(f'<text x="{_LEFT + 6}" y="{_TOP - 6}">GMACs</text>')
    return "".join(parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Both ends a little beyond the data."""
    return min(values) / 1.4, max(values) * 1.4
