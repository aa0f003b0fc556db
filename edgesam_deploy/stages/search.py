"""Which blocks compute in INT8: the fastest assignment whose masks stay good enough. Knows nothing of graphs.

Measuring mask IoU is slow, pricing an assignment is not, and neither adds up over blocks: two harmless blocks may harm
together, and a lone INT8 block pays for the conversions around it. So:

1. Each block is measured alone. Blocks that gain no time, alone or as the last one, stay in the rest. What would be
   fastest if masks did not matter is measured too: if that does not pay, nothing does.
2. Along the order of loss per time gained, blocks are added one by one: the first frontier.
3. From the fastest assignment that passes, one or two blocks are switched (added, dropped, exchanged) and measured, the
   most promising first: by how much time it saves and how likely it passes. A model of the loss, fitted to all that was
   measured so far, says how likely; time is asked for. Each measurement starts the round again; it ends when nothing
   promises enough, or with the last measurement allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from edgesam_deploy.errors import InputError
from edgesam_deploy.stages.loss_model import LEAST, LossModel

# An assignment must be this much faster than none to be worth its risk and its calibration.
PAYS = 1.05
# What a switch must promise, as a share of the time, to be measured: likelihood × time saved.
PROMISE = 2e-5
# A frontier shows at least this many points, where there are as many.
FRONTIER = 5
# Switches of two blocks that are priced, and assignments beside the best that they start from.
_PRICED = 48
_STARTS = 4

Assignment = frozenset[str]


@dataclass(frozen=True, slots=True)
class Point:
    """One assignment. int8: its blocks. mask_iou: measured. cost_ms: as the search was told."""

    int8: frozenset[str]
    mask_iou: float
    cost_ms: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    verdict: "int8", ``chosen`` passes and pays; "keep", no assignment would pay, whatever its masks, and ``chosen`` has
    no INT8; "unmet", what pays does not pass, and ``chosen`` is None. rest, closest: the assignment without INT8, and
    the one that pays and has the best masks, or None where nothing pays. frontier: by cost, nothing faster has better
    masks (filled up to ``FRONTIER`` with the next best ones). points: all that was measured, in order. alone: mask IoU
    that each block costs alone. gain_ms: time it saves, the better of alone and last. holding_back: for "unmet", blocks
    of ``closest`` by what they cost alone, the worst first.
    """

    chosen: Point | None
    verdict: str
    rest: Point
    frontier: tuple[Point, ...]
    points: tuple[Point, ...]
    alone: Mapping[str, float]
    gain_ms: Mapping[str, float]
    holding_back: tuple[str, ...]
    closest: Point | None
    evaluations: int


def search(
    blocks: Sequence[str],
    iou: Callable[[Assignment], float],
    cost: Callable[[Assignment], float],
    min_iou: float,
    max_evaluations: int = 100,
) -> SearchResult:
    """The cheapest set of blocks with ``iou(set) >= min_iou``, by at most ``max_evaluations`` measurements of iou.

    iou, cost: of the set of INT8 blocks, deterministic; each set is asked for once. cost in milliseconds. Raises
    InputError for blocks that are named twice and for fewer evaluations than it takes to try each block alone.
    """
    if len(set(blocks)) != len(blocks):
        raise InputError("every block needs a name of its own")
    if max_evaluations < len(blocks) + 2:
        raise InputError(f"{len(blocks)} blocks need at least {len(blocks) + 2} measurements, got {max_evaluations}")
    state = _State(blocks, iou, cost, min_iou, max_evaluations)
    for block in blocks:
        state.measure(frozenset((block,)))
    if state.useful:
        state.measure(_fastest(state))
        _add_one_by_one(state)
        _switch(state)
    return _concluded(state)


class _State:
    """What is known so far; remembers every measurement and price."""

    def __init__(
        self,
        blocks: Sequence[str],
        iou: Callable[[Assignment], float],
        cost: Callable[[Assignment], float],
        min_iou: float,
        max_evaluations: int,
    ) -> None:
        self.blocks, self.min_iou, self.max_evaluations = tuple(blocks), min_iou, max_evaluations
        self._iou, self._cost = iou, cost
        self.points: dict[Assignment, Point] = {}
        self.prices: dict[Assignment, float] = {}
        whole, none = frozenset(blocks), Assignment()
        self.rest = self.measure(none)
        self.bar = self.rest.cost_ms / PAYS
        self.gain = {
            b: max(self.price(none) - self.price(frozenset((b,))), self.price(whole - {b}) - self.price(whole))
            for b in blocks
        }
        self.useful = tuple(b for b in blocks if self.gain[b] > 0.0)

    def price(self, chosen: Assignment) -> float:
        if chosen not in self.prices:
            self.prices[chosen] = self._cost(chosen)
        return self.prices[chosen]

    def measure(self, chosen: Assignment) -> Point:
        if chosen not in self.points:
            self.points[chosen] = Point(chosen, self._iou(chosen), self.price(chosen))
        return self.points[chosen]

    @property
    def spent(self) -> bool:
        return len(self.points) >= self.max_evaluations

    @property
    def best(self) -> Point | None:
        """The fastest that passes and pays."""
        passing = [p for p in self.points.values() if p.mask_iou >= self.min_iou and p.cost_ms <= self.bar]
        return min(passing, key=_rank, default=None)

    @property
    def closest(self) -> Point | None:
        """The best masks of what pays."""
        paying = [p for p in self.points.values() if p.cost_ms <= self.bar]
        return min(paying, key=lambda p: (-p.mask_iou, *_rank(p)), default=None)

    def loss_alone(self, block: str) -> float:
        point = self.points.get(frozenset((block,)))
        return self.rest.mask_iou - point.mask_iou if point is not None else 0.0


