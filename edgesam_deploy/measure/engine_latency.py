"""Latency of one engine as trtexec measures it, in CUDA events, so that figures here and there can be compared.

Per query, in trtexec's words: *H2D* and *D2H latency*, the copies of inputs and outputs; *GPU compute time*, the
kernels; *latency*, the sum of the three (NVIDIA's pages also call it host latency); *enqueue time*, what the host
spends to launch the kernels, by its own clock, copies not counted. *Throughput* is queries over the time from the
start of the first query to the end of the last on the device. Queries whose kernels start within the warm-up are left
out of everything.

As trtexec does, a query is enqueued before the one ahead of it is waited for, so that the GPU need not wait for the
host. trtexec copies on two further streams and so overlaps copies with kernels; **here everything is on one stream**.
Without transfers the two do the same; with them trtexec's throughput is the higher, at the same latency. Enqueue time
is this runtime's, with Python's share in it.

Sources: github.com/NVIDIA/TensorRT, samples/common/sampleReporting.cpp (printMetricExplanations, printEpilog,
exportJSONTrace) and sampleInference.cpp (IterationBase), commits 84dd6ed1 (10.3) and 82d1dca8 (11.1);
docs.nvidia.com/deeplearning/tensorrt/10.8.0/reference/command-line-programs.html, "Benchmarking Network", which counts
the calls that start the copies as enqueue time: trtexec's code does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edgesam_deploy.errors import BackendError, InputError
from edgesam_deploy.measure.engine_queries import EngineLatencyOptions, Events, Query, Timed, run_queries
from edgesam_deploy.measure.latency import Summary, summarize

__all__ = ["EngineLatency", "EngineLatencyOptions", "Events", "Query", "Timed", "export_times", "measure_engine"]

# trtexec's thresholds (printEpilog). Before 10.13.2 it called a coefficient of variance above 1 % unstable.
ENQUEUE_BOUND = 0.8
UNSTABLE_CV = 0.025


@dataclass(frozen=True, slots=True)
class EngineLatency:
    """What was measured, and how. h2d and d2h are None without transfers; ``samples`` are the queries after warm-up.

    wall_s: from the first to the last event of the samples. total_gpu_compute_s: if much less than wall_s, the GPU
    waited. warnings: trtexec's, one line each.
    """

    options: EngineLatencyOptions
    streams: int
    warmup_queries: int
    queries: int
    wall_s: float
    total_gpu_compute_s: float
    throughput_hz: float
    latency: Summary
    enqueue: Summary
    h2d: Summary | None
    gpu_compute: Summary
    d2h: Summary | None
    end_to_end: Summary
    warnings: tuple[str, ...]
    samples: tuple[Query, ...]


def measure_engine(
    cuda: Events,
    timed: Timed,
    options: EngineLatencyOptions | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> EngineLatency:
    """Measure ``timed`` on a stream of its own. options: None for the defaults. clock: the host's, in seconds.

    Raises InputError if ``timed`` launches a CUDA graph where the options say it does not, or the other way round.
    """
    options = options or EngineLatencyOptions()
    if timed.cuda_graph != options.cuda_graph:
        ways = {True: "as a CUDA graph", False: "kernel by kernel"}
        raise InputError(
            f"the options are for an engine launched {ways[options.cuda_graph]}, this one is launched "
            f"{ways[timed.cuda_graph]}: open it with cuda_graph={options.cuda_graph}"
        )
    queries = run_queries(cuda, timed, options, clock)
    samples = tuple(q for q in queries if q.start_compute_ms >= options.warmup_ms)
    return _result(options, samples, len(queries) - len(samples))


def export_times(result: EngineLatency) -> list[dict[str, float]]:
    """The samples as trtexec's --exportTimes writes them, by its names: times since the start, then durations."""
    return [
        {
            "startEnqMs": q.start_enqueue_ms,
            "endEnqMs": q.start_enqueue_ms + q.enqueue_ms,
            "startH2dMs": q.start_h2d_ms,
            "endH2dMs": q.start_h2d_ms + q.h2d_ms,
            "startComputeMs": q.start_compute_ms,
            "endComputeMs": q.start_compute_ms + q.compute_ms,
            "startD2hMs": q.start_d2h_ms,
            "endD2hMs": q.start_d2h_ms + q.d2h_ms,
            "h2dMs": q.h2d_ms,
            "computeMs": q.compute_ms,
            "d2hMs": q.d2h_ms,
            "latencyMs": q.latency_ms,
        }
        for q in result.samples
    ]


def _result(options: EngineLatencyOptions, samples: tuple[Query, ...], warmup_queries: int) -> EngineLatency:
    last = samples[-1]
    wall_s = (last.start_d2h_ms + last.d2h_ms - samples[0].start_h2d_ms) / 1e3
    if wall_s <= 0:
        raise BackendError(f"CUDA's events show no time between {len(samples)} queries; measure with a longer duration")
    enqueue = summarize([q.enqueue_ms for q in samples])
    gpu_compute = summarize([q.compute_ms for q in samples])
    h2d = summarize([q.h2d_ms for q in samples]) if options.transfers else None
    d2h = summarize([q.d2h_ms for q in samples]) if options.transfers else None
    return EngineLatency(
        options=options,
        streams=1,
        warmup_queries=warmup_queries,
        queries=len(samples),
        wall_s=wall_s,
        total_gpu_compute_s=sum(q.compute_ms for q in samples) / 1e3,
        throughput_hz=len(samples) / wall_s,
        latency=summarize([q.latency_ms for q in samples]),
        enqueue=enqueue,
        h2d=h2d,
        gpu_compute=gpu_compute,
        d2h=d2h,
        end_to_end=summarize([q.end_to_end_ms for q in samples]),
        warnings=tuple(_warnings(options, enqueue, h2d, gpu_compute, d2h)),
        samples=samples,
    )


def _warnings(
    options: EngineLatencyOptions, enqueue: Summary, h2d: Summary | None, gpu_compute: Summary, d2h: Summary | None
) -> list[str]:
    """trtexec's, by its thresholds, with the figures that gave rise to them."""
    found = []
    gpu_ms = gpu_compute.median_ms
    if enqueue.median_ms > ENQUEUE_BOUND * gpu_ms:
        cure = "the host is too slow for this engine" if options.cuda_graph else "a CUDA graph may help"
        found.append(
            f"throughput may be bound by enqueue time (median {enqueue.median_ms:.3g} ms) rather than GPU compute "
            f"({gpu_ms:.3g} ms): {cure}"
        )
    for name, copies in (("host-to-device", h2d), ("device-to-host", d2h)):
        if copies is not None and copies.median_ms >= gpu_ms:
            found.append(
                f"throughput may be bound by {name} transfers (median {copies.median_ms:.3g} ms) rather than GPU "
                f"compute ({gpu_ms:.3g} ms): measure without transfers, or keep tensors on the device"
            )
    if gpu_compute.cv > UNSTABLE_CV:
        wait = "" if options.spin_wait else ", or wait by spinning"
        found.append(
            f"GPU compute time is unstable, its coefficient of variance is {gpu_compute.cv:.1%}: lock the clocks{wait}"
        )
    return found
