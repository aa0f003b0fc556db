"""Which CPU backend, and which INT8 encoding, runs a graph fastest on this machine: measured, not assumed.

The same arithmetic is written in two encodings (``stages.cpu_encoding``) and run by two backends; which pair is faster
depends on the CPU's INT8 units and on the graph: a bundle may run its encoder on one and its decoder on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.contract import GraphContract, TensorSpec
from edgesam_deploy.errors import InputError, MissingExtraError
from edgesam_deploy.measure.compare import alternate, label, versions
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.runtime import (
    BF16_BACKENDS,
    CPU_BACKENDS,
    DEFAULT_BACKEND,
    Session,
    SessionOptions,
    installed,
    open_session,
)

# Two series of the very same session, run in turn on a busy machine, had medians up to a quarter apart: a margin alone
# is not enough there. Being faster in 12 of 15 rounds happens to one of two equals in 2 of 100 choices.
MARGIN = 0.05
ROUNDS_WON = 0.8
WARMUP = 3
# Of a decoder whose feeds are not given: one click, which is padded to two points.
PROMPTS, POINTS = 1, 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a graph. encoding: of its INT8, None where it has none. bf16: compute in bfloat16 what is FP32."""

    backend: str
    encoding: str | None
    bf16: bool
    graph: Path

    def __post_init__(self) -> None:
        if self.backend not in CPU_BACKENDS:
            raise InputError(f"backend must be one of {', '.join(CPU_BACKENDS)}, got '{self.backend}'")
        if self.bf16 and self.backend not in BF16_BACKENDS:
            raise InputError(f"bf16 is for {', '.join(BF16_BACKENDS)}, got '{self.backend}'")

    @property
    def label(self) -> str:
        """As ``openvino bf16, tensorrt encoding``."""
        name = label(self.backend, self.bf16)
        return f"{name}, {self.encoding} encoding" if self.encoding else name


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What was taken, and why. median_ms: of every candidate, by its label. versions: of the backends."""

    backend: str
    encoding: str | None
    bf16: bool
    median_ms: Mapping[str, float]
    runs: int
    threads: int
    machine: str
    versions: Mapping[str, str]


def candidates_for(graphs: Mapping[str | None, Path], bf16: bool = False) -> list[Candidate]:
    """Every installed backend on every file. graphs: by the encoding of their INT8, None for a graph without.

    bf16: also in bfloat16, where the CPU has it. Raises MissingExtraError if there is no CPU backend.
    """
    backends = [backend for backend in CPU_BACKENDS if installed(backend)]
    if not backends:
        raise MissingExtraError(DEFAULT_BACKEND, "cpu")
    return [
        Candidate(backend, encoding, half, graph)
        for backend in backends
        for half in ((False, True) if bf16 and backend in BF16_BACKENDS and _has_bf16() else (False,))
        for encoding, graph in graphs.items()
    ]


def choose_backend(
    candidates: Sequence[Candidate],
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    threads: int | None = None,
    runs: int = 15,
) -> BackendChoice:
    """Run all candidates in turn and take one by ``pick``. feeds: by input name, None for made-up ones.

    Raises InputError without candidates, and what opening and running them raises: one that fails is not passed over.
    """
    if not candidates or runs < 1 or len({c.label for c in candidates}) < len(candidates):
        names = "; ".join(c.label for c in candidates) or "none"
        raise InputError(f"expected different candidates and at least one run, got {names} and {runs} runs")
    with ExitStack() as stack:
        sessions = {
            c.label: stack.enter_context(open_session(c.graph, c.backend, SessionOptions(threads, bf16=c.bf16)))
            for c in candidates
        }
        first = next(iter(sessions.values()))
        given = example_feeds(first.specs()) if feeds is None else feeds
        samples = alternate({name: _action(s, given) for name, s in sessions.items()}, runs, WARMUP)
        used = int(getattr(first, "threads", threads or 0))
    chosen = pick(candidates, samples)
    return BackendChoice(
        chosen.backend,
        chosen.encoding,
        chosen.bf16,
        {name: median(values) for name, values in samples.items()},
        runs,
        used,
        machine(),
        versions({c.backend for c in candidates}),
    )


def pick(candidates: Sequence[Candidate], samples_ms: Mapping[str, Sequence[float]]) -> Candidate:
    """The fastest on ONNX Runtime by the median, unless another backend's fastest is clearly faster; then, unless one
    in bfloat16, which costs digits, is clearly faster than that.

    Clearly: its median is more than MARGIN lower, and it was faster in at least ROUNDS_WON of the rounds. samples_ms:
    of each candidate by its label, one of every round.
    """
    ranks = (
        [c for c in candidates if c.backend == DEFAULT_BACKEND],
        [c for c in candidates if c.backend != DEFAULT_BACKEND and not c.bf16],
        [c for c in candidates if c.bf16],
    )
    best, *others = (min(rank, key=lambda c: median(samples_ms[c.label])) for rank in ranks if rank)
    for other in others:
        if _clearly_faster(samples_ms[other.label], samples_ms[best.label]):
            best = other
    return best


def _clearly_faster(new_ms: Sequence[float], old_ms: Sequence[float]) -> bool:
    won = sum(new < old for new, old in zip(new_ms, old_ms, strict=True))
    return median(new_ms) < median(old_ms) * (1 - MARGIN) and won >= ROUNDS_WON * len(new_ms)


def example_feeds(specs: GraphContract) -> dict[str, npt.NDArray[Any]]:
    """Noise in the shapes of a graph's inputs, the same every time: what a graph takes depends on nothing else."""
    rng = np.random.default_rng(0)
    return {spec.name: _noise(spec, rng) for spec in specs.inputs}


def _noise(spec: TensorSpec, rng: np.random.Generator) -> npt.NDArray[Any]:
    # By the contract, a dynamic first axis counts prompts and a later one points.
    shape = [d if isinstance(d, int) else (PROMPTS if axis == 0 else POINTS) for axis, d in enumerate(spec.shape)]
    if spec.dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape).astype(spec.dtype)


def _action(session: Session, feeds: Mapping[str, npt.NDArray[Any]]) -> Any:
    return lambda: session.run(feeds)


def _has_bf16() -> bool:
    from edgesam_deploy.runtime.openvino import native_bf16

    return native_bf16()
