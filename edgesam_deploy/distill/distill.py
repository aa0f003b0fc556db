"""One distillation from its inputs to a student's checkpoint: teacher pass, updates, validation, log.

The student's checkpoint has the teacher's prompt encoder and, if that did not learn, its mask decoder. What else lies
in the folder: ``records``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgesam_deploy.distill.agreement import Agreement, Judge
from edgesam_deploy.distill.cache import TeacherCache, input_digest
from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.distributed import World
from edgesam_deploy.distill.first_weights import FirstWeights
from edgesam_deploy.distill.objectives import TeacherObjective
from edgesam_deploy.distill.options import DistillOptions
from edgesam_deploy.distill.records import Listener, Outcome, Records, carry_out, done_before
from edgesam_deploy.distill.samples import Frame, Pairs, split, updates
from edgesam_deploy.distill.teacher import Teacher, check_pair
from edgesam_deploy.distill.training import Batch, Pause, Prepare, Run, Work
from edgesam_deploy.errors import InputError
from edgesam_deploy.recipe import Recipe

# What a validation is called in a run's record.
KIND = "agreement"


@dataclass(frozen=True, slots=True)
class Job:
    """What is distilled into what. model: the teacher's network, of ``recipe``, whose decoder the student gets.

    cache: folder of the teacher's embeddings, None to compute them on the fly. first: the student's first weights.
    """

    student: Recipe
    teacher: Teacher
    model: nn.Module
    recipe: Recipe
    corpus: Corpus
    options: DistillOptions
    records: Records
    cache: Path | None = None
    shard_size: int = 64
    teacher_batch: int = 4
    first: FirstWeights = field(default_factory=FirstWeights)

    def __post_init__(self) -> None:
        check_pair(self.student, self.teacher)
        if len(self.corpus) < 2:
            raise InputError(f"expected at least 2 images to learn from, got {len(self.corpus)}")
        if self.cache is not None and self.options.views:
            raise InputError("random views need the teacher beside: --on-the-fly, or --views 0")


@dataclass(frozen=True, slots=True)
class DistillResult:
    """finished: False where the time limit came first. checkpoint: the student's, from an unfinished run too; it, its
    agreement and its sha256 are None where the limit came in the teacher's pass."""

    finished: bool
    step: int
    total: int
    images: int
    seconds: float
    agreement: Agreement | None
    checkpoint: Path | None
    sha256: str | None


def distill(job: Job, world: World, listener: Listener) -> DistillResult:
    """Run ``job`` to its end or time limit, from where an earlier run in the same folder stopped.

    Raises InputError for a pair or a cache that does not fit, CheckpointError for weights or a state that does not, or
    a loss that is not finite, OutputError for a result that cannot be written.
    """
    started = time.monotonic()
    torch.manual_seed(job.options.seed)
    images, held = split(len(job.corpus), job.options.held)
    total = updates(len(images), job.options, world.size)
    identity = _identity(job, world, total)
    done = done_before(job.records, identity, KIND, Agreement)
    if done is not None:
        listener.say(f"{job.records.output} holds this run, finished")
        return _result(done, len(images))
    with job.records.claimed(world):
        return _carry_out(job, world, listener, Share(images, held, total, identity), started)


@dataclass(frozen=True, slots=True)
class Share:
    """images, held: numbers of those that are learnt from and of the others. total: updates."""

    images: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]
    total: int
    identity: str


def _carry_out(job: Job, world: World, listener: Listener, share: Share, started: float) -> DistillResult:
    pause = job.records.pause
    cache = None
    if job.cache is not None:
        cache, left = _fill(job, job.cache, world, listener, pause.after(time.monotonic() - started))
        if world.any(left > 0):
            return DistillResult(False, 0, share.total, len(share.images), time.monotonic() - started, None, None, None)
    student = _student(job)
    objective = TeacherObjective(student, job.student, job.model, job.recipe, job.options)
    # Not every candidate of the decoder is asked for in every update: such parameters get no gradient.
    run = Run(student, _learners(student, job.options), objective, job.options, share.total, world, share.identity,
              sparing=job.options.decoder_learns)  # fmt: skip
    frames = [Frame(recipe.geometry, recipe.pixels) for recipe in (job.student, job.teacher)]
    pairs = Pairs(job.corpus, frames[0], frames[1], job.options, cache)
    work = Work(pairs, share.images, _prepare(job.teacher, cache is not None, world.device))

    def judge() -> Callable[[nn.Module, Path], Agreement]:
        ask = Judge(job.corpus, share.held.tolist(), job.teacher, job.model, job.recipe, world.device)
        return lambda model, picture: ask(model, job.student, picture)

    pause = pause.after(time.monotonic() - started)
    return _result(carry_out(run, work, job.records, listener, judge, KIND, pause), len(share.images))


def _result(out: Outcome, images: int) -> DistillResult:
    return DistillResult(out.finished, out.step, out.total, images, out.seconds, out.found, out.checkpoint, out.sha256)


def _learners(student: nn.Module, options: DistillOptions) -> list[nn.Module]:
    names = ("image_encoder", "mask_decoder") if options.decoder_learns else ("image_encoder",)
    return [cast(nn.Module, getattr(student, name)) for name in names]


def _prepare(teacher: Teacher, cached: bool, device: torch.device) -> Prepare:
    """The second half of a batch, a cached embedding or the teacher's input, as a float32 embedding."""

    def prepare(batch: Batch) -> Batch:
        images, targets, draw = batch
        wanted = targets if cached else torch.from_numpy(teacher.embed(targets.numpy()))
        return images.to(device, non_blocking=True), wanted.to(device, non_blocking=True).float(), draw

    return prepare


def _fill(job: Job, folder: Path, world: World, listener: Listener, pause: Pause) -> tuple[TeacherCache, int]:
    """The cache, and how many of this process's shards the time limit left out."""
    started = time.monotonic()
    if not world.first:
        world.wait()  # the first writes what the cache is of
    cache = TeacherCache(folder, job.teacher, job.corpus, job.shard_size)
    with cache.alone(listener.say) if world.first else nullcontext():
        if world.first:
            world.wait()

        def over() -> bool:
            return pause.limit is not None and time.monotonic() - started >= pause.limit

        made, left = cache.fill(job.teacher_batch, world.rank, world.size, listener.say, listener.cached, over)
        world.wait()
    if left:
        listener.say(f"stopped at the time limit in the teacher's pass, {made} shards further, {left} to go")
        return cache, left
    cache.trust()
    if world.first:
        whole = cache.bytes / 1e6
        listener.say(f"teacher embeddings in {folder}: {cache.shards} shards, {whole:.0f} MB, {made} of them new")
    return cache, left


def _student(job: Job) -> nn.Module:
    """The student with first weights of its own encoder, and the teacher's prompt encoder and mask decoder."""
    model = job.first.build(job.student)
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
        "teacher_input_sha256": input_digest(job.teacher),
        "images": len(job.corpus),
        "images_sha256": job.corpus.digest(),
        **job.first.hashes(),
        "cached": job.cache is not None,
        "options": job.options.as_dict(),
        "updates": total,
        "processes": world.size,
    }
    return json.dumps(what)
