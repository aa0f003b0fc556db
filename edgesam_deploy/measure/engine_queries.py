"""Queries of an engine run one after another on one stream, timed by CUDA events: what ``engine_latency`` sums up.

CUDA and the engine come in as two protocols, so that nothing here needs a GPU to be tested. The order of events and
calls, the warm-up and the end follow trtexec: IterationBase and inferenceLoop in github.com/NVIDIA/TensorRT,
samples/common/sampleInference.cpp, alike in 10.3 and 11.1 but for its three streams where here is one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from edgesam_deploy.errors import InputError

# major version -> transfers, cuda_graph, spin_wait: what trtexec does unless told otherwise. The same repository's
# samples/common/sampleOptions.h, in 10.3 to 10.16 and in 11.0 and 11.1.
TRTEXEC_DEFAULTS = {10: (True, False, False), 11: (False, True, True)}


class Events(Protocol):
    """What is needed of CUDA; ``runtime.cuda.Cuda`` has it. Streams and events are integers.

    ``event_synchronize`` should block the thread (events made with cudaEventBlockingSync), as trtexec's do.
    """

    def stream_create(self) -> int: ...

    def stream_synchronize(self, stream: int) -> None: ...

    def stream_destroy(self, stream: int) -> None: ...

    def event_create(self) -> int: ...

    def event_record(self, event: int, stream: int) -> None: ...

    def event_query(self, event: int) -> bool:
        """Whether all work before the event is done."""

    def event_synchronize(self, event: int) -> None: ...

    def elapsed_ms(self, start: int, end: int) -> float: ...

    def event_destroy(self, event: int) -> None: ...


class Timed(Protocol):
    """The thing that is measured: one query in three parts, each only enqueued on the stream."""

    @property
    def cuda_graph(self) -> bool:
        """Whether ``enqueue`` launches a recorded CUDA graph."""

    def copy_inputs(self, stream: int) -> None: ...

    def enqueue(self, stream: int) -> None:
        """Launch the kernels, or the graph recorded of them. The first call may record it."""

    def copy_outputs(self, stream: int) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineLatencyOptions:
    """How to measure. The defaults are those of trtexec 10.

    Queries run until ``duration_s`` have passed after the warm-up and ``iterations`` are complete, whichever is later.
    transfers: copy inputs and outputs with every query. cuda_graph: the kernels are launched as one graph. spin_wait:
    the host asks again and again instead of sleeping until a query is done. overlap: enqueue one query ahead; False is
    trtexec's --exposeDMA.
    """

    warmup_ms: float = 200.0
    duration_s: float = 3.0
    iterations: int = 10
    transfers: bool = True
    cuda_graph: bool = False
    spin_wait: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("warmup_ms", "duration_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise InputError(f"{name} must be a number from 0 on, got {value!r}")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise InputError(f"iterations must be a whole number from 1 on, got {self.iterations!r}")

    @classmethod
    def like_trtexec(cls, major: int) -> EngineLatencyOptions:
        """The defaults of trtexec 10 (transfers, no graph, no spin wait) or 11 (the opposite of each)."""
        if major not in TRTEXEC_DEFAULTS:
            known = " and ".join(map(str, TRTEXEC_DEFAULTS))
            raise InputError(f"trtexec's defaults are known for TensorRT {known}, got {major}")
        transfers, cuda_graph, spin_wait = TRTEXEC_DEFAULTS[major]
        return cls(transfers=transfers, cuda_graph=cuda_graph, spin_wait=spin_wait)

    def trtexec_flags(self, major: int) -> str:
        """The options that make trtexec of a major version, 10 or 11, measure as this does."""
        default = self.like_trtexec(major)
        switches = {
            "transfers": {True: "--includeDataTransfers", False: "--noDataTransfers"},
            "cuda_graph": {True: "--useCudaGraph", False: "--noCudaGraph"},
            "spin_wait": {True: "--useSpinWait", False: "--noSpinWait"},
            "overlap": {False: "--exposeDMA"},
        }
        flags = [f"--warmUp={self.warmup_ms:g}", f"--duration={self.duration_s:g}", f"--iterations={self.iterations}"]
        flags += [way[getattr(self, n)] for n, way in switches.items() if getattr(self, n) != getattr(default, n)]
        return " ".join(flags)


@dataclass(frozen=True, slots=True)
class Query:
    """One query: starts in milliseconds since the measurement began, and durations.

    Enqueue by the host's clock, the others by CUDA events. Durations are between neighbouring events: float32, in which
    CUDA gives them, is coarse for the difference of two times that are far from the start. end_to_end_ms: by the host's
    clock from its first call until it knows the query complete; with overlap this includes the query ahead.
    """

    start_enqueue_ms: float
    enqueue_ms: float
    start_h2d_ms: float
    h2d_ms: float
    start_compute_ms: float
    compute_ms: float
    start_d2h_ms: float
    d2h_ms: float
    end_to_end_ms: float

    @property
    def latency_ms(self) -> float:
        return self.h2d_ms + self.compute_ms + self.d2h_ms


def run_queries(cuda: Events, timed: Timed, options: EngineLatencyOptions, clock: Callable[[], float]) -> list[Query]:
    """All queries, those of the warm-up included. clock: the host's, in seconds."""
    with ExitStack() as stack:
        return _Run(cuda, timed, options, clock, stack).queries()


