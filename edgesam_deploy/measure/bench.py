"""Everything that is timed about one bundle on one machine, with what the times depend on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgesam_deploy.bundle import ENGINE_BACKENDS, Bundle
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.clocks import Clocks, read_clocks
from edgesam_deploy.measure.engine_latency import EngineLatency, EngineLatencyOptions, measure_engine
from edgesam_deploy.measure.latency import LatencyResult, Summary, measure_latency
from edgesam_deploy.measure.pipeline import PipelineOptions, frames_per_s, measure_pipeline
from edgesam_deploy.measure.power import PowerResult, PowerSampler
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import check_prompts

# Shorter than this, a power reading every tenth of a second says little.
POWER_S = 3.0


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """runs, warmup: of parts and pipeline. cuda: the seam's implementation. engine: how engines are timed."""

    runs: int = 50
    warmup: int = 10
    threads: int | None = None
    cuda: str = "ctypes"
    engine: EngineLatencyOptions = field(default_factory=EngineLatencyOptions)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """parts: a prediction taken apart, by the host's clock. pipeline: what an application waits for. clocks: read after
    the runs, when they are warm. power: of set_image and predict in a loop, None where power_note says why. engines: by
    CUDA events, None where the backend runs no engines. device_memory_bytes: of both engines' contexts and buffers.
    """

    parts: LatencyResult
    pipeline: Mapping[str, Summary]
    camera_fps: float
    clocks: Clocks
    power: PowerResult | None
    power_note: str | None
    engines: Mapping[str, EngineLatency] | None
    device_memory_bytes: int | None


def bench(
    bundle: Bundle,
    image_path: Path,
    options: BenchOptions,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> BenchResult:
    """Measure a bundle on one image file and one click. Raises what opening the bundle and reading the image raise."""
    image = read_image(image_path)
    how = (options.threads, options.cuda, options.engine.cuda_graph)
    parts = measure_latency(bundle, image, options.runs, options.warmup, options.threads, progress, *how[1:])
    on_gpu = bundle.backend in ENGINE_BACKENDS
    with bundle.open(*how) as predictor:
        pipeline = measure_pipeline(predictor, image, image_path, PipelineOptions(options.runs, options.warmup))
        gpu = _bus_id(predictor) if on_gpu else None
        power, note = _power(predictor, image, gpu)
        clocks = read_clocks() if gpu is None else read_clocks(gpu)
        memory = _device_memory(predictor) if on_gpu else None
    engines = None
    if on_gpu:
        # As trtexec, which knows one engine only: the embedding is copied to the host, and to the device again.
        with bundle.open(*how, embedding_on_device=False) as predictor:
            engines = _engines(predictor, image, options.engine)
    return BenchResult(parts, pipeline, frames_per_s(pipeline["camera"]), clocks, power, note, engines, memory)


def _bus_id(predictor: Predictor) -> str:
    from edgesam_deploy.runtime.tensorrt import TensorRTSession

    session = predictor.encoder
    return session.cuda.pci_bus_id() if isinstance(session, TensorRTSession) else ""


def _power(
    predictor: Predictor, image: npt.NDArray[np.uint8], gpu: str | None
) -> tuple[PowerResult | None, str | None]:
    """Power while predictions follow each other, and why there is none. gpu: its PCI bus id, None for the CPU."""
    height, width = image.shape[:2]
    with PowerSampler(gpu=gpu) as sampler:
        if sampler.reason is not None:
            return None, sampler.reason
        count, start = 0, time.monotonic()
        while time.monotonic() - start < POWER_S:
            predictor.set_image(image)
            predictor.predict([[width / 2, height / 2]], [1], multimask_output=False)
            count += 1
        end = time.monotonic()
    result = sampler.result(start, end, count)
    return result, None if result is not None else sampler.reason


def _engines(
    predictor: Predictor, image: npt.NDArray[np.uint8], options: EngineLatencyOptions
) -> dict[str, EngineLatency]:
    """Encoder and decoder by CUDA events, one click; each with all its inputs and outputs copied, if copies count.

    The decoder is launched kernel by kernel, whatever the options.
    """
    from edgesam_deploy.runtime.tensorrt import TensorRTSession

    results = {}
    hw = (image.shape[0], image.shape[1])
    predictor.set_image(image)
    feeds = {
        "encoder": predictor.preprocess(image),
        "decoder": predictor.decoder_feeds(check_prompts([[hw[1] / 2, hw[0] / 2]], [1], None, hw)),
    }
    # The decoder first: the encoder's next run overwrites the embedding it is fed.
    for name in ("decoder", "encoder"):
        session = getattr(predictor, name)
        if isinstance(session, TensorRTSession):
            session.stage(feeds[name])
            own = options if name == "encoder" else replace(options, cuda_graph=False)
            results[name] = measure_engine(session.cuda, session, own)
    return dict(sorted(results.items(), reverse=True))


def _device_memory(predictor: Predictor) -> int:
    return sum(getattr(s, "device_memory_bytes", 0) for s in (predictor.encoder, predictor.decoder))
