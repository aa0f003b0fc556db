"""What INT8 costs each block in mask IoU, and the fastest assignment within a budget: the search bound to real graphs.

Blocks of encoder and decoder are searched together. A block that alone spends much of the budget is opened, down to
single layers, so that one bad layer does not keep its neighbours in float. Time comes from the device's peaks, or is
measured where the graphs run on this CPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import InputError
from edgesam_deploy.recipe import Int8Rules, Recipe
from edgesam_deploy.runtime import CPU_BACKENDS
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.assignments import NONE, Log, Masks, Subject
from edgesam_deploy.stages.blocks import SHARE, Block, blocks, children
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.placement import eligible
from edgesam_deploy.stages.search import PAYS, Assignment, SearchResult, frontier, held_back, search
from edgesam_deploy.stages.search_cost import Bar, GraphPrice, Measured, Roofline, cpu_timer
from edgesam_deploy.stages.tune_result import TuneResult as TuneResult
from edgesam_deploy.stages.tune_result import load_tune as load_tune
from edgesam_deploy.stages.tune_result import save_tune
from edgesam_deploy.stages.typed import Typing
from edgesam_deploy.target import Target

# A block that alone loses more than this share of the budget is opened.
OPENED = 0.5
_GRAPHS = ("encoder", "decoder")
_Progress = Callable[[str, Iterable[Any], int | None], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How to search. min_iou: mask IoU to reach, None for the recipe's. images: how many to measure on, spread evenly
    over the calibration set. margin: a share of 1 - min_iou to stay above it where possible, since other images will
    differ. share: of a graph's layers that a block holds at most. backend, threads, runs: for times on this CPU.
    """

    min_iou: float | None = None
    images: int = 12
    max_evaluations: int = 120
    margin: float = 0.1
    share: float = SHARE
    backend: str | None = None
    threads: int | None = None
    runs: int = 15

    def __post_init__(self) -> None:
        for name in ("min_iou", "share"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise InputError(f"{name} must be a number in (0, 1], got {value!r}")
        if not 0.0 <= self.margin < 1.0:
            raise InputError(f"margin must be a number in [0, 1), got {self.margin!r}")
        for name in ("images", "max_evaluations", "runs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.backend is not None and self.backend not in CPU_BACKENDS:
            raise InputError(f"backend must be one of {', '.join(CPU_BACKENDS)}, got {self.backend!r}")


def tune(
    sources: Mapping[str, Path],
    ranges: Mapping[str, Ranges],
    images: Sequence[Path],
    recipe: Recipe,
    rules: Int8Rules,
    target: Target,
    how: Typing,
    options: TuneOptions,
    cache: Path,
    output: Path,
    progress: _Progress = lambda _, items, __: items,
) -> TuneResult:
    """Search, and write ``search.json`` and ``frontier.svg`` into the folder ``output``.

    sources, ranges: of ``encoder`` and ``decoder``. cache: a file of measurements that a killed search goes on from.
    """
    start = time.perf_counter()
    chosen_images = _spread(images, options.images)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(sources, ranges, recipe, rules, how, Path(folder))
        log = Log(cache, subject.digest(chosen_images))
        found, assigned, source = _search(subject, Masks(subject, chosen_images, log), target, options, progress)
    nodes = assigned.nodes(found.chosen.int8 if found.chosen is not None else NONE)
    result = TuneResult(
        int8={graph: tuple(n for n in assigned.layers[graph] if n in nodes[graph]) for graph in _GRAPHS},
        search=found,
        block_of=assigned.block_of(),
        layers={name: len(block.layers) for name, (_, block) in assigned.blocks.items()},
        minutes=(time.perf_counter() - start + log.seconds) / 60.0,
        min_iou=_min_iou(options, recipe),
        cost_source=source,
        rest=how.rest,
        images=len(chosen_images),
    )
    save_tune(result, output)
    return result


@dataclass(slots=True)
class _Assigned:
    """Blocks of both graphs by name. layers: what may be INT8, by graph."""

    subject: Subject
    layers: dict[str, list[str]]
    blocks: dict[str, tuple[str, Block]]

    def nodes(self, int8: Assignment) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {graph: set() for graph in _GRAPHS}
        for name in int8:
            graph, block = self.blocks[name]
            found[graph].update(block.layers)
        return {graph: frozenset(nodes) for graph, nodes in found.items()}

    def by_graph(self) -> dict[str, dict[str, frozenset[str]]]:
        return {
            graph: {name: frozenset(b.layers) for name, (own, b) in self.blocks.items() if own == graph}
            for graph in _GRAPHS
        }

    def block_of(self) -> dict[str, str]:
        """Of every node: its block, or the one whose path leads to it."""
        found: dict[str, str] = {}
        for graph, source in self.subject.sources.items():
            own = {name: block for name, (g, block) in self.blocks.items() if g == graph}
            layers = {layer: name for name, block in own.items() for layer in block.layers}
            longest = sorted(own.items(), key=lambda item: -len(item[1].name))
            for node in graphs.load(source).graph.node:
                module = node.name.rpartition("/")[0]
                around = (n for n, b in longest if module == b.name or module.startswith(f"{b.name}."))
                name = layers.get(node.name) or next(around, None)
                if name is not None:
                    found.setdefault(node.name, name)
        return found


def _search(
    subject: Subject, masks: Masks, target: Target, options: TuneOptions, progress: _Progress
) -> tuple[SearchResult, _Assigned, str]:
    """(what was found, the blocks, where times come from)."""
    layers = {g: eligible(graphs.load(subject.sources[g]), subject.rules)[0] for g in _GRAPHS}
    whole = {f"{g}:{b.name}": (g, b) for g in _GRAPHS for b in blocks(layers[g], options.share)}
    assigned = _Assigned(subject, layers, whole)
    min_iou = _min_iou(options, subject.recipe)
    aim = min_iou + options.margin * (1.0 - min_iou)

    def bar(name: str, items: Iterable[Any]) -> Iterable[Any]:
        held = list(items)
        return progress(name, held, len(held))

    _open_bad_blocks(assigned, masks, aim, options.max_evaluations // 2, bar)
    price = _price(assigned, target, options, masks.log, bar)
    with _ticks(progress, "search", options.max_evaluations) as tick:

        def iou(int8: Assignment) -> float:
            tick()
            nodes = assigned.nodes(int8)
            return masks.iou(nodes["encoder"], nodes["decoder"])

        def cost(int8: Assignment) -> float:
            return sum(price.ms(graph, nodes) for graph, nodes in assigned.nodes(int8).items())

        limit = max(options.max_evaluations, 2 * len(assigned.blocks) + 2)
        found = search(tuple(assigned.blocks), iou, cost, aim, limit)
        if found.verdict == "unmet" and aim > min_iou:  # what was measured is not measured again
            found = search(tuple(assigned.blocks), iou, cost, min_iou, limit)
    if isinstance(price, Measured):
        found = _measured_again(found, assigned, price, min_iou, bar)
    return found, assigned, price.source


def _open_bad_blocks(assigned: _Assigned, masks: Masks, aim: float, most: int, bar: Bar) -> None:
    """Replace blocks that alone lose much of the budget by their parts, the worst first, up to ``most`` blocks."""
    rest = masks.iou(NONE, NONE)
    limit = OPENED * max(rest - aim, 0.0)

    def loss(name: str) -> float:
        nodes = assigned.nodes(frozenset((name,)))
        return rest - masks.iou(nodes["encoder"], nodes["decoder"])

    losses = {name: loss(name) for name in bar("each block alone", list(assigned.blocks))}
    while bad := [n for n in losses if losses[n] > limit and len(assigned.blocks[n][1].layers) > 1]:
        worst = max(bad, key=lambda name: (losses[name], name))
        graph, block = assigned.blocks[worst]
        parts = {f"{graph}:{part.name}": (graph, part) for part in children(block)}
        if len(assigned.blocks) - 1 + len(parts) > most or (parts.keys() & assigned.blocks.keys()) - {worst}:
            losses[worst] = 0.0  # stays whole
            continue
        order = list(assigned.blocks.items())
        place = list(assigned.blocks).index(worst)
        assigned.blocks = dict([*order[:place], *parts.items(), *order[place + 1 :]])
        del losses[worst]
        losses |= {name: loss(name) for name in bar(f"inside {block.name}", list(parts))}


def _price(assigned: _Assigned, target: Target, options: TuneOptions, log: Log, bar: Bar) -> GraphPrice:
    if target.devices:
        return Roofline(assigned.subject, target.devices[0])
    everything = frozenset(assigned.layers["encoder"])
    timer, encoding = cpu_timer(assigned.subject, everything, options.backend, options.threads)
    measured = Measured(assigned.subject, assigned.by_graph(), replace(timer, runs=options.runs), encoding)
    measured.time_blocks(log, bar)
    return measured


def _measured_again(
    found: SearchResult, assigned: _Assigned, price: Measured, min_iou: float, bar: Bar
) -> SearchResult:
    """The same search with real times for the points that matter, and the verdict that follows from these.

    The times of other points stay the model's, in proportion to the assignment without INT8: the machine may have
    become faster or slower since they were taken.
    """
    fastest = min(found.points, key=lambda p: p.cost_ms)
    points = {*found.frontier, found.rest, fastest} | {p for p in (found.chosen, found.closest) if p is not None}
    by_name = {str(i): p for i, p in enumerate(sorted(points, key=lambda p: (p.cost_ms, sorted(p.int8))))}
    times = price.exact({name: assigned.nodes(p.int8) for name, p in by_name.items()}, bar)
    real = {p.int8: replace(p, cost_ms=times[name]) for name, p in by_name.items()}
    rest = real[found.rest.int8]
    drift = rest.cost_ms / found.rest.cost_ms
    paying = [p for p in real.values() if p.cost_ms <= rest.cost_ms / PAYS]
    passing = min((p for p in paying if p.mask_iou >= min_iou), key=lambda p: (p.cost_ms, sorted(p.int8)), default=None)
    verdict = "int8" if passing is not None else "unmet" if paying else "keep"
    closest = max(paying, key=lambda p: (p.mask_iou, sorted(p.int8)), default=None)
    return replace(
        found,
        verdict=verdict,
        chosen=rest if verdict == "keep" else passing,
        rest=rest,
        closest=closest,
        frontier=frontier(real.values()),
        points=tuple(real.get(p.int8, replace(p, cost_ms=p.cost_ms * drift)) for p in found.points),
        gain_ms={name: gain * drift for name, gain in found.gain_ms.items()},
        holding_back=held_back(closest, found.alone) if verdict == "unmet" else (),
    )


@contextmanager
def _ticks(progress: _Progress, name: str, total: int) -> Any:
    """A progress bar for work that is not a loop."""
    steps = iter(progress(name, range(total), total))
    yield lambda: next(steps, None)
    close = getattr(steps, "close", None)
    if close is not None:
        close()


def _min_iou(options: TuneOptions, recipe: Recipe) -> float:
    return float(recipe.min_mask_iou["int8"] if options.min_iou is None else options.min_iou)


def _spread(images: Sequence[Path], count: int) -> list[Path]:
    """``count`` of the images, evenly spread; all if there are fewer."""
    if not images:
        raise InputError("a search needs images to measure masks on, got none")
    step = max(len(images) / count, 1.0)
    return [images[int(i * step)] for i in range(min(count, len(images)))]
