"""One distillation from its inputs to a student's checkpoint: teacher pass, updates, validation, log.

    student.pt    the student, averaged over updates, with the teacher's prompt encoder and, if that did not learn, its
                  mask decoder: a checkpoint for  sam-export build STUDENT --checkpoint
run.json      what it is: options, teacher, images, versions, the last validation
log.csv       every few updates: loss, cosine, learning rate, images per second
checks.csv    every validation: agreement with the teacher on held-out images
samples/      masks of the first held-out images at every validation, the teacher's above the student's
state.pt      all that the next update depends on; gone when the run is at its end
"""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from edgesam_deploy.distill.agreement import Agreement, Judge
from edgesam_deploy.distill.cache import TeacherCache
from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.distributed import World
from edgesam_deploy.distill.objectives import Objective
from edgesam_deploy.distill.options import DistillOptions
from edgesam_deploy.distill.samples import Frame, Pairs, split, updates
from edgesam_deploy.distill.teacher import Teacher, check_pair
from edgesam_deploy.distill.training import Pause, Run, StepResult, train
from edgesam_deploy.errors import InputError, OutputError
from edgesam_deploy.files import clean_unfinished, sha256_file, write_bytes, write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.models import build_model
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import Recipe

STUDENT, STATE, RECORD, LOG, CHECKS, SAMPLES = "student.pt", "state.pt", "run.json", "log.csv", "checks.csv", "samples"
LOG_COLUMNS = ("step", "loss", "cosine", "rate", "grad_norm", "images_per_second", "seconds")


@dataclass(frozen=True, slots=True)
class Job:
    """What is distilled into what. model: the teacher's network, of ``recipe``, whose decoder the student gets.

    cache: folder of the teacher's embeddings, None to compute them on the fly. init: the student's first weights.
    every, check: updates between rows of the log and between validations. workers: loader processes.
    """

    student: Recipe
    teacher: Teacher
    model: nn.Module
    recipe: Recipe
    corpus: Corpus
    output: Path
    options: DistillOptions
    cache: Path | None = None
    shard_size: int = 64
    teacher_batch: int = 4
    init: Path | None = None
    every: int = 20
    check: int = 500
    workers: int = 0
    pause: Pause = field(default_factory=Pause)

    def __post_init__(self) -> None:
        check_pair(self.student, self.teacher)
        if len(self.corpus) < 2:
            raise InputError(f"expected at least 2 images to learn from, got {len(self.corpus)}")
        if self.cache is not None and self.options.views:
            raise InputError("random views need the teacher beside: --on-the-fly, or --views 0")


class Listener(Protocol):
    """Who watches a run. cached: progress of the teacher pass. update, check: called by the first process."""

    def say(self, message: str) -> None: ...

    def cached(self, items: Any, total: int) -> Any: ...

    def begin(self, step: int, total: int) -> None: ...

    def update(self, result: StepResult) -> None: ...

    def check(self, step: int, found: Agreement) -> None: ...


@dataclass(frozen=True, slots=True)
class DistillResult:
    """finished: False where the time limit came first. checkpoint: the student's, from an unfinished run too."""

    finished: bool
    step: int
    total: int
    images: int
    seconds: float
    agreement: Agreement
    checkpoint: Path
    sha256: str


def distill(job: Job, world: World, listener: Listener) -> DistillResult:
    """Run ``job`` to its end or time limit, from where an earlier run in the same folder stopped.

    Raises InputError for a pair or a cache that does not fit, CheckpointError for weights or a state that does not, or
    a loss that is not finite, OutputError for a result that cannot be written.
    """
    torch.manual_seed(job.options.seed)
    images, held = split(len(job.corpus), job.options.held)
    total = updates(len(images), job.options, world.size)
    identity = _identity(job, world, total)
    if (done := _finished(job, identity, len(images))) is not None:
        listener.say(f"{job.output} holds this run, finished")
        return done
    _make_folder(job.output, world)
    cache = _fill(job, world, listener) if job.cache is not None else None
    student = _student(job)
    objective = Objective(student, job.student, job.model, job.recipe, job.options)
    run = Run(student, objective, job.options, total, world, identity)
    state = job.output / STATE
    if state.exists():
        run.resume(state)
        listener.say(f"going on at update {run.step} of {total}")
    world.wait()
    judge = Judge(job.corpus, held.tolist(), job.teacher, job.model, job.recipe, world.device) if world.first else None
    book = _Book(job, run, listener, judge)
    if world.first:
        book.begin()
    frames = [Frame(geometry.geometry, geometry.pixels) for geometry in (job.student, job.teacher)]
    pairs = Pairs(job.corpus, frames[0], frames[1], job.options, cache)
    finished = run.step == total or train(
        run, pairs, images, job.teacher, state, job.pause, job.workers, book.after if world.first else _nothing
    )
    result = book.end(finished, len(images)) if world.first else None
    world.wait()
    return result or DistillResult(
        finished, run.step, total, len(images), run.seconds, Agreement(0, 0, 0, 0, 0), job.output / STUDENT, ""
    )


