"""Models by what they cost and what their masks are worth, those that none beats in both joined, as one SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgesam_deploy.measure.chart import Axis, colours, frame, front, linear_y, log_x, names, svg

GREY = "#999999"
STYLE = ".front{stroke:#333;stroke-width:1.2;fill:none}.whisker{stroke-width:1;stroke-opacity:.6}"
RADIUS = 5.0


@dataclass(frozen=True, slots=True)
class Mark:
    """One model. group: those of one colour. interval: of its worth."""

    name: str
    group: str
    cost: float
    worth: float
    interval: tuple[float, float]


def pareto(marks: Sequence[Mark], title: str, cost_label: str, worth_label: str) -> str:
    """The whole file; cost on a logarithmic axis. marks: at least one."""
    x = log_x([mark.cost for mark in marks])
    y = linear_y([value for mark in marks for value in (mark.worth, *mark.interval)])
    best = [marks[i] for i in front([(mark.cost, mark.worth) for mark in marks])]
    colour_of = colours([mark.group for mark in marks])
    line = " ".join(f"{x.place(mark.cost):.1f},{y.place(mark.worth):.1f}" for mark in best)
    # Those on the front last, so that none hides them.
    ordered = sorted(marks, key=lambda mark: mark in best)
    drawn = "".join(_draw(mark, x, y, colour_of[mark.group] if mark in best else GREY) for mark in ordered)
    written = "".join(names([(mark.name, x.place(mark.cost) + RADIUS, y.place(mark.worth)) for mark in marks]))
    return svg(
        title,
        f'{frame(x, y, cost_label, worth_label)}<polyline class="front" points="{line}"/>{drawn}{written}',
        STYLE,
    )


def _draw(mark: Mark, x: Axis, y: Axis, colour: str) -> str:
    across, up = x.place(mark.cost), y.place(mark.worth)
    low, high = (y.place(value) for value in mark.interval)
    words = f"{mark.name}: {mark.worth:.4f} ({mark.interval[0]:.3f}–{mark.interval[1]:.3f}) at {mark.cost:.4g}"
    return (
        f'<line class="whisker" x1="{across:.1f}" y1="{low:.1f}" x2="{across:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
        f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{RADIUS:g}" fill="{colour}" stroke="{colour}">'
        f"<title>{escape(words)}</title></circle>"
    )
