"""Times of many variants of one graph on a CPU, each against the same base.

Whole graphs are timed, not nodes: backends rename and merge nodes, add reorders and conversions that belong to no one,
and each reports them its own way, so that what a block gains cannot be read off a node profile. The difference of two
whole graphs is what is wanted, on any backend. To see one of a few percent on a machine that is not quite still, every
variant takes turns with the base, a few variants at a time, and what counts is its ratio to the base in that round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.compare import alternate
from edgesam_deploy.runtime import Session, SessionOptions, open_session
from edgesam_deploy.stages.backend import example_feeds

# Variants beside the base in one round: what is in memory at the same time.
TOGETHER = 3


@dataclass(frozen=True, slots=True)
class Timer:
    """How graphs are timed. threads: None for all cores. runs: at most; fewer, but five, if they take ``seconds``."""

    backend: str
    threads: int | None = None
    bf16: bool = False
    runs: int = 15
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.runs < 1 or self.seconds < 0.0:
            raise InputError(f"expected at least one run and no negative time, got {self.runs} and {self.seconds}")

    def open(self, graph: Path) -> Session:
        return open_session(graph, self.backend, SessionOptions(self.threads, bf16=self.bf16))


def time_against(
    timer: Timer,
    base: Path,
    names: Sequence[str],
    make: Callable[[str], Path],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[float, dict[str, float]]:
    """(median milliseconds of ``base``, milliseconds by name: the median ratio to the base's own times, times that).

    make: the graph of a name, asked for when its turn comes. Inputs are noise: what a graph takes does not depend on
    them. Raises what opening and running a graph raises.
    """
    rounds = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)] or [()]
    medians: list[float] = []
    ratios: dict[str, float] = {}
    for group in progress(rounds):
        with ExitStack() as stack:
            sessions = {"": stack.enter_context(timer.open(base))}
            for name in group:
                sessions[name] = stack.enter_context(timer.open(make(name)))
            samples = _round(timer, sessions)
        medians.append(median(samples[""]))
        ratios |= {name: float(np.median(np.divide(samples[name], samples[""]))) for name in group}
    base_ms = median(medians)
    return base_ms, {name: base_ms * ratio for name, ratio in ratios.items()}


def _round(timer: Timer, sessions: Mapping[str, Session]) -> dict[str, list[float]]:
    feeds = example_feeds(sessions[""].specs())
    actions = {name: _action(session, feeds) for name, session in sessions.items()}
    start = time.perf_counter()
    alternate(actions, 1, 0)
    each = (time.perf_counter() - start) / len(actions)
    runs = min(timer.runs, max(5, math.ceil(timer.seconds / each)))
    return alternate(actions, runs, min(2, runs))


def _action(session: Session, feeds: Mapping[str, npt.NDArray[Any]]) -> Callable[[], object]:
    return lambda: session.run(feeds)
