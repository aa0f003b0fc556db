"""Engine latency against a simulated device, whose every duration is known; statistics against trtexec's own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from edgesam_deploy.errors import BackendError, InputError
from edgesam_deploy.measure.engine_latency import (
    EngineLatency,
    EngineLatencyOptions,
    Summary,
    export_times,
    measure_engine,
)
from edgesam_deploy.measure.latency import percentile, summarize

QUICK = EngineLatencyOptions(warmup_ms=0, duration_s=0, iterations=10)


@dataclass
class Machine:
    """A host and a GPU with one time, in milliseconds; work on a stream begins when all before it is done.

    Reading an event before it has happened is an error, as on a GPU; so are leaks, which ``left`` counts.
    """

    now_ms: float = 0.0
    busy_until_ms: float = 0.0
    events: dict[int, float | None] = field(default_factory=dict)
    streams: set[int] = field(default_factory=set)
    made: int = 0
    queries: int = 0
    waits: int = 0

    def clock(self) -> float:
        return self.now_ms / 1e3

    def work(self, ms: float) -> None:
        self.busy_until_ms = max(self.busy_until_ms, self.now_ms) + ms

    def stream_create(self) -> int:
        self.made += 1
        self.streams.add(self.made)
        return self.made

    def stream_synchronize(self, stream: int) -> None:
        assert stream in self.streams
        self.now_ms = max(self.now_ms, self.busy_until_ms)

    def stream_destroy(self, stream: int) -> None:
        self.streams.remove(stream)

    def event_create(self) -> int:
        self.made += 1
        self.events[self.made] = None
        return self.made

    def event_record(self, event: int, stream: int) -> None:
        assert stream in self.streams
        assert event in self.events
        self.events[event] = max(self.busy_until_ms, self.now_ms)

    def event_query(self, event: int) -> bool:
        self.queries += 1
        self.now_ms += 0.001
        return self._at(event) <= self.now_ms

    def event_synchronize(self, event: int) -> None:
        self.waits += 1
        self.now_ms = max(self.now_ms, self._at(event))

    def elapsed_ms(self, start: int, end: int) -> float:
        assert max(self._at(start), self._at(end)) <= self.now_ms, "read before it happened"
        return self._at(end) - self._at(start)

    def event_destroy(self, event: int) -> None:
        del self.events[event]

    @property
    def left(self) -> int:
        return len(self.events) + len(self.streams)

    def _at(self, event: int) -> float:
        at = self.events[event]
        assert at is not None, "an event that was never recorded"
        return at


@dataclass
class Engine:
    """Takes the given milliseconds per part; compute_ms may be a function of the number of the query, from 0.

    enqueue_ms and start_copy_ms are the host's, to launch the kernels and to start a copy.
    """

    machine: Machine
    h2d_ms: float = 1.0
    compute_ms: float | Callable[[int], float] = 4.0
    d2h_ms: float = 0.5
    enqueue_ms: float = 0.25
    start_copy_ms: float = 0.0
    cuda_graph: bool = False
    calls: list[str] = field(default_factory=list)

    def copy_inputs(self, stream: int) -> None:
        self.calls.append("inputs")
        self.machine.now_ms += self.start_copy_ms
        self.machine.work(self.h2d_ms)

    def enqueue(self, stream: int) -> None:
        # The first enqueue is the preparation's, before queries are counted.
        number = self.calls.count("enqueue") - 1
        self.calls.append("enqueue")
        self.machine.now_ms += self.enqueue_ms
        self.machine.work(self.compute_ms(number) if callable(self.compute_ms) else self.compute_ms)

    def copy_outputs(self, stream: int) -> None:
        self.calls.append("outputs")
        self.machine.now_ms += self.start_copy_ms
        self.machine.work(self.d2h_ms)


def measured(options: EngineLatencyOptions = QUICK, **engine: object) -> EngineLatency:
    machine = Machine()
    timed = Engine(machine, cuda_graph=options.cuda_graph, **engine)  # type: ignore[arg-type]
    result = measure_engine(machine, timed, options, machine.clock)
    assert machine.left == 0
    return result


def constant(ms: float) -> Summary:
    return Summary(ms, ms, ms, ms, ms, ms, ms, 0.0)


def near(summary: Summary | None, ms: float) -> bool:
    assert summary is not None
    return all(getattr(summary, n) == pytest.approx(getattr(constant(ms), n), abs=1e-6) for n in summary.__slots__)


def test_each_part_is_what_the_device_took() -> None:
    result = measured()
    assert near(result.h2d, 1.0)
    assert near(result.d2h, 0.5)
    assert near(result.enqueue, 0.25)
    assert near(result.latency, 5.5)
    assert (result.streams, result.options, result.warnings) == (1, QUICK, ())


def test_an_engine_that_waits_for_its_launch_counts_the_wait_as_compute_as_trtexec_does() -> None:
    """On an idle device the kernels come 0.25 ms after the event before them; behind another query they do not."""
    alone = measured(replace(QUICK, overlap=False), h2d_ms=0.0)
    assert near(alone.gpu_compute, 4.25)
    ahead = measured(QUICK, h2d_ms=0.0)
    assert [q.compute_ms for q in ahead.samples] == pytest.approx([4.25] + [4.0] * (len(ahead.samples) - 1))


def test_starting_the_copies_is_not_enqueue_time_but_end_to_end() -> None:
    result = measured(replace(QUICK, overlap=False), start_copy_ms=0.125)
    assert near(result.enqueue, 0.25)
    # The device waits for the host once, before the first copy; the rest is hidden behind the work under way.
    assert near(result.end_to_end, 0.125 + 5.5)


def test_a_device_without_time_is_refused() -> None:
    with pytest.raises(BackendError, match="CUDA's events show no time between 11 queries"):
        measured(h2d_ms=0.0, compute_ms=0.0, d2h_ms=0.0, enqueue_ms=0.0)


@pytest.mark.parametrize(
    ("overlap", "queries", "wall_ms", "throughput_hz"),
    [
        # One stream, always full: 1 + 4 + 0.5 ms a query, one more than asked for because it was enqueued ahead.
        (True, 11, 11 * 5.5, 1000 / 5.5),
        # Nothing ahead, and a copy that hides the launch: the same. Only the host's own time could lie between.
        (False, 10, 10 * 5.5, 1000 / 5.5),
    ],
)
def test_throughput_is_queries_over_the_time_from_the_first_to_the_last(
    overlap: bool, queries: int, wall_ms: float, throughput_hz: float
) -> None:
    result = measured(replace(QUICK, overlap=overlap))
    assert result.queries == len(result.samples) == queries
    assert result.wall_s == pytest.approx(wall_ms / 1e3)
    assert result.throughput_hz == pytest.approx(throughput_hz)
    assert result.total_gpu_compute_s == pytest.approx(queries * 4.0 / 1e3)


def test_end_to_end_is_from_the_first_call_to_the_known_answer() -> None:
    assert near(measured(replace(QUICK, overlap=False)).end_to_end, 5.5)
    ahead = measured().samples
    assert ahead[0].end_to_end_ms == pytest.approx(5.5)
    # Called when the query before it had just been enqueued or answered: two queries long.
    assert [q.end_to_end_ms for q in ahead[2:]] == pytest.approx([11.0] * (len(ahead) - 2))


def test_without_transfers_nothing_is_copied_but_once_before() -> None:
    machine = Machine()
    engine = Engine(machine)
    result = measure_engine(machine, engine, replace(QUICK, transfers=False), machine.clock)
    assert engine.calls == ["inputs"] + ["enqueue"] * (1 + result.queries)
    assert (result.h2d, result.d2h) == (None, None)
    assert result.latency == result.gpu_compute
    assert result.throughput_hz == pytest.approx(1000 * 11 / (11 * 4.0 + 0.25))


@pytest.mark.parametrize(
    ("warmup_ms", "duration_s", "iterations", "warmup_queries", "queries"),
    [
        # Kernels start 1 ms after a query, which is 5.5 ms long: at 1, 6.5, 12, 17.5, 23, 28.5, ...
        (0, 0.0, 1, 0, 2),  # one, and the one enqueued ahead of its answer
        (0, 0.0, 10, 0, 11),
        (12, 0.0, 10, 2, 11),  # the third starts as the warm-up ends, and counts
        (12.1, 0.0, 10, 3, 11),
        (0, 0.1, 1, 0, 20),  # 1 + 5.5 * 18 = 100: the nineteenth starts as the time is up
        (10, 0.1, 1, 2, 20),  # time counts from the end of the warm-up: 1 + 5.5 * 20 = 111 is past 110
        (10, 0.1, 50, 2, 51),  # both must be reached
    ],
)
def test_it_runs_until_the_duration_and_the_iterations_are_reached(
    warmup_ms: float, duration_s: float, iterations: int, warmup_queries: int, queries: int
) -> None:
    result = measured(EngineLatencyOptions(warmup_ms, duration_s, iterations))
    assert (result.warmup_queries, result.queries) == (warmup_queries, queries)


def test_the_warm_up_is_left_out_of_every_figure() -> None:
    slow_first = measured(EngineLatencyOptions(50, 0, 10), compute_ms=lambda n: 40.0 if n < 2 else 4.0)
    assert slow_first.warmup_queries == 2
    assert near(slow_first.gpu_compute, 4.0)
    assert slow_first.throughput_hz == pytest.approx(1000 / 5.5)


@pytest.mark.parametrize(("spin_wait", "queries", "waits"), [(False, 0, 11), (True, 5000, 0)])
def test_spinning_asks_and_never_sleeps(spin_wait: bool, queries: int, waits: int) -> None:
    machine = Machine()
    measure_engine(machine, Engine(machine), replace(QUICK, spin_wait=spin_wait), machine.clock)
    assert machine.queries >= queries
    assert (machine.queries > 0) is spin_wait
    assert machine.waits == waits


def test_a_failing_engine_leaves_nothing_behind() -> None:
    machine = Machine()

    def fail(number: int) -> float:
        if number == 3:
            raise RuntimeError("lost")
        return 4.0

    with pytest.raises(RuntimeError, match="lost"):
        measure_engine(machine, Engine(machine, compute_ms=fail), QUICK, machine.clock)
    assert machine.left == 0


# Thresholds as in printEpilog: enqueue > 0.8 compute, copies >= compute, cv > 2.5 %.
@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [
        ({"enqueue_ms": 3.2, "h2d_ms": 3.9}, QUICK, []),
        (
            {"enqueue_ms": 3.3, "h2d_ms": 3.9},
            QUICK,
            [
                "throughput may be bound by enqueue time (median 3.3 ms) rather than GPU compute (4 ms): "
                "a CUDA graph may help"
            ],
        ),
        (
            {"enqueue_ms": 3.3, "h2d_ms": 3.9},
            replace(QUICK, cuda_graph=True),
            [
                "throughput may be bound by enqueue time (median 3.3 ms) rather than GPU compute (4 ms): "
                "the host is too slow for this engine"
            ],
        ),
        ({"h2d_ms": 3.9, "d2h_ms": 3.9}, QUICK, []),
        (
            {"h2d_ms": 4.1, "d2h_ms": 4.1},
            QUICK,
            [
                "throughput may be bound by host-to-device transfers (median 4.1 ms) rather than GPU compute (4 ms): "
                "measure without transfers, or keep tensors on the device",
                "throughput may be bound by device-to-host transfers (median 4.1 ms) rather than GPU compute (4 ms): "
                "measure without transfers, or keep tensors on the device",
            ],
        ),
        ({"h2d_ms": 4.1, "d2h_ms": 4.1}, replace(QUICK, transfers=False), []),
        ({"compute_ms": lambda n: 4.0 + 0.095 * (-1) ** n}, replace(QUICK, overlap=False), []),
        (
            {"compute_ms": lambda n: 4.0 + 0.2 * (-1) ** n},
            replace(QUICK, overlap=False),
            ["GPU compute time is unstable, its coefficient of variance is 5.0%: lock the clocks, or wait by spinning"],
        ),
        (
            {"compute_ms": lambda n: 4.0 + 0.2 * (-1) ** n},
            replace(QUICK, overlap=False, spin_wait=True),
            ["GPU compute time is unstable, its coefficient of variance is 5.0%: lock the clocks"],
        ),
    ],
)
def test_warnings_are_trtexecs(engine: dict[str, object], options: EngineLatencyOptions, expected: list[str]) -> None:
    assert list(measured(options, **engine).warnings) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_ms": -1}, "warmup_ms must be a number from 0 on, got -1"),
        ({"warmup_ms": float("nan")}, "warmup_ms must be a number from 0 on, got nan"),
        ({"duration_s": -1}, "duration_s must be a number from 0 on, got -1"),  # trtexec: without an end
        ({"duration_s": "3"}, "duration_s must be a number from 0 on, got '3'"),
        ({"iterations": 0}, "iterations must be a whole number from 1 on, got 0"),
        ({"iterations": 2.5}, "iterations must be a whole number from 1 on, got 2.5"),
    ],
)
def test_options_that_cannot_be_met_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        EngineLatencyOptions(**change)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options_graph", "engine_graph", "message"),
    [
        (
            True,
            False,
            "the options are for an engine launched as a CUDA graph, this one is launched kernel by kernel: open it "
            "with cuda_graph=True",
        ),
        (
            False,
            True,
            "the options are for an engine launched kernel by kernel, this one is launched as a CUDA graph: open it "
            "with cuda_graph=False",
        ),
    ],
)
def test_a_result_cannot_say_graph_where_there_is_none(options_graph: bool, engine_graph: bool, message: str) -> None:
    machine = Machine()
    with pytest.raises(InputError) as caught:
        measure_engine(machine, Engine(machine, cuda_graph=engine_graph), replace(QUICK, cuda_graph=options_graph))
    assert str(caught.value) == message
    assert machine.made == 0


# Defaults: samples/common/sampleOptions.h of github.com/NVIDIA/TensorRT, commits 84dd6ed1 (10.3) and 82d1dca8 (11.1);
# the flags of either: samples/common/sampleOptions.cpp.
@pytest.mark.parametrize(
    ("major", "transfers", "cuda_graph", "spin_wait", "flags_of_the_other"),
    [
        (10, True, False, False, "--includeDataTransfers --noCudaGraph --noSpinWait"),
        (11, False, True, True, "--noDataTransfers --useCudaGraph --useSpinWait"),
    ],
)
def test_the_two_trtexecs(
    major: int, transfers: bool, cuda_graph: bool, spin_wait: bool, flags_of_the_other: str
) -> None:
    options = EngineLatencyOptions.like_trtexec(major)
    assert (options.warmup_ms, options.duration_s, options.iterations) == (200, 3, 10)
    assert (options.transfers, options.cuda_graph, options.spin_wait) == (transfers, cuda_graph, spin_wait)
    assert options.trtexec_flags(major) == "--warmUp=200 --duration=3 --iterations=10"
    assert options.trtexec_flags(21 - major) == f"--warmUp=200 --duration=3 --iterations=10 {flags_of_the_other}"
    assert replace(options, overlap=False).trtexec_flags(major).endswith(" --exposeDMA")


def test_other_trtexecs_are_not_known() -> None:
    with pytest.raises(InputError, match="known for TensorRT 10 and 11, got 9"):
        EngineLatencyOptions.like_trtexec(9)


# In this order in exportJSONTrace:
# https://github.com/NVIDIA/TensorRT/blob/82d1dca801c8318a5605399d5240780d0679e4e1/samples/common/sampleReporting.cpp
EXPORTED = ["startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs"]
EXPORTED += ["startD2hMs", "endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs"]


def test_exported_times_are_trtexecs() -> None:
    rows = json.loads(json.dumps(export_times(measured())))
    assert [list(row) for row in rows] == [EXPORTED] * 11
    # The second query was enqueued right after the first; its copy waits for the first query's end at 5.5 ms.
    expected = (0.25, 0.5, 5.5, 6.5, 6.5, 10.5, 10.5, 11.0, 1.0, 4.0, 0.5, 5.5)
    assert list(rows[1].values()) == pytest.approx(expected)


def test_exported_times_without_transfers_have_empty_copies_at_the_kernels() -> None:
    rows = export_times(measured(replace(QUICK, transfers=False)))
    for row in rows:
        assert row["startH2dMs"] == row["endH2dMs"] == row["startComputeMs"]
        assert row["startD2hMs"] == row["endD2hMs"] == row["endComputeMs"]
        assert row["latencyMs"] == row["computeMs"]


# Indices printed by a C++ program of findPercentile's own expression (float, g++ 12, -O2):
# github.com/NVIDIA/TensorRT samples/common/sampleReporting.cpp. By hand: n - 1 - int((1 - p / 100) n).
@pytest.mark.parametrize(
    ("count", "p0", "p50", "p90", "p95", "p99", "p100"),
    [
        (1, 0, 0, 0, 0, 0, 0),
        (2, 0, 0, 1, 1, 1, 1),
        (10, 0, 4, 8, 9, 9, 9),  # 0.1 * 10 is 1 in float, and 0.9999999999999998 in double
        (19, 0, 9, 17, 18, 18, 18),
        (20, 0, 9, 17, 18, 19, 19),
        (40, 0, 19, 35, 37, 39, 39),
        (100, 0, 49, 89, 94, 99, 99),  # 0.01 * 100 is 0.999999 in float: p99 is the largest
        (101, 0, 50, 90, 95, 99, 100),
        (200, 0, 99, 179, 189, 198, 199),
        (300, 0, 149, 269, 284, 297, 299),
        (1000, 0, 499, 899, 949, 990, 999),
        (3000, 0, 1499, 2699, 2849, 2970, 2999),
    ],
)
def test_percentiles_are_trtexecs(count: int, p0: int, p50: int, p90: int, p95: int, p99: int, p100: int) -> None:
    samples = [float(i) for i in range(count)]
    found = [percentile(samples, p) for p in (0, 50, 90, 95, 99, 100)]
    assert found == [p0, p50, p90, p95, p99, p100]


@pytest.mark.parametrize("percent", [-1, 100.5, float("nan")])
def test_percentiles_lie_within_a_hundred(percent: float) -> None:
    with pytest.raises(InputError, match="a percentile must be within 0 and 100, got "):
        percentile([1.0], percent)


def test_a_summary_by_hand() -> None:
    """Deviations from the mean 4: 3, 1, 1, 3 -> variance 20 / 4 = 5, by the population as trtexec has it."""
    summary = summarize([7.0, 1.0, 5.0, 3.0])
    assert summary == Summary(1.0, 7.0, 4.0, 4.0, 7.0, 7.0, 7.0, pytest.approx(5**0.5 / 4))  # type: ignore[arg-type]
    assert summarize([0.0, 0.0]) == constant(0.0)
