"""Power during a measurement and energy per inference: tegrastats on a Jetson, NVML elsewhere.

with PowerSampler() as sampler:
    start = time.monotonic()
    ...                                         # the inferences
    end = time.monotonic()
power = sampler.result(start, end, inferences)  # None if power cannot be read here: sampler.reason says why
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.power_sources import STOP_S, Reading, Source, open_nvml_source, open_tegrastats

# How long a source may take to its first reading.
START_S = 5.0
# Below this many readings in the interval its power is a guess.
FEW_READINGS = 10
# A pause of so many times the usual one between readings is told.
LONG_GAP = 10


@dataclass(frozen=True, slots=True)
class PowerTrace:
    """Power over time. times_s: (n,) increasing, n >= 2, of ``time.monotonic``. watts: (n,).

    counter_mj: (n,) an energy counter read at the same times, or None. Where there is one, energy comes from it.
    """

    times_s: npt.NDArray[np.float64]
    watts: npt.NDArray[np.float64]
    counter_mj: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        columns = [self.times_s, self.watts, *([] if self.counter_mj is None else [self.counter_mj])]
        if self.times_s.ndim != 1 or len(self.times_s) < 2 or {c.shape for c in columns} != {self.times_s.shape}:
            raise InputError(f"a power trace needs columns of one length, at least 2, got {[c.shape for c in columns]}")
        if not all(np.isfinite(c).all() for c in columns) or (np.diff(self.times_s) <= 0).any():
            raise InputError("a power trace needs finite numbers and increasing times")


@dataclass(frozen=True, slots=True)
class PowerResult:
    """Power over an interval of ``duration_s`` seconds, from ``samples`` readings within it.

    source: "tegrastats" or "nvml". scope: what the total covers; totals of different scopes are not comparable.
    rails_w: mean per rail in watts. idle_w: what was taken off per second before the energy was divided by
    ``inferences``, None for nothing. energy_per_inference_mj: None if it is not known; notes then says why.
    """

    source: str
    scope: str
    rails_w: Mapping[str, float]
    total_mean_w: float
    total_max_w: float
    duration_s: float
    samples: int
    inferences: int | None
    idle_w: float | None
    energy_per_inference_mj: float | None
    notes: tuple[str, ...]


def energy_mj(trace: PowerTrace, start_s: float, end_s: float) -> float:
    """Energy between two times, in millijoules: trapezoids, linear between readings. InputError outside the trace."""
    times, watts = _within(trace, start_s, end_s)
    if trace.counter_mj is not None:
        first, last = np.interp((start_s, end_s), trace.times_s, trace.counter_mj)
        return float(last - first)
    return float(np.sum(np.diff(times) * (watts[1:] + watts[:-1]) / 2)) * 1e3


def energy_per_inference_mj(
    trace: PowerTrace, start_s: float, end_s: float, inferences: int, idle_w: float | None = None
) -> float:
    """Energy between two times over the number of inferences; ``idle_w`` watts are taken off first, if given."""
    if inferences < 1:
        raise InputError(f"inferences must be at least 1, got {inferences}")
    idle_mj = (idle_w or 0.0) * (end_s - start_s) * 1e3
    return (energy_mj(trace, start_s, end_s) - idle_mj) / inferences


def _within(trace: PowerTrace, start_s: float, end_s: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Times and watts of an interval: its two ends and the readings between them."""
    first, last = float(trace.times_s[0]), float(trace.times_s[-1])
    if not first <= start_s < end_s <= last:
        raise InputError(f"an interval must lie within {first:.3f}-{last:.3f} s, got {start_s:.3f}-{end_s:.3f} s")
    inner = (trace.times_s > start_s) & (trace.times_s < end_s)
    times = np.concatenate([[start_s], trace.times_s[inner], [end_s]])
    return times, np.interp(times, trace.times_s, trace.watts)


