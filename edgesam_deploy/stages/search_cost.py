"""What an assignment of INT8 costs on a target: at the device's peaks, or as measured on this CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from edgesam_deploy.measure.latency import machine
from edgesam_deploy.runtime import DEFAULT_BACKEND
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.assignments import NONE, Log, Subject
from edgesam_deploy.stages.backend import candidates_for, choose_backend
from edgesam_deploy.stages.graph_times import Timer, time_against
from edgesam_deploy.stages.node_work import graph_cost
from edgesam_deploy.target import Device

# (what is going on, the items to go through) -> the same items
Bar = Callable[[str, Iterable[Any]], Iterable[Any]]


class GraphPrice(Protocol):
    """What one graph costs under an assignment. source: where the number comes from, for people."""

    @property
    def source(self) -> str: ...

    def ms(self, graph: str, int8: frozenset[str]) -> float: ...


class Roofline:
    """``stages.node_work`` on the typed graph itself, so that every boundary between precisions counts."""

    def __init__(self, subject: Subject, device: Device) -> None:
        self._subject, self._device = subject, device
        self._known: dict[tuple[str, frozenset[str]], float] = {}
        self.source = f"roofline, {device.name}"

    def ms(self, graph: str, int8: frozenset[str]) -> float:
        key = (graph, int8)
        if key not in self._known:
            self._known[key] = graph_cost(self._subject.typed(graph, int8), self._device).ms
        return self._known[key]


class Measured:
    """Times of whole graphs on this CPU (``stages.graph_times``): each block alone in INT8, and each alone left out.

    In between, time is interpolated: a block saves what it saves alone, and two neighbours (no other block lies between
    them) save what the conversion between them costs. These are fitted to the blocks left out, by least squares of
    the smallest norm. The points that a search ends with are measured themselves (``exact``).
    """

    def __init__(
        self, subject: Subject, blocks: Mapping[str, Mapping[str, frozenset[str]]], timer: Timer, encoding: str
    ) -> None:
        """blocks: by graph, nodes by block."""
        self._subject, self._blocks, self._timer, self._encoding = subject, blocks, timer, encoding
        self._models: dict[str, _PairModel] = {}
        with timer.open(subject.sources["encoder"]) as session:
            self._threads = int(getattr(session, "threads", timer.threads or 0))
        self.source = f"measured on {timer.backend}, {self._threads} threads"

    def time_blocks(self, log: Log, bar: Bar) -> None:
        """Take the times that the model needs, or find them in the log."""
        for graph, blocks in self._blocks.items():
            whole = frozenset().union(*blocks.values())
            variants = {f"+{name}": nodes for name, nodes in blocks.items()}
            variants |= {f"-{name}": whole - nodes for name, nodes in blocks.items()} | {"all": whole}
            key = ("times", graph, {n: sorted(nodes) for n, nodes in variants.items()}, self.source, machine())
            found = log.find(*key)
            if found is None:
                start = time.perf_counter()
                base, times = self._time(graph, variants, bar)
                found = {"base": base, "times": times}
                log.add(found, time.perf_counter() - start, *key)
            neighbours = adjacent(graphs.load(self._subject.sources[graph]), blocks)
            self._models[graph] = _PairModel(blocks, neighbours, found["base"], found["times"])

    def ms(self, graph: str, int8: frozenset[str]) -> float:
        return self._models[graph].ms(int8)

    def exact(self, wanted: Mapping[str, Mapping[str, frozenset[str]]], bar: Bar) -> dict[str, float]:
        """Milliseconds by name of assignments (nodes by graph), both graphs added, each measured against none."""
        total = dict.fromkeys(wanted, 0.0)
        for graph in self._blocks:
            variants = {name: int8.get(graph, NONE) for name, int8 in wanted.items()}
            different = {nodes: name for name, nodes in variants.items() if nodes}
            base, times = self._time(graph, {name: nodes for nodes, name in different.items()}, bar)
            for name, nodes in variants.items():
                total[name] += times[different[nodes]] if nodes else base
        return total

    def _time(self, graph: str, variants: Mapping[str, frozenset[str]], bar: Bar) -> tuple[float, dict[str, float]]:
        def make(name: str) -> Path:
            return self._subject.typed(graph, variants[name], self._encoding)

        return time_against(
            self._timer, self._subject.sources[graph], list(variants), make, partial(bar, f"time {graph}")
        )


class _PairModel:
    """Milliseconds of one graph as a quadratic form of its INT8 blocks."""

    def __init__(
        self,
        blocks: Mapping[str, frozenset[str]],
        neighbours: set[tuple[str, str]],
        base: float,
        times: Mapping[str, float],
    ) -> None:
        self._blocks, self._base = blocks, base
        self._alone = {name: base - times[f"+{name}"] for name in blocks}
        pairs = sorted(neighbours)
        rows = [[float(name in pair) for pair in pairs] for name in blocks] + [[1.0] * len(pairs)]
        last = [times[f"-{name}"] - times["all"] - self._alone[name] for name in blocks]
        wanted = [*last, base - times["all"] - sum(self._alone.values())]
        saved = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0] if pairs else []
        self._pairs = dict(zip(pairs, (float(s) for s in saved), strict=True))

    def ms(self, int8: frozenset[str]) -> float:
        chosen = {name for name, nodes in self._blocks.items() if nodes <= int8}
        saved = sum(self._alone[name] for name in chosen)
        return self._base - saved - sum(s for pair, s in self._pairs.items() if chosen >= {*pair})


def adjacent(model: onnx.ModelProto, blocks: Mapping[str, frozenset[str]]) -> set[tuple[str, str]]:
    """Pairs of blocks between which a tensor passes through no node of another block, each pair sorted."""
    block_of = {node: name for name, nodes in blocks.items() for node in nodes}
    behind: dict[str, set[str]] = {}  # tensor -> the blocks that it comes from
    pairs: set[tuple[str, str]] = set()
    for node in model.graph.node:
        sources = set().union(*(behind.get(name, set()) for name in node.input))
        own = block_of.get(node.name)
        if own is not None:
            pairs |= {(min(own, other), max(own, other)) for other in sources if other != own}
            sources = {own}
        behind |= dict.fromkeys(node.output, sources)
    return pairs


def cpu_timer(subject: Subject, layers: frozenset[str], backend: str | None, threads: int | None) -> tuple[Timer, str]:
    """(how to time graphs on this CPU, the encoding of their INT8): the fastest pair for the encoder all in INT8.

    layers: of the encoder. backend: None to try all that are installed.
    """
    files: dict[str | None, Path] = {e: subject.typed("encoder", layers, e) for e in ("cpu", "tensorrt")}
    candidates = [
        c
        for c in candidates_for(files)
        # ONNX Runtime has no fast kernels for TensorRT's encoding.
        if backend in (None, c.backend) and (c.backend, c.encoding) != (DEFAULT_BACKEND, "tensorrt")
    ]
    if len(candidates) == 1:
        return Timer(candidates[0].backend, threads), str(candidates[0].encoding)
    choice = choose_backend(candidates, threads=threads, runs=7)
    return Timer(choice.backend, threads, choice.bf16), str(choice.encoding)
