"""Latency of what an application does with a bundle, by the host's clock: the same on every backend.

``engine_latency`` times an engine alone; these figures hold everything around it: reading, resizing, copies, waiting,
masks at the image's own size. One query at a time, each answered before the next is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import InputError
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.latency import Summary, summarize
from edgesam_deploy.predictor import Predictor


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """runs: timed runs of each part. warmup: runs of each before that are not counted."""

    runs: int = 50
    warmup: int = 10

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number from {least} on, got {value!r}")


def measure_pipeline(
    predictor: Predictor,
    image: npt.NDArray[np.uint8],
    jpeg_path: Path,
    options: PipelineOptions | None = None,
    frames: Sequence[npt.NDArray[np.uint8]] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Summary]:
    """Time the four things an application waits for, one click in the middle of the image each.

    set_image: image (H,W,3) uint8 RGB in memory -> embedding. predict: click -> one mask (H,W) of the current image.
    end_to_end: JPEG file -> mask: read, decode, set_image, predict with its upscaling. camera: one frame in memory ->
    mask, over ``frames`` in turn, or over ``image`` alone; frames may differ in size. The predictor keeps the last
    one. clock: in seconds. Raises ImageError for a file or an image that cannot be used.
    """
    options = options or PipelineOptions()
    count = options.warmup + options.runs
    stream = list(islice(cycle(frames or (image,)), count))

    def mask_of(pixels: npt.NDArray[np.uint8]) -> None:
        predictor.set_image(pixels)
        _click(predictor, pixels)

    parts: dict[str, Callable[[int], object]] = {
        "set_image": lambda _: predictor.set_image(image),
        "predict": lambda _: _click(predictor, image),
        "end_to_end": lambda _: mask_of(read_image(jpeg_path)),
        "camera": lambda run: mask_of(stream[run]),
    }
    return {name: _time(part, count, options.warmup, clock) for name, part in parts.items()}


def frames_per_s(camera: Summary) -> float:
    """Of a loop that takes the next frame when it is done with the last: 1000 / mean milliseconds."""
    return 1000.0 / camera.mean_ms


def _time(part: Callable[[int], object], count: int, warmup: int, clock: Callable[[], float]) -> Summary:
    samples_ms = []
    for run in range(count):
        started_s = clock()
        part(run)
        samples_ms.append((clock() - started_s) * 1e3)
    return summarize(samples_ms[warmup:])


def _click(predictor: Predictor, image: npt.NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    predictor.predict([[width / 2, height / 2]], [1], multimask_output=False)