class PowerSampler:
    """Reads power in a thread while its block runs. Reading power never fails the block: see ``reason``.

    interval_ms: time between readings. gpu: which GPU, for NVML only, as ``nvml.Nvml`` takes it; None where none is at
    work. Entering waits for the first reading and leaving for one more, so that every interval within the block is
    covered.
    """

    def __init__(self, interval_ms: int = 100, gpu: int | str | None = 0) -> None:
        if interval_ms < 1:
            raise InputError(f"interval_ms must be at least 1, got {interval_ms}")
        self.reason: str | None = None
        self._interval_ms = interval_ms
        self._gpu = gpu
        self._source: Source | None = None
        self._thread = threading.Thread()
        self._changed = threading.Condition()
        self._readings: list[Reading] = []
        self._ended = False

    def __enter__(self) -> PowerSampler:
        problems = []
        openers: list[Callable[[int], Source | str]] = [open_tegrastats]
        if self._gpu is None:
            problems.append("NVML measures GPUs, and this runs on the CPU")
        else:
            openers.append(partial(open_nvml_source, gpu=self._gpu))
        for opener in openers:
            source = opener(self._interval_ms)
            if isinstance(source, str):
                problems.append(source)
            elif self._start(source):
                return self
            else:
                problems.append("; ".join([f"{source.name}: no reading of the total power", *source.notes()]))
        self.reason = "power was not measured. " + ". ".join(problems)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._source is None:
            return
        if kind is None:
            self._wait_for(time.monotonic(), 1.0 + 2 * self._interval_ms / 1e3)
        self._halt(self._source)

    def result(
        self, start_s: float, end_s: float, inferences: int | None = None, idle_w: float | None = None
    ) -> PowerResult | None:
        """Power between two times of ``time.monotonic`` within the block, after it. None: ``reason`` says why.

        inferences: how many ran in that time. idle_w: power to take off before energy is shared out among them, such as
        the ``total_mean_w`` of a block that does nothing.
        """
        if self._source is None:
            return None
        with self._changed:
            readings = [r for r in self._readings if r.total_w is not None]
        done = summarize(self._source, readings, start_s, end_s, inferences, idle_w)
        if isinstance(done, str):
            self.reason = "; ".join([f"power was not measured. {self._source.name}: {done}", *self._source.notes()])
            return None
        self.reason = None
        return done

    def _start(self, source: Source) -> bool:
        """Whether the source gives a first total; if not, it is closed again."""
        self._readings, self._ended = [], False
        self._thread = threading.Thread(target=self._follow, args=(source,), name="power", daemon=True)
        self._thread.start()
        try:
            if self._wait_for(0.0, START_S + 2 * self._interval_ms / 1e3):
                self._source = source
                return True
        finally:
            # Also on control-C: a block that was not entered is not left either.
            if self._source is None:
                self._halt(source)
        return False

    def _follow(self, source: Source) -> None:
        while (reading := source.read()) is not None:
            with self._changed:
                self._readings.append(reading)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait_for(self, time_s: float, timeout_s: float) -> bool:
        """Wait for a total read at ``time_s`` or later; False if there is none in time, or none will come."""

        def come() -> bool:
            return any(r.time_s >= time_s and r.total_w is not None for r in reversed(self._readings))

        with self._changed:
            self._changed.wait_for(lambda: self._ended or come(), timeout_s)
            return come()

    def _halt(self, source: Source) -> None:
        source.stop()
        self._thread.join(STOP_S)
        source.close()


def summarize(
    source: Source,
    readings: Sequence[Reading],
    start_s: float,
    end_s: float,
    inferences: int | None,
    idle_w: float | None,
) -> PowerResult | str:
    """The result of an interval from readings with a total; where they do not reach, a sentence that says so."""
    if len(readings) < 2:
        return f"{len(readings)} readings, at least 2 are needed"
    trace = _trace(readings)
    begin, stop = max(start_s, readings[0].time_s), min(end_s, readings[-1].time_s)
    if begin >= stop:
        return f"no readings within the {end_s - start_s:.3f} s of the measurement"
    covered = (begin, stop) == (start_s, end_s)
    samples = sum(begin <= r.time_s <= stop for r in readings)
    notes = source.notes()
    if not covered:
        notes.append(f"power is known for {stop - begin:.3f} of {end_s - start_s:.3f} s: no energy per inference")
    notes += _doubts(trace, begin, stop, samples)
    if idle_w is not None:
        notes.append(f"{idle_w:.3f} W of idle power taken off the energy per inference")
    energy = None
    if covered and inferences is not None:
        energy = energy_per_inference_mj(trace, begin, stop, inferences, idle_w)
    return PowerResult(
        source=source.name,
        scope=source.scope,
        rails_w=_rails_w(readings, begin, stop),
        total_mean_w=_mean_w(trace, begin, stop),
        total_max_w=float(_within(trace, begin, stop)[1].max()),
        duration_s=stop - begin,
        samples=samples,
        inferences=inferences,
        idle_w=idle_w,
        energy_per_inference_mj=energy,
        notes=tuple(notes),
    )


def _doubts(trace: PowerTrace, start_s: float, end_s: float, samples: int) -> list[str]:
    """What makes the power of an interval uncertain."""
    notes = []
    if samples < FEW_READINGS:
        notes.append(f"only {samples} readings in the interval: run more inferences")
    gaps = np.diff(_within(trace, start_s, end_s)[0])
    if gaps.max() > LONG_GAP * np.median(np.diff(trace.times_s)):
        notes.append(f"no readings for {gaps.max():.3f} s of the interval: power in between is a guess")
    return notes


def _rails_w(readings: Sequence[Reading], start_s: float, end_s: float) -> dict[str, float]:
    """Mean of each rail that is in every reading."""
    names = [name for name in readings[0].rails_w if all(name in r.rails_w for r in readings)]
    times = np.array([r.time_s for r in readings])
    return {n: _mean_w(PowerTrace(times, np.array([r.rails_w[n] for r in readings])), start_s, end_s) for n in names}


def _trace(readings: Sequence[Reading]) -> PowerTrace:
    counters = [r.counter_mj for r in readings if r.counter_mj is not None]
    return PowerTrace(
        times_s=np.array([r.time_s for r in readings]),
        watts=np.array([r.total_w for r in readings], dtype=np.float64),
        counter_mj=np.array(counters) if len(counters) == len(readings) else None,
    )


def _mean_w(trace: PowerTrace, start_s: float, end_s: float) -> float:
    return energy_mj(trace, start_s, end_s) / (end_s - start_s) / 1e3
