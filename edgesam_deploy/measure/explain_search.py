"""A search for the fastest assignment of INT8, drawn: what was measured, the frontier, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from edgesam_deploy.errors import BundleError
from edgesam_deploy.measure.chart import front

_WIDTH, _HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 16, 44


@dataclass(frozen=True, slots=True)
class Point:
    """One assignment that was tried. int8: its INT8 blocks. cost_ms: as the search priced it. mask_iou: measured."""

    int8: tuple[str, ...]
    cost_ms: float
    mask_iou: float

    @property
    def words(self) -> str:
        blocks = f"{len(self.int8)} block{'' if len(self.int8) == 1 else 's'} in INT8"
        return f"{self.cost_ms:.3g} ms, mask IoU {self.mask_iou:.4f}: {blocks}"


@dataclass(frozen=True, slots=True)
class _Axes:
    """Data to pixels; both ends of an axis are a little beyond the data."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def search_section(search: Mapping[str, Any]) -> str:
    """The section of ``measure.explain_page`` on a search, or nothing where it recorded no frontier.

    Reads ``frontier`` and ``points`` (lists of {int8, cost_ms, mask_iou}), ``chosen`` (one of these or null),
    ``min_iou`` and ``cost_source`` (where times come from), all but the first optional. Raises BundleError where
    these are something else.
    """
    try:
        frontier = [_point(entry) for entry in search.get("frontier") or ()]
        points = [_point(entry) for entry in search.get("points") or ()]
        chosen = _point(search["chosen"]) if search.get("chosen") is not None else None
        limit = float(search["min_iou"]) if search.get("min_iou") is not None else None
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"nodes.json garbles its search: {error}; build the bundle again") from error
    if not frontier:
        return ""
    source = escape(f" ({search['cost_source']})" if search.get("cost_source") else ", as the search priced it")
    told = f"Chosen: {chosen.words}." if chosen is not None else "No assignment that pays passes."
    return (
        f"<h2>search</h2><p>Time{source}, against measured mask IoU of every assignment of INT8 to "
        f"blocks that was tried; the line joins those that none beats in both. {escape(told)}</p>"
        f"{_chart(frontier, points, chosen, limit)}"
    )


def _point(entry: Any) -> Point:
    return Point(tuple(str(b) for b in entry.get("int8", ())), float(entry["cost_ms"]), float(entry["mask_iou"]))


def _chart(frontier: Sequence[Point], points: Sequence[Point], chosen: Point | None, limit: float | None) -> str:
    everything = [*frontier, *points, *([chosen] if chosen is not None else [])]
    heights = [p.mask_iou for p in everything] + ([limit] if limit is not None else [])
    axes = _Axes(_span([p.cost_ms for p in everything]), _span(heights))
    # A frontier may be filled up with others.
    best = [frontier[i] for i in front([(p.cost_ms, p.mask_iou) for p in frontier])]
    line = " ".join("{:.1f},{:.1f}".format(*axes.place(p.cost_ms, p.mask_iou)) for p in best)
    marks = [_mark(axes, p, "tried", 3) for p in points] + [_mark(axes, p, "point", 4) for p in frontier]
    marks += [_mark(axes, chosen, "chosen", 6)] if chosen is not None else []
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="search: time and mask IoU">'
        f'{_scales(axes)}{_limit(axes, limit)}<polyline class="line" points="{line}"/>{"".join(marks)}</svg>'
    )


def _mark(axes: _Axes, point: Point, kind: str, radius: int) -> str:
    x, y = axes.place(point.cost_ms, point.mask_iou)
    blocks = ", ".join(point.int8)
    title = escape(f"{point.words}{f' ({blocks})' if blocks else ''}")
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{title}</title></circle>'


def _limit(axes: _Axes, limit: float | None) -> str:
    if limit is None:
        return ""
    (x, y), (end, _) = axes.place(axes.x[0], limit), axes.place(axes.x[1], limit)
    return (
        f'<line class="limit" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}"/>'
        f'<text x="{end:.1f}" y="{y - 5:.1f}" text-anchor="end">must reach {limit:.4g}</text>'
    )


def _scales(axes: _Axes) -> str:
    left, bottom = axes.place(axes.x[0], axes.y[0])
    right, top = axes.place(axes.x[1], axes.y[1])
    parts = [f'<polyline class="axis" fill="none" points="{left},{top} {left},{bottom} {right},{bottom}"/>']
    for step in range(5):
        x = axes.x[0] + (axes.x[1] - axes.x[0]) * step / 4
        y = axes.y[0] + (axes.y[1] - axes.y[0]) * step / 4
        across, up = axes.place(x, y)
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{x:.3g}</text>')
        parts.append(f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{y:.3f}</text>')
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">ms</text>')
    parts.append(f'<text x="{left + 6}" y="{top + 4}">mask IoU</text>')
    return "".join(parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.01 or 1.0
    return low - room, high + room
