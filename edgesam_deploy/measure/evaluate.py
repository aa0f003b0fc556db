"""Mask quality of a model against true masks, mask by mask: images one after another, or several in processes.

``measure.protocol`` says what is asked; this runs it over datasets. Every answer becomes one record. Records come in
the datasets' order, and are the same, however many processes made them.
"""

from __future__ import annotations

import math
import os
import signal
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection, get_context, parent_process, util
from pathlib import Path
from threading import Thread

import numpy as np

from edgesam_deploy.errors import EdgeSAMError, InputError
from edgesam_deploy.images import read_image
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.measure.accuracy import size_class
from edgesam_deploy.measure.boundaries import Boundary, boundary, boundary_f
from edgesam_deploy.measure.datasets import Dataset, EvalImage
from edgesam_deploy.measure.protocol import (
    CHUNK,
    CLICKS,
    PROMPTS,
    Answer,
    agreement,
    answers,
    baselines,
    headline,
)
from edgesam_deploy.measure.truths import Mask, Target
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import Prompts

# How a process gets its own Predictor, on that many CPU threads; it is sent to other processes.
Opener = Callable[[int | None], AbstractContextManager[Predictor]]
TRUTH, TEACHER = "truth", "teacher"
# What numpy's linear algebra asks for its number of threads.
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """prompts: of ``protocol.PROMPTS``. baselines: also what no model would answer. workers: processes, 1 for this one.

    threads: CPU threads in all, None for all cores. chunk: prompts in one call of the decoder.
    """

    prompts: tuple[str, ...] = PROMPTS[:2]
    baselines: bool = False
    workers: int = 1
    threads: int | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if not self.prompts or not set(self.prompts) <= set(PROMPTS) or len(set(self.prompts)) < len(self.prompts):
            raise InputError(f"prompts must be some of {', '.join(PROMPTS)}, each once, got {', '.join(self.prompts)}")
        for name in ("workers", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class MaskRecord:
    """One answer about one target, compared with ``against``: "truth" or "teacher".

    area: pixels, the annotation's where it states one, the teacher's mask's against a teacher; size: COCO's class of
    it. iou, boundary_f: 0..1. predicted_iou: the model's own estimate, None where there is no finite one.
    """

    dataset: str
    image: str
    group: str
    target: str
    area: float
    size: str
    source: str | None
    against: str
    prompt: str
    answer: str
    iou: float
    predicted_iou: float | None
    boundary_f: float


@dataclass(frozen=True, slots=True)
class PackedMask:
    """A mask small enough to keep: its bits, compressed, and its size."""

    data: bytes
    hw: tuple[int, int]

    @staticmethod
    def pack(mask: Mask) -> PackedMask:
        return PackedMask(zlib.compress(np.packbits(mask).tobytes()), (mask.shape[0], mask.shape[1]))

    def unpack(self) -> Mask:
        bits = np.frombuffer(zlib.decompress(self.data), np.uint8)
        return np.unpackbits(bits, count=math.prod(self.hw)).reshape(self.hw).astype(np.bool_)


@dataclass(frozen=True, slots=True)
class Case:
    """What a picture needs of one answer."""

    record: MaskRecord
    truth: PackedMask
    answer: PackedMask
    prompts: Prompts


@dataclass(frozen=True, slots=True)
class ImageResult:
    """records: of every target, in the dataset's order. worst: the lowest IoU of the first prompt's headline answer."""

    dataset: str
    image: str
    group: str
    path: Path
    hw: tuple[int, int]
    records: tuple[MaskRecord, ...]
    worst: Case | None


@dataclass(frozen=True, slots=True)
class Job:
    """All that a process must know. openers: the model's, and the teacher's if there is one."""

    openers: tuple[Opener, ...]
    options: EvalOptions
    threads: int | None


def evaluate(
    opener: Opener,
    datasets: Sequence[Dataset],
    options: EvalOptions,
    teacher: Opener | None = None,
    progress: Callable[[Iterable[ImageResult]], Iterable[ImageResult]] = iter,
) -> Iterator[ImageResult]:
    """The results of all images, in the datasets' order, as they are made.

    Raises what a process raised. Leave the iterator and no process goes on, nor does one where this one is killed.
    """
    names = [dataset.name for dataset in datasets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two datasets are called {twice}: evaluate them one by one")
    work = [(dataset.name, image) for dataset in datasets for image in dataset.images]
    workers = min(options.workers, len(work))
    threads = options.threads if workers == 1 else max(1, (options.threads or _cores()) // workers)
    job = Job((opener, teacher) if teacher else (opener,), options, threads)
    yield from progress(_here(job, work) if workers == 1 else _in_processes(job, work, workers))


def examine(predictors: Sequence[Predictor], dataset: str, image: EvalImage, options: EvalOptions) -> ImageResult:
    """Everything about one image; predictors: the model's, and the teacher's."""
    pixels = read_image(image.path)
    hw = (pixels.shape[0], pixels.shape[1])
    records: list[MaskRecord] = []
    worst: tuple[float, Answer, MaskRecord] | None = None
    targets = image.targets(hw)
    embedded = False
    while chunk := list(islice(targets, options.chunk)):
        if not embedded:
            for predictor in predictors:
                predictor.set_image(pixels)
            embedded = True
        outlines = {id(target): boundary(target.mask) for target in chunk}
        for answer in _asked(predictors[0], chunk, options):
            record = _record(dataset, image, TRUTH, answer, outlines[id(answer.target)])
            records.append(record)
            shown = (record.prompt, record.answer) == (options.prompts[0], headline(options.prompts[0]))
            if shown and (worst is None or record.iou < worst[0]):
                worst = (record.iou, answer, record)
        for teacher in predictors[1:]:
            for prompt in (p for p in options.prompts if p != CLICKS):
                for answer in agreement(predictors[0], teacher, chunk, prompt):
                    records.append(_record(dataset, image, TEACHER, answer, boundary(answer.target.mask)))
    case = None
    if worst is not None:
        _, answer, record = worst
        case = Case(record, PackedMask.pack(answer.target.mask), PackedMask.pack(answer.mask), answer.prompts)
    return ImageResult(dataset, image.name, image.group, image.path, hw, tuple(records), case)


def _asked(predictor: Predictor, targets: Sequence[Target], options: EvalOptions) -> Iterator[Answer]:
    for prompt in options.prompts:
        yield from answers(predictor, targets, prompt)
    if options.baselines:
        yield from baselines(targets)


def _record(dataset: str, image: EvalImage, against: str, answer: Answer, outline: Boundary) -> MaskRecord:
    target, said = answer.target, answer.predicted_iou
    return MaskRecord(
        dataset=dataset,
        image=image.name,
        group=image.group,
        target=target.id,
        area=target.area,
        size=size_class(target.area),
        source=target.source,
        against=against,
        prompt=answer.prompt,
        answer=answer.answer,
        iou=mask_iou(answer.mask, target.mask),
        predicted_iou=said if said is not None and math.isfinite(said) else None,
        boundary_f=boundary_f(boundary(answer.mask), outline),
    )


def _here(job: Job, work: Sequence[tuple[str, EvalImage]]) -> Iterator[ImageResult]:
    with ExitStack() as stack:
        predictors = [stack.enter_context(opener(job.threads)) for opener in job.openers]
        for dataset, image in work:
            yield examine(predictors, dataset, image, job.options)


def _in_processes(job: Job, work: Sequence[tuple[str, EvalImage]], workers: int) -> Iterator[ImageResult]:
    """A few images ahead of what has been taken, so that results do not pile up behind a slow one."""
    waiting: deque[Future[ImageResult]] = deque()
    with _environment(dict.fromkeys(BLAS_THREADS, str(job.threads))):
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,))
        try:
            for dataset, image in work:
                waiting.append(pool.submit(_examine, dataset, image))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise EdgeSAMError(
                "a worker process ended before its work was done, as it does when memory runs out: give fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# Of a worker process: its job, and what it opened for it.
_job: Job | None = None
_opened: list[Predictor] = []


def _start(job: Job) -> None:
    global _job
    _job = job
    # Ctrl-C reaches all processes of a terminal; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed ends nobody, and a worker waits for tasks for ever: it holds both ends of their queue.
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _examine(dataset: str, image: EvalImage) -> ImageResult:
    assert _job is not None
    if not _opened:
        stack = ExitStack()
        # What is opened here, with its errors, is the first task's: a failed initializer would end the pool unsaid.
        _opened.extend([stack.enter_context(opener(_job.threads)) for opener in _job.openers])
        util.Finalize(None, stack.close, exitpriority=1)
    return examine(_opened, dataset, image, _job.options)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _cores() -> int:
    return len(os.sched_getaffinity(0))