def _rank(point: Point) -> tuple[float, float, list[str]]:
    return point.cost_ms, -point.mask_iou, sorted(point.int8)


def _fastest(state: _State) -> Assignment:
    """What to do if masks did not matter: all blocks that gain, and single switches from there while these gain."""
    chosen = frozenset(state.useful)
    while True:
        best = min((chosen ^ {b} for b in state.blocks), key=lambda other: (state.price(other), sorted(other)))
        if state.price(best) >= state.price(chosen):
            return chosen
        chosen = best


def _add_one_by_one(state: _State) -> None:
    """Measure assignments along the order of loss per time gained, evenly if not all can be."""
    order = sorted(state.useful, key=lambda b: (max(state.loss_alone(b), LEAST) / state.gain[b], b))
    sizes = list(range(len(order), 1, -1))
    room = max((state.max_evaluations - len(state.points)) // 2, 1)
    step = max(len(sizes) / room, 1.0)
    for index in range(min(len(sizes), room)):
        if not state.spent:
            state.measure(frozenset(order[: sizes[int(index * step)]]))


def _switch(state: _State) -> None:
    """Switch blocks of the best assignments so far while that promises something."""
    while not state.spent and state.closest is not None:  # else not even the fastest pays
        promising = _most_promising(state)
        if promising is None:
            return
        state.measure(promising)


def _most_promising(state: _State) -> Assignment | None:
    """The switch of one or two blocks with the most to expect, or None."""
    best, closest = state.best, state.closest
    measured = {p.int8: p.mask_iou for p in state.points.values() if p.int8}
    model = LossModel({b: state.loss_alone(b) for b in state.useful}, state.rest.mask_iou, measured)
    limit = best.cost_ms if best is not None else state.bar
    expected: list[tuple[float, list[str], Assignment]] = []
    for chosen in {c for start in _starts(state, limit) for c in _neighbours(state, start, limit)}:
        mean, doubt = model.predict(chosen)
        likely = 0.5 * math.erfc((state.min_iou - mean) / (doubt * math.sqrt(2.0)))
        if best is not None:
            value = likely * (limit - state.price(chosen)) / state.rest.cost_ms
        else:  # nothing passes yet: better masks first, time only has to pay
            value = likely + mean - (closest.mask_iou if closest is not None else 0.0)
        expected.append((-value, sorted(chosen), chosen))
    value, _, chosen = min(expected, default=(0.0, [], Assignment()))
    return chosen if -value > PROMISE else None


def _starts(state: _State, limit: float) -> list[Point]:
    """The best, and what is faster but fails by the least."""
    failing = [p for p in state.points.values() if p.cost_ms <= limit and p.mask_iou < state.min_iou]
    failing.sort(key=lambda p: (-p.mask_iou, *_rank(p)))
    return [p for p in (state.best,) if p is not None] + failing[:_STARTS]


def _neighbours(state: _State, start: Point, limit: float) -> list[Assignment]:
    """Assignments one or two switches from ``start`` that are not measured and cost at most ``limit``.

    Single switches are priced; of the pairs, those that look cheapest by the sum of their switches.
    """
    singles = {b: start.int8 ^ {b} for b in state.useful}
    change = {b: state.price(chosen) - start.cost_ms for b, chosen in singles.items()}
    pairs = sorted(combinations(state.useful, 2), key=lambda pair: (change[pair[0]] + change[pair[1]], pair))
    found = [*singles.values(), *(start.int8 ^ set(pair) for pair in pairs[:_PRICED])]
    return [chosen for chosen in found if chosen not in state.points and state.price(chosen) <= limit]


def _concluded(state: _State) -> SearchResult:
    chosen, closest = state.best, state.closest
    verdict = "int8" if chosen is not None else "unmet" if closest is not None else "keep"
    alone = {b: state.loss_alone(b) for b in state.blocks}
    points = tuple(state.points.values())
    return SearchResult(
        chosen=state.rest if verdict == "keep" else chosen,
        verdict=verdict,
        rest=state.rest,
        frontier=frontier(points),
        points=points,
        alone=alone,
        gain_ms=state.gain,
        holding_back=held_back(closest, alone) if verdict == "unmet" else (),
        closest=closest,
        evaluations=len(points),
    )


def held_back(closest: Point | None, alone: Mapping[str, float]) -> tuple[str, ...]:
    """Blocks of an assignment that cost masks most, alone: the worst, and what costs a quarter of that or more."""
    losses = {b: alone[b] for b in (closest.int8 if closest is not None else ())}
    worst = max(losses.values(), default=0.0)
    return tuple(sorted((b for b in losses if losses[b] >= worst / 4), key=lambda b: (-losses[b], b)))


def frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points than which none is both faster and better, by cost; with the next best ones if these are too few."""
    waiting = sorted(points, key=_rank)
    found: list[Point] = []
    while waiting and len(found) < FRONTIER:
        layer: list[Point] = []
        for point in waiting:
            if not layer or point.mask_iou > layer[-1].mask_iou:
                layer.append(point)
        waiting = [p for p in waiting if p not in layer]
        found += layer if not found else layer[: FRONTIER - len(found)]
    return tuple(sorted(found, key=_rank))