class _Book:
    """The first process's records of a run."""

    def __init__(self, job: Job, run: Run, listener: Listener, judge: Judge | None) -> None:
        self._job, self._run, self._listener, self._judge = job, run, listener, judge
        self._pending: list[StepResult] = []
        self._last: tuple[int, Agreement] | None = None
        self._since = (time.monotonic(), run.step)

    def begin(self) -> None:
        # Rows of updates that were lost with a process that was killed: they will be made again.
        for name in (LOG, CHECKS):
            _cut(self._job.output / name, self._run.step)
        self._listener.begin(self._run.step, self._run.total)

    def after(self, result: StepResult) -> None:
        run, job = self._run, self._job
        self._pending.append(result)
        self._listener.update(result)
        last = run.step == run.total
        if last or run.step % job.every == 0:
            self._write_log()
        if last or run.step % job.check == 0:
            self._check()

    def end(self, finished: bool, images: int) -> DistillResult:
        run, job = self._run, self._job
        if self._pending:
            self._write_log()
        if self._last is None or self._last[0] != run.step:
            self._check()
        assert self._last is not None
        path = job.output / STUDENT
        buffer = io.BytesIO()  # a file's own name would become part of what is saved, and so of its hash
        torch.save(run.average.state_dict(), buffer)
        write_bytes(path, buffer.getvalue())
        digest = sha256_file(path)
        record = {**json.loads(run.identity), "step": run.step, "finished": finished, "seconds": round(run.seconds, 1),
                  "agreement": asdict(self._last[1]), "checkpoint_sha256": digest, "device": str(run.world.device),
                  "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": machine()}  # fmt: skip
        write_json(job.output / RECORD, record)
        if finished:
            (job.output / STATE).unlink(missing_ok=True)
        return DistillResult(finished, run.step, run.total, images, run.seconds, self._last[1], path, digest)

    def _write_log(self) -> None:
        now, run, o = time.monotonic(), self._run, self._job.options
        seen = (run.step - self._since[1]) * o.batch * o.accumulate * run.world.size
        speed = seen / max(now - self._since[0], 1e-9)
        count, last = len(self._pending), self._pending[-1]
        means = [sum(getattr(r, name) for r in self._pending) / count for name in ("loss", "cosine", "grad_norm")]
        row = (run.step, f"{means[0]:.6g}", f"{means[1]:.6f}", f"{last.rate:.4g}", f"{means[2]:.4g}", f"{speed:.3g}",
               round(run.seconds, 1))  # fmt: skip
        _append(self._job.output / LOG, LOG_COLUMNS, row)
        self._pending.clear()
        self._since = (now, run.step)

    def _check(self) -> None:
        assert self._judge is not None
        run, job = self._run, self._job
        samples = job.output / SAMPLES / f"step-{run.step:06d}.png"
        found = self._judge(run.average, job.student, samples)
        self._last = run.step, found
        values = asdict(found)
        _append(job.output / CHECKS, ("step", *values), (run.step, *(_short(v) for v in values.values())))
        self._listener.check(run.step, found)
        self._since = (time.monotonic(), run.step)  # the time of a check is not the updates'


def _nothing(result: StepResult) -> None:
    """What processes but the first do after an update."""


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}"


def _make_folder(folder: Path, world: World) -> None:
    if world.first:
        try:
            (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
        clean_unfinished(folder)
    world.wait()


def _fill(job: Job, world: World, listener: Listener) -> TeacherCache:
    assert job.cache is not None
    if not world.first:
        world.wait()  # the first writes what the cache is of
    cache = TeacherCache(job.cache, job.teacher, job.corpus, job.shard_size)
    if world.first:
        clean_unfinished(job.cache)
        world.wait()
    made = cache.fill(job.teacher_batch, world.rank, world.size, listener.say, listener.cached)
    world.wait()
    if world.first:
        whole = cache.bytes / 1e6
        listener.say(f"teacher embeddings in {job.cache}: {cache.shards} shards, {whole:.0f} MB, {made} of them new")
    return cache


def _student(job: Job) -> nn.Module:
    """The student with first weights of its own encoder, and the teacher's prompt encoder and mask decoder."""
    model = load_model(job.student, job.init) if job.init is not None else build_model(job.student)
    for part in ("prompt_encoder", "mask_decoder"):
        try:
            getattr(model, part).load_state_dict(getattr(job.model, part).state_dict())
        except (AttributeError, RuntimeError) as error:
            raise InputError(
                f"the student '{job.student.name}' cannot take the {part} of the teacher '{job.recipe.name}': "
                f"{' '.join(str(error).split())[:200]}; choose a student recipe of the teacher's family"
            ) from error
    return model


def _identity(job: Job, world: World, total: int) -> str:
    """All that decides the weights, as JSON. The order of keys is fixed, so equal runs have equal texts."""
    what: dict[str, Any] = {
        "student": job.student.name,
        "student_recipe_sha256": job.student.digest,
        "teacher": job.teacher.name,
        "teacher_sha256": job.teacher.digest,
        "images": len(job.corpus),
        "images_sha256": job.corpus.digest(),
        "init_sha256": sha256_file(job.init) if job.init is not None else None,
        "cached": job.cache is not None,
        "options": job.options.as_dict(),
        "updates": total,
        "processes": world.size,
    }
    return json.dumps(what)


def _finished(job: Job, identity: str, images: int) -> DistillResult | None:
    """What this very run gave when it came to its end, if it did and the checkpoint is still the one it wrote."""
    record, path = job.output / RECORD, job.output / STUDENT
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        same = found["finished"] and all(found[name] == value for name, value in json.loads(identity).items())
        if not same or sha256_file(path) != found["checkpoint_sha256"]:
            return None
        step, agreement = int(found["step"]), Agreement(**found["agreement"])
        return DistillResult(
            True, step, step, images, float(found["seconds"]), agreement, path, found["checkpoint_sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _append(path: Path, columns: tuple[str, ...], row: tuple[object, ...]) -> None:
    new = not path.exists()
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(columns)
            writer.writerow(row)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _cut(path: Path, step: int) -> None:
    """Drop the rows of updates after ``step``, and a last line that was only half written."""
    if not path.exists():
        return
    kept = io.StringIO(newline="")
    writer = csv.writer(kept)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    width = len(rows[0]) if rows else 0
    writer.writerows(r for i, r in enumerate(rows) if i == 0 or (len(r) == width and int(r[0]) <= step))
    write_bytes(path, kept.getvalue().encode())
