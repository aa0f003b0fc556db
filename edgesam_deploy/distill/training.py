"""The updates of a training run, and the state between them.

A run is a function of its options, images and teacher: killed at any moment and started again, it ends with the very
weights of a run that was not (on the CPU, with the same threads and number of processes).
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from edgesam_deploy.distill.distributed import World
from edgesam_deploy.distill.options import TrainOptions
from edgesam_deploy.distill.samples import Steps
from edgesam_deploy.errors import CheckpointError, ImageError, InputError
from edgesam_deploy.files import writing

# PyTorch's 0.1 remembers some 40 views of 4 a step: too few for the statistics that the deployed model keeps.
NORM_MOMENTUM = 0.02
# HGNetV2's LAB scales near 0 or below lose their channel in INT8.
MIN_LAB_SCALE = 0.05


# What a data loader gives for one micro-step, and the same as an objective takes it.
Batch = Sequence[Tensor]
Prepare = Callable[[Batch], Batch]


class Objective(Protocol):
    """A module: a prepared batch -> (loss, metric), two scalars. All that learns is in it, so that PyTorch's
    DistributedDataParallel can wrap it. metric: the second one's name."""

    metric: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """One update. metric: what the objective calls so: higher is better."""

    step: int
    loss: float
    metric: float
    rate: float
    grad_norm: float


