"""One bundle's graphs on every CPU backend, in one process and in turn: times, and what the masks are worth."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgesam_deploy.bundle import ANSWERS, GRAPHS, Bundle
from edgesam_deploy.errors import InputError, MissingExtraError
from edgesam_deploy.measure.accuracy import Answers, compare, load_answers
from edgesam_deploy.measure.accuracy import Summary as Accuracy
from edgesam_deploy.measure.latency import machine, summarize
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.runtime import CPU_BACKENDS, installed

# (backend, bf16), the first is what the others are compared with.
VARIANTS = (("onnxruntime", False), ("openvino", False), ("openvino", True))
NO_BF16 = "this CPU does not compute in bfloat16"


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """runs, warmup: of each graph on each backend. images: of the recorded ones, to measure masks on; 0 for none."""

    runs: int = 50
    warmup: int = 10
    threads: int | None = None
    images: int = 3

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("warmup", 0), ("images", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number from {least} on, got {value!r}")


@dataclass(frozen=True, slots=True)
class GraphTimes:
    """Milliseconds of one graph. ratio: of the median to that of the first backend that ran; below 1 is faster."""

    median_ms: float
    p90_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One backend. graphs: by name, empty where ``note`` says why it did not run. mask_iou: against PyTorch FP32."""

    backend: str
    bf16: bool
    graphs: Mapping[str, GraphTimes]
    mask_iou: Accuracy | None
    note: str | None

    @property
    def label(self) -> str:
        return label(self.backend, self.bf16)


@dataclass(frozen=True, slots=True)
class CompareResult:
    """runs_on: what the bundle itself would use. images: how many the masks were measured on. versions: by backend."""

    bundle: str
    precision: str
    runs_on: str
    threads: int
    machine: str
    versions: Mapping[str, str]
    image_hw: tuple[int, int]
    warmup: int
    runs: int
    images: int
    rows: tuple[BackendRow, ...]


def compare_backends(
    bundle: Bundle,
    image: npt.NDArray[np.uint8],
    options: CompareOptions,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> CompareResult:
    """Time both graphs on one click in the middle of ``image`` (H,W,3), and measure masks on the bundle's own images.

    A backend that is not installed is a row that says so. Raises InputError for a bundle of engines, MissingExtraError
    if there is no backend at all, and what opening the bundle raises.
    """
    bundle.on(CPU_BACKENDS[0])  # raises for engines
    missing = {variant: _missing(*variant) for variant in VARIANTS}
    ready = [variant for variant in VARIANTS if missing[variant] is None]
    if not ready:
        raise MissingExtraError("onnxruntime", "cpu")
    answers = _answers(bundle, options.images)
    with ExitStack() as stack:
        predictors = {
            label(backend, bf16): stack.enter_context(bundle.on(backend, bf16).open(options.threads))
            for backend, bf16 in ready
        }
        times = _times(predictors, image, options, progress)
        accuracy = {
            name: compare(predictor, answers, bundle.path / "verify", name).mask_iou
            for name, predictor in predictors.items()
            if answers is not None
        }
        threads = int(getattr(next(iter(predictors.values())).encoder, "threads", options.threads or 0))
    rows = tuple(
        BackendRow(b, bf16, times.get(label(b, bf16), {}), accuracy.get(label(b, bf16)), missing[b, bf16])
        for b, bf16 in VARIANTS
    )
    return CompareResult(
        bundle=str(bundle.path),
        precision=bundle.precision,
        runs_on=bundle.runs_on,
        threads=threads,
        machine=machine(),
        versions=versions({backend for backend, _ in ready}),
        image_hw=(image.shape[0], image.shape[1]),
        warmup=options.warmup,
        runs=options.runs,
        images=len(answers.files) if answers is not None else 0,
        rows=rows,
    )


def alternate(
    actions: Mapping[str, Callable[[], object]],
    runs: int,
    warmup: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Milliseconds of each action's ``runs``, after ``warmup`` unrecorded ones, by the host's clock.

    They take turns, so that what slows the machine for a while slows all of them, and every other round goes backwards,
    so that none always finds the caches as the same neighbour left them.
    """
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for run in progress(range(warmup + runs)):
        order: Sequence[str] = list(actions)
        for name in order if run % 2 == 0 else reversed(order):
            start = time.perf_counter()
            actions[name]()
            taken_ms = (time.perf_counter() - start) * 1e3
            if run >= warmup:
                samples[name].append(taken_ms)
    return samples


def time_graphs(
    predictors: Mapping[str, Predictor],
    image: npt.NDArray[np.uint8],
    runs: int,
    warmup: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every run by graph and predictor's name, on one click in the middle of ``image`` (H,W,3).

    The predictors take turns (``alternate``).
    """
    hw = (image.shape[0], image.shape[1])
    click = check_prompts([[hw[1] / 2, hw[0] / 2]], [1], None, hw)
    actions: dict[str, dict[str, Callable[[], object]]] = {name: {} for name in GRAPHS}
    for name, predictor in predictors.items():
        predictor.set_image(image)
        feeds = {"encoder": predictor.preprocess(image), "decoder": predictor.decoder_feeds(click)}
        for graph in GRAPHS:
            actions[graph][name] = _action(predictor, graph, feeds[graph])
    return {graph: alternate(actions[graph], runs, warmup, progress) for graph in GRAPHS}


def label(backend: str, bf16: bool) -> str:
    """A backend's name for people, as ``Bundle.runs_on`` writes it."""
    return f"{backend} bf16" if bf16 else backend


def versions(backends: Iterable[str]) -> dict[str, str]:
    """Releases of the CPU backends that this process has loaded; the packages of one module differ in name."""
    return {name: str(sys.modules[name].__version__).partition("-")[0] for name in sorted(backends)}


def _missing(backend: str, bf16: bool) -> str | None:
    """Why a backend cannot run here, None if it can."""
    if not installed(backend):
        extra = "openvino" if backend == "openvino" else "cpu"
        return f"not installed: pip install 'edgesam-deploy[{extra}]'"
    if bf16:
        from edgesam_deploy.runtime.openvino import native_bf16

        return None if native_bf16() else NO_BF16
    return None


def _answers(bundle: Bundle, images: int) -> Answers | None:
    """The first recorded answers of a bundle, None where it carries none."""
    if images == 0 or ANSWERS not in bundle.manifest["files"]:
        return None
    whole = load_answers(bundle.path / ANSWERS)
    rows = {name: getattr(whole, name)[:images] for name in whole.__slots__}
    return replace(whole, **rows)


def _times(
    predictors: Mapping[str, Predictor],
    image: npt.NDArray[np.uint8],
    options: CompareOptions,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> dict[str, dict[str, GraphTimes]]:
    """Times by backend's label and graph."""
    times: dict[str, dict[str, GraphTimes]] = {name: {} for name in predictors}
    for graph, samples in time_graphs(predictors, image, options.runs, options.warmup, progress).items():
        summaries = {name: summarize(values) for name, values in samples.items()}
        first = next(iter(summaries.values())).median_ms
        for name, summary in summaries.items():
            times[name][graph] = GraphTimes(summary.median_ms, summary.p90_ms, summary.median_ms / first)
    return times


def _action(predictor: Predictor, graph: str, feeds: dict[str, npt.NDArray[np.generic]]) -> Callable[[], object]:
    session = predictor.encoder if graph == "encoder" else predictor.decoder
    return lambda: session.run(feeds)
