"""Latency of a bundle, encoder, decoder and what surrounds them timed apart; and the statistics of all latencies."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgesam_deploy.bundle import Bundle
from edgesam_deploy.contract import LOW_RES_MASKS
from edgesam_deploy.errors import InputError
from edgesam_deploy.masks import MASK_THRESHOLD
from edgesam_deploy.measure.memory import peak_rss_mb
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.runtime import Session

PARTS = ("pre", "encoder", "decoder", "post")


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution of milliseconds, its percentiles as trtexec picks them (``percentile``).

    cv: trtexec's coefficient of variance, the population's standard deviation over the mean, as a fraction; 0 where the
    mean is 0.
    """

    min_ms: float
    max_ms: float
    mean_ms: float
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    cv: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock times in milliseconds, percentiles interpolated as numpy does. throughput_hz: 1000 / mean.

    cv: standard deviation over mean.
    """

    min_ms: float
    mean_ms: float
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    throughput_hz: float
    cv: float


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """pre: resize and pad; encoder, decoder: the two graphs; post: one mask to the original size; total: all four.

    One click on one image of ``image_hw``. backend, provider: each graph's where they differ. peak_rss_mb: this
    process's largest resident memory, 10^6 bytes.
    """

    bundle: str
    precision: str
    backend: str
    provider: str
    threads: int
    machine: str
    image_hw: tuple[int, int]
    warmup: int
    runs: int
    parts: dict[str, Timing]
    peak_rss_mb: float


def measure_latency(
    bundle: Bundle,
    image: npt.NDArray[np.uint8],
    runs: int,
    warmup: int,
    threads: int | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    cuda: str = "ctypes",
    cuda_graph: bool = False,
) -> LatencyResult:
    """Time ``runs`` predictions of one click in the middle of ``image`` (H,W,3), after ``warmup`` unrecorded ones."""
    if runs < 1 or warmup < 0:
        raise InputError(f"runs must be at least 1 and warmup at least 0, got {runs} and {warmup}")
    hw = (image.shape[0], image.shape[1])
    prompts = check_prompts([[hw[1] / 2, hw[0] / 2]], [1], None, hw)
    samples: dict[str, list[float]] = {name: [] for name in (*PARTS, "total")}
    with bundle.open(threads, cuda, cuda_graph) as predictor:
        predictor.set_image(image)
        decoder_feeds = predictor.decoder_feeds(prompts)
        for run in progress(range(warmup + runs)):
            marks = [time.perf_counter()]
            feeds = predictor.preprocess(image)
            marks.append(time.perf_counter())
            features = predictor.encoder.run(feeds)
            marks.append(time.perf_counter())
            low_res = predictor.decoder.run({**decoder_feeds, **features})[LOW_RES_MASKS]
            marks.append(time.perf_counter())
            _ = predictor.postprocess(low_res[0, :1], hw) > MASK_THRESHOLD
            marks.append(time.perf_counter())
            if run >= warmup:
                for name, first, last in zip(PARTS, marks, marks[1:], strict=False):
                    samples[name].append((last - first) * 1e3)
                samples["total"].append((marks[-1] - marks[0]) * 1e3)
        encoder = predictor.encoder
    return LatencyResult(
        bundle=str(bundle.path),
        precision=bundle.precision,
        backend=bundle.runs_on,
        provider=_provider(predictor.encoder, predictor.decoder),
        threads=int(getattr(encoder, "threads", threads or 0)),
        machine=machine(),
        image_hw=hw,
        warmup=warmup,
        runs=runs,
        parts={name: timing(values) for name, values in samples.items()},
        peak_rss_mb=peak_rss_mb(),
    )


def _provider(encoder: Session, decoder: Session) -> str:
    """What the sessions say that they run on."""
    providers = [str(getattr(session, "provider", type(session).__name__)) for session in (encoder, decoder)]
    return providers[0] if providers[0] == providers[1] else f"{providers[0]} (encoder), {providers[1]} (decoder)"


def summarize(samples_ms: Sequence[float]) -> Summary:
    """Statistics of a non-empty sequence of milliseconds, in any order."""
    values = np.sort(np.asarray(samples_ms, dtype=np.float64))
    mean = float(values.mean())
    return Summary(
        min_ms=float(values[0]),
        max_ms=float(values[-1]),
        mean_ms=mean,
        median_ms=float(np.median(values)),
        p90_ms=percentile(values, 90),
        p95_ms=percentile(values, 95),
        p99_ms=percentile(values, 99),
        cv=float(values.std()) / mean if mean else 0.0,
    )


def percentile(ascending: Sequence[float] | npt.NDArray[np.float64], percent: float) -> float:
    """The sample that trtexec reports: of n ascending ones, number n - 1 - int((1 - percent / 100) * n), from 0.

    Always a measured sample, never interpolated. trtexec computes this in float32, and it shows: of 10 samples p90 is
    the ninth (in float64 the tenth), of 100 samples p99 is the largest.
    Source: findPercentile in github.com/NVIDIA/TensorRT samples/common/sampleReporting.cpp, alike in 10.3 and 11.1.
    """
    if not 0 <= percent <= 100:
        raise InputError(f"a percentile must be within 0 and 100, got {percent}")
    count = len(ascending)
    excluded = int((np.float32(1) - np.float32(percent) / np.float32(100)) * np.float32(count))
    return float(ascending[max(count - 1 - excluded, 0)])


def timing(samples_ms: list[float]) -> Timing:
    """Statistics of a non-empty list of milliseconds."""
    summary = summarize(samples_ms)
    p90, p95, p99 = (float(v) for v in np.percentile(samples_ms, (90, 95, 99)))
    return Timing(
        min_ms=summary.min_ms,
        mean_ms=summary.mean_ms,
        median_ms=summary.median_ms,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        throughput_hz=1000.0 / summary.mean_ms,
        cv=summary.cv,
    )


def machine() -> str:
    """The processor's name as the system gives it, with the architecture."""
    name = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name or 'unknown processor'} ({platform.machine()})"
