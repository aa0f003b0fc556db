"""Models by their parameters and multiply-adds, both on logarithmic axes, as one SVG file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.chart import Axis, colours, frame, log_x, log_y, names, svg

# Radii in pixels: of the slowest model, and of all where there are no times.
_LARGEST, _SAME = 34.0, 6.0


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


def chart(bubbles: Sequence[Bubble], size_label: str) -> str:
    """The whole file. size_label: what a bubble's area stands for. Raises InputError where there is no model."""
    if not bubbles:
        raise InputError("a chart needs at least one model")
    x, y = log_x([b.params_m for b in bubbles]), log_y([b.macs_g for b in bubbles])
    colour_of = colours([b.family for b in bubbles])
    # The largest first, so that no bubble hides a smaller one.
    ordered = sorted(bubbles, key=lambda b: -(b.ms or 0.0))
    slowest = max((b.ms or 0.0) for b in bubbles)
    radii = {b: _LARGEST * math.sqrt(b.ms / slowest) if b.ms is not None else _SAME for b in bubbles}
    title = f"Parameters and multiply-adds{f'; area of a bubble: {size_label}' if slowest else ''}"
    title += "; hollow: not timed" if slowest and any(b.ms is None for b in bubbles) else ""
    marks = [(b.name, x.place(b.params_m), y.place(b.macs_g)) for b in bubbles]
    return svg(
        title,
        f"{frame(x, y, 'parameters, 10⁶', 'GMACs')}"
        f"{''.join(_circle(b, x, y, radii[b], colour_of[b.family]) for b in ordered)}{''.join(names(marks))}",
    )


def _circle(bubble: Bubble, x: Axis, y: Axis, radius: float, colour: str) -> str:
    fill = colour if bubble.ms is not None else "none"
    return (
        f'<circle cx="{x.place(bubble.params_m):.1f}" cy="{y.place(bubble.macs_g):.1f}" r="{max(radius, 2.0):.1f}" '
        f'fill="{fill}" stroke="{colour}"><title>{escape(bubble.words)}</title></circle>'
    )