@dataclass(slots=True)
class _Slot:
    """A query under way: its events, start and end of each part, and the host's clock at its calls, in seconds."""

    h2d: tuple[int, int]
    compute: tuple[int, int]
    d2h: tuple[int, int]
    called_s: float = 0.0
    enqueue_s: tuple[float, float] = (0.0, 0.0)


class _Run:
    """One stream, and the events of as many queries as may be under way."""

    def __init__(
        self, cuda: Events, timed: Timed, options: EngineLatencyOptions, clock: Callable[[], float], stack: ExitStack
    ) -> None:
        self.cuda, self.timed, self.options, self.clock = cuda, timed, options, clock
        self.stream = cuda.stream_create()
        stack.callback(cuda.stream_destroy, self.stream)

        def event() -> int:
            created = cuda.event_create()
            stack.callback(cuda.event_destroy, created)
            return created

        self.slots = [
            _Slot((event(), event()), (event(), event()), (event(), event())) for _ in range(1 + options.overlap)
        ]
        self.origin = event()
        # As trtexec before it starts: without transfers the inputs must be on the device, and a graph is recorded now.
        timed.copy_inputs(self.stream)
        timed.enqueue(self.stream)
        cuda.stream_synchronize(self.stream)
        self.origin_s = clock()
        cuda.event_record(self.origin, self.stream)

    def queries(self) -> list[Query]:
        """All queries, warm-up included, until both the duration and the iterations after it are reached."""
        until_ms = self.options.warmup_ms + self.options.duration_s * 1e3
        free, waiting = deque(self.slots), deque[_Slot]()
        done: list[Query] = []
        counted, newest_ms = 0, 0.0
        while counted < self.options.iterations or newest_ms < until_ms:
            slot = free.popleft()
            self.launch(slot)
            waiting.append(slot)
            if free:
                continue
            slot = waiting.popleft()
            done.append(self.finish(slot))
            free.append(slot)
            newest_ms = done[-1].start_compute_ms
            counted += newest_ms >= self.options.warmup_ms
        return done + [self.finish(slot) for slot in waiting]

    def launch(self, slot: _Slot) -> None:
        slot.called_s = self.clock()
        if self.options.transfers:
            self._between(slot.h2d, self.timed.copy_inputs)
        self.cuda.event_record(slot.compute[0], self.stream)
        started_s = self.clock()
        self.timed.enqueue(self.stream)
        slot.enqueue_s = (started_s, self.clock())
        self.cuda.event_record(slot.compute[1], self.stream)
        if self.options.transfers:
            self._between(slot.d2h, self.timed.copy_outputs)

    def finish(self, slot: _Slot) -> Query:
        """Wait for a launched query and read its events; the slot may then be used again."""
        # Without copies trtexec reports them as empty, at the start and at the end of the kernels.
        h2d = slot.h2d if self.options.transfers else (slot.compute[0], slot.compute[0])
        d2h = slot.d2h if self.options.transfers else (slot.compute[1], slot.compute[1])
        if self.options.spin_wait:
            while not self.cuda.event_query(d2h[1]):
                pass
        else:
            self.cuda.event_synchronize(d2h[1])
        known_s = self.clock()
        enqueue_start_s, enqueue_end_s = slot.enqueue_s
        return Query(
            start_enqueue_ms=(enqueue_start_s - self.origin_s) * 1e3,
            enqueue_ms=(enqueue_end_s - enqueue_start_s) * 1e3,
            start_h2d_ms=self._since_start(h2d[0]),
            h2d_ms=self._length(h2d),
            start_compute_ms=self._since_start(slot.compute[0]),
            compute_ms=self._length(slot.compute),
            start_d2h_ms=self._since_start(d2h[0]),
            d2h_ms=self._length(d2h),
            end_to_end_ms=(known_s - slot.called_s) * 1e3,
        )

    def _between(self, events: tuple[int, int], part: Callable[[int], None]) -> None:
        self.cuda.event_record(events[0], self.stream)
        part(self.stream)
        self.cuda.event_record(events[1], self.stream)

    def _since_start(self, event: int) -> float:
        return self.cuda.elapsed_ms(self.origin, event)

    def _length(self, events: tuple[int, int]) -> float:
        return self.cuda.elapsed_ms(*events) if events[0] != events[1] else 0.0