@dataclass
class Run:
    """Network, running average, optimizer and place in the run. learners: the parts of ``model`` that learn; sparing:
    whether an update may leave some of their parameters without a gradient."""

    model: nn.Module
    learners: Sequence[nn.Module]
    objective: nn.Module
    options: TrainOptions
    total: int
    world: World
    identity: str
    sparing: bool = False
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        # channels_last: a third faster on CPUs, and what tensor cores want.
        self.model.to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective.to(self.world.device)
        self.model.requires_grad_(False)
        for part in self.learners:
            part.requires_grad_(True)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.average = copy.deepcopy(self.model).eval()
        groups = [{"params": [p for p in learning if p.ndim > 1], "weight_decay": self.options.weight_decay},
                  {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=self.options.lr, momentum=0.9)
            if self.options.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=self.options.lr, betas=(0.9, 0.98))
        )
        half = self.options.amp == "fp16" and self.world.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)
        self.parallel: nn.Module = self.objective
        if self.world.size > 1:
            self.parallel = DistributedDataParallel(self.objective, find_unused_parameters=self.sparing)

    def rate(self) -> float:
        """Learning rate of this update: linear warm-up, then half a cosine."""
        o = self.options
        done = max(0, self.step - o.warmup) / max(1, self.total - o.warmup)
        cosine = o.final + (1 - o.final) * 0.5 * (1 + math.cos(math.pi * done))
        return o.lr * min(1.0, (self.step + 1) / max(1, o.warmup)) * cosine

    def update(self, batches: Sequence[Batch], prepare: Prepare) -> StepResult:
        """One update from ``accumulate`` batches. Raises CheckpointError for a loss that is not finite."""
        self._train_mode()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad(set_to_none=True)
        sums = [0.0, 0.0]
        for number, batch in enumerate(batches):
            given = prepare(batch)
            # Gradients are exchanged once an update, with the last batch.
            with self._exchange(number == len(batches) - 1):
                loss, metric = self.parallel(*given)
                self.scaler.scale(loss / len(batches)).backward()
            sums[0] += loss.item() / len(batches)
            sums[1] += metric.item() / len(batches)
        loss_value, metric_value = self.world.mean(sums)
        if not math.isfinite(loss_value):
            raise CheckpointError(f"the loss is {loss_value} at step {self.step}: start again with a lower --lr")
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.options.clip)
        if not (self.scaler.is_enabled() or math.isfinite(norm)):  # a scaler leaves such an update out, and scales less
            raise CheckpointError(f"the gradient is {norm:g} at step {self.step}: start again with a lower --lr")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        result = StepResult(self.step, loss_value, metric_value, self.rate(), float(norm))
        self._average()
        self.step += 1
        return result

    def save(self, path: Path) -> None:
        """All that the next update depends on, whole or not at all."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),  # dropout
        }
        with writing(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> None:
        """Go on where ``save`` left off. Raises CheckpointError for another run's state, or a file that is none."""
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.world.device, weights_only=True)
            identity = state["identity"]
        except Exception as error:  # torch raises what pickle, zipfile and its own code raise
            raise CheckpointError(
                f"{path} is not the state of a run ({type(error).__name__}): delete it to start again"
            ) from error
        if identity != self.identity:
            raise CheckpointError(
                f"{path} is of a run with other options, images, teacher or student: give another output folder, or "
                f"delete it to start again. That run: {identity}"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def _train_mode(self) -> None:
        # What does not learn stays as it is, its batch statistics too.
        self.model.eval()
        for module in (m for part in self.learners for m in part.train().modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(not self.options.freeze_norm)
                module.momentum = NORM_MOMENTUM

    def _exchange(self, now: bool) -> Any:
        if now or not isinstance(self.parallel, DistributedDataParallel):
            return torch.enable_grad()
        return self.parallel.no_sync()

    @torch.no_grad()
    def _average(self) -> None:
        keep_lab_scales(self.model)
        # A young average forgets its start faster.
        weight = 1 - min(self.options.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
        for target, source in zip(self.average.buffers(), self.model.buffers(), strict=True):
            target.copy_(source)


@dataclass(frozen=True, slots=True)
class Pause:
    """When a run saves its state, every ``seconds``; when it ends early, after ``limit`` seconds, None for never."""

    seconds: float = 600.0
    limit: float | None = None

    def after(self, spent: float) -> Pause:
        """What is left of it when that many seconds went elsewhere, as into a teacher's embeddings."""
        return self if self.limit is None else Pause(self.seconds, max(0.0, self.limit - spent))


@dataclass(frozen=True, slots=True)
class Work:
    """What a run learns from. samples: by the keys of ``samples.Steps``; images: their numbers; prepare: a loaded batch
    as the objective takes it."""

    samples: Dataset[Any]
    images: npt.NDArray[np.int64]
    prepare: Prepare


def train(
    run: Run,
    work: Work,
    state: Path,
    pause: Pause,
    workers: int,
    after: Callable[[StepResult], None],
) -> bool:
    """Update until the run is at its end (True) or at its time limit (False); its state is then in ``state``.

    So it is when the process is asked to stop (Ctrl-C, SIGTERM): KeyboardInterrupt comes after the update that was
    under way.

    after: called with every update's result, by every process.
    """
    world, started, spent = run.world, time.monotonic(), run.seconds
    saved = started
    sampler = Steps(work.images, run.options, run.step, run.total, world.rank, world.size)
    loader = DataLoader(
        work.samples, batch_sampler=sampler, num_workers=workers, pin_memory=world.device.type == "cuda",
        worker_init_fn=_let_the_first_decide,
        generator=torch.Generator(),  # not the global one, whose state a resumed run has taken over
    )  # fmt: skip
    with _asked_to_stop() as asked, closing(_loaded(loader)) as loaded:
        for batches in _grouped(loaded, run.options.accumulate):
            result = run.update(batches, work.prepare)
            now = time.monotonic()
            run.seconds = spent + now - started
            stopped = world.any(asked.is_set())
            over = stopped or world.any(pause.limit is not None and now - started >= pause.limit)
            last = run.step == run.total
            if world.first and (last or over or now - saved >= pause.seconds):
                run.save(state)
                saved = time.monotonic()
            after(result)
            if stopped and not last:
                raise KeyboardInterrupt
            if over and not last:
                return False
    return True


@contextmanager
def _asked_to_stop() -> Iterator[Event]:
    """Set by Ctrl-C and SIGTERM, which within otherwise do nothing; a second one ends the process as ever."""
    asked, before = Event(), dict[int, Any]()

    def note(number: int, frame: object) -> None:
        asked.set()
        signal.signal(number, before[number])

    if current_thread() is main_thread():  # Python takes handlers from no other
        every = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # A job in the background ignores Ctrl-C; a handler that is not Python's (None) could not be put back.
        before = {number: handler for number, handler in every.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_the_first_decide(worker: int) -> None:
    """Signals may reach every process of a group; loaders end with the process they load for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@torch.no_grad()
def keep_lab_scales(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("lab.scale") and parameter.requires_grad:
            parameter.clamp_(min=MIN_LAB_SCALE)


def _loaded(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """What loads. A loader process's error comes with its traceback in its message: the line that it began as.

    Close it: loader processes ignore SIGTERM, with which Python ends those that are left when it ends itself, and one
    whose iterator an error's traceback still holds would be waited for in vain.
    """
    batches = iter(loader)
    try:
        yield from batches
    except (InputError, ImageError, CheckpointError) as error:
        last = str(error).strip().splitlines()[-1]
        raise type(error)(last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from error
    finally:
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()


def _grouped(items: Iterator[Any], count: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == count:
            yield group
            group = []
