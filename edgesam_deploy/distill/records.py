"""What a training run leaves in its folder: checkpoint, logs, validations, and the state it goes on from.

student.pt    the network, averaged over updates: a checkpoint for  sam-export build STUDENT --checkpoint
run.json      what it is: options, origin, versions, the last validation
log.csv       every few updates: loss, metric, learning rate, images per second
checks.csv    every validation, on held-out images
samples/      masks of the first held-out images at every validation, the wanted ones above the student's
state.pt      all that the next update depends on; gone when the run is at its end
.lock         held by the run that is at work
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from edgesam_deploy.distill.distributed import World
from edgesam_deploy.distill.half import half_precision
from edgesam_deploy.distill.training import Pause, Run, StepResult, Work, train
from edgesam_deploy.errors import InputError, OutputError
from edgesam_deploy.files import clean_unfinished, locked, sha256_file, write_bytes, write_json
from edgesam_deploy.measure.latency import machine

STUDENT, STATE, RECORD, LOG, CHECKS, SAMPLES = "student.pt", "state.pt", "run.json", "log.csv", "checks.csv", "samples"


@dataclass(frozen=True, slots=True)
class Records:
    """output: folder of the run. every, check: updates between rows of the log and between validations. half: the
    checkpoint in float16. workers: loader processes."""

    output: Path
    every: int = 20
    check: int = 500
    half: bool = False
    workers: int = 0
    pause: Pause = field(default_factory=Pause)

    @property
    def state(self) -> Path:
        return self.output / STATE

    @contextmanager
    def claimed(self, world: World) -> Iterator[None]:
        """The folder, made, without what a killed run left unfinished in it, for this run alone.

        Raises OutputError, InputError where another run is at work there.
        """
        with ExitStack() as stack:
            if world.first:
                try:
                    (self.output / SAMPLES).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise OutputError(f"cannot make the folder {self.output}: {error.strerror or error}") from error
                stack.enter_context(locked(self.output, self._refuse))
                clean_unfinished(self.output)
            world.wait()
            yield

    def _refuse(self) -> None:
        raise InputError(f"another run is at work in {self.output}: wait for it, or give another -o")

    def finished(self, identity: str) -> dict[str, Any] | None:
        """The record of this very run, if it came to its end and the checkpoint is still the one it wrote.

        Raises InputError where another run did, which this one would write over.
        """
        try:
            found: dict[str, Any] = json.loads((self.output / RECORD).read_text(encoding="utf-8"))
            whole = found["finished"] and sha256_file(self.output / STUDENT) == found["checkpoint_sha256"]
            other = [name for name, value in json.loads(identity).items() if found.get(name) != value]
            half = found["half"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if whole and other:
            raise InputError(
                f"{self.output} holds a finished run with other options, images, teacher or student (its "
                f"{' and '.join(other)}): give another -o, or delete it"
            )
        return found if whole and half == self.half else None


class Listener(Protocol):
    """Who watches a run. cached: progress of the teacher pass. update, check: called by the first process."""

    def say(self, message: str) -> None: ...

    def cached(self, items: Any, total: int) -> Any: ...

    def begin(self, step: int, total: int) -> None: ...

    def update(self, result: StepResult, metric: str) -> None: ...

    def check(self, step: int, found: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """finished: False where the time limit came first. checkpoint: from an unfinished run too. found: the validation's
    figures; None of a process that is not the first."""

    finished: bool
    step: int
    total: int
    seconds: float
    found: Any
    checkpoint: Path
    sha256: str


class Book:
    """The first process's records of a run. judge: (network, picture to draw) -> a dataclass of figures, which
    ``kind`` names in the record."""

    def __init__(
        self, records: Records, run: Run, listener: Listener, judge: Callable[[nn.Module, Path], Any], kind: str
    ) -> None:
        self._records, self._run, self._listener, self._judge, self._kind = records, run, listener, judge, kind
        self._metric = str(getattr(run.objective, "metric", "metric"))
        self._pending: list[StepResult] = []
        self._last: tuple[int, Any] | None = None
        self._since = (time.monotonic(), run.step)

    def begin(self) -> None:
        # Rows of updates that were lost with a process that was killed: they will be made again.
        for name in (LOG, CHECKS):
            _cut(self._records.output / name, self._run.step)
        self._listener.begin(self._run.step, self._run.total)

    def after(self, result: StepResult) -> None:
        run, records = self._run, self._records
        self._pending.append(result)
        self._listener.update(result, self._metric)
        last = run.step == run.total
        if last or run.step % records.every == 0:
            self._write_log()
        if last or run.step % records.check == 0:
            self._check()

    def end(self, finished: bool) -> Outcome:
        run, records = self._run, self._records
        if self._pending:
            self._write_log()
        found = self._last[1] if self._last is not None and self._last[0] == run.step else self._check()
        path = records.output / STUDENT
        buffer = io.BytesIO()  # a file's own name would become part of what is saved, and so of its hash
        torch.save(half_precision(run.average) if records.half else run.average.state_dict(), buffer)
        write_bytes(path, buffer.getvalue())
        digest = sha256_file(path)
        record = {**json.loads(run.identity), "step": run.step, "finished": finished, "half": records.half,
                  "seconds": round(run.seconds, 1),
                  self._kind: asdict(found), "checkpoint_sha256": digest, "device": str(run.world.device),
                  "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": machine()}  # fmt: skip
        write_json(records.output / RECORD, record)
        if finished:
            records.state.unlink(missing_ok=True)
        return Outcome(finished, run.step, run.total, run.seconds, found, path, digest)

    def _write_log(self) -> None:
        now, run, o = time.monotonic(), self._run, self._run.options
        seen = (run.step - self._since[1]) * o.batch * o.accumulate * run.world.size
        speed = seen / max(now - self._since[0], 1e-9)
        count, last = len(self._pending), self._pending[-1]
        means = [sum(getattr(r, name) for r in self._pending) / count for name in ("loss", "metric", "grad_norm")]
        row = (run.step, f"{means[0]:.6g}", f"{means[1]:.6f}", f"{last.rate:.4g}", f"{means[2]:.4g}", f"{speed:.3g}",
               round(run.seconds, 1))  # fmt: skip
        columns = ("step", "loss", self._metric, "rate", "grad_norm", "images_per_second", "seconds")
        _append(self._records.output / LOG, columns, row)
        self._pending.clear()
        self._since = (now, run.step)

    def _check(self) -> Any:
        run, folder = self._run, self._records.output
        found = self._judge(run.average, folder / SAMPLES / f"step-{run.step:06d}.png")
        self._last = run.step, found
        values = asdict(found)
        _append(folder / CHECKS, ("step", *values), (run.step, *(_short(v) for v in values.values())))
        self._listener.check(run.step, found)
        self._since = (time.monotonic(), run.step)  # the time of a check is not the updates'
        return found


def done_before(records: Records, identity: str, kind: str, figures: Callable[..., Any]) -> Outcome | None:
    """What this very run gave when it came to its end in this folder; None if it did not. figures: made of the record's
    ``kind``."""
    found = records.finished(identity)
    if found is None:
        return None
    step, seconds, digest = int(found["step"]), float(found["seconds"]), str(found["checkpoint_sha256"])
    return Outcome(True, step, step, seconds, figures(**found[kind]), records.output / STUDENT, digest)


def carry_out(
    run: Run,
    work: Work,
    records: Records,
    listener: Listener,
    judge: Callable[[], Callable[[nn.Module, Path], Any]],
    kind: str,
    pause: Pause,
) -> Outcome:
    """``run`` from where its state in the folder is, to its end or time limit.

    judge: makes the ``Book``'s, in the first process alone.
    """
    world = run.world
    if records.state.exists():
        run.resume(records.state)
        listener.say(f"going on at update {run.step} of {run.total}")
    world.wait()
    book = Book(records, run, listener, judge(), kind) if world.first else None
    if book is not None:
        book.begin()
    finished = run.step == run.total or train(
        run, work, records.state, pause, records.workers, book.after if book is not None else _nothing
    )
    result = Outcome(finished, run.step, run.total, run.seconds, None, records.output / STUDENT, "")
    if book is not None:
        result = book.end(finished)
    world.wait()
    return result


def _nothing(result: StepResult) -> None:
    """What processes but the first do after an update."""


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}"


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
