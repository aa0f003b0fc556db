"""Latency of a bundle: encoder, decoder, and what surrounds them, each timed apart."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgesam_deploy.bundle import Bundle
from edgesam_deploy.contract import IMAGE_EMBEDDINGS, LOW_RES_MASKS
from edgesam_deploy.errors import InputError
from edgesam_deploy.masks import MASK_THRESHOLD
from edgesam_deploy.prompts import check_prompts

PARTS = ("pre", "encoder", "decoder", "post")


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock times in milliseconds. throughput_hz: 1000 / mean. cv: standard deviation over mean."""

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

    One click on one image of ``image_hw``. peak_rss_mb: this process's largest resident memory, 10^6 bytes.
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
) -> LatencyResult:
    """Time ``runs`` predictions of one click in the middle of ``image`` (H,W,3), after ``warmup`` unrecorded ones."""
    if runs < 1 or warmup < 0:
        raise InputError(f"runs must be at least 1 and warmup at least 0, got {runs} and {warmup}")
    hw = (image.shape[0], image.shape[1])
    prompts = check_prompts([[hw[1] / 2, hw[0] / 2]], [1], None, hw)
    samples: dict[str, list[float]] = {name: [] for name in (*PARTS, "total")}
    with bundle.open(threads) as predictor:
        predictor.set_image(image)
        decoder_feeds = predictor.decoder_feeds(prompts)
        for run in progress(range(warmup + runs)):
            marks = [time.perf_counter()]
            feeds = predictor.preprocess(image)
            marks.append(time.perf_counter())
            embeddings = predictor.encoder.run(feeds)[IMAGE_EMBEDDINGS]
            marks.append(time.perf_counter())
            low_res = predictor.decoder.run({**decoder_feeds, IMAGE_EMBEDDINGS: embeddings})[LOW_RES_MASKS]
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
        backend=bundle.backend,
        provider=str(getattr(encoder, "provider", bundle.backend)),
        threads=int(getattr(encoder, "threads", threads or 0)),
        machine=machine(),
        image_hw=hw,
        warmup=warmup,
        runs=runs,
        parts={name: timing(values) for name, values in samples.items()},
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    )


def timing(samples_ms: list[float]) -> Timing:
    """Statistics of a non-empty list of milliseconds."""
    values = np.array(samples_ms)
    p90, p95, p99 = (float(v) for v in np.percentile(values, (90, 95, 99)))
    mean = float(values.mean())
    return Timing(
        min_ms=float(values.min()),
        mean_ms=mean,
        median_ms=float(np.median(values)),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        throughput_hz=1000.0 / mean,
        cv=float(values.std()) / mean,
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
