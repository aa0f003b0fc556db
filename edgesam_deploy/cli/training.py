"""What `distill` and `finetune` share: the options of a training run, and who watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import say, threads_option, track

if TYPE_CHECKING:
    from edgesam_deploy.distill.records import Records
    from edgesam_deploy.distill.training import StepResult

positive = click.IntRange(1)
share = click.FloatRange(0, 1)
above_zero = click.FloatRange(0, min_open=True)
folder = click.Path(path_type=Path)

# Of TrainOptions, in its order.
NAMES = ("epochs", "batch", "accumulate", "lr", "warmup", "final", "weight_decay", "optimizer", "ema", "amp",
         "freeze_norm", "held", "seed", "prompts")  # fmt: skip


def training_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that every training run has."""
    for option in reversed((
        click.option("-o", "--output", type=folder, required=True, help="Folder of the run."),
        click.option("--init", type=folder, help="First weights. Default: random."),
        click.option("--backbone", type=folder, help="First weights of the timm backbone alone, a file of timm's."),
        click.option("--epochs", type=above_zero, default=10.0, show_default=True),
        click.option("--batch", type=positive, default=8, show_default=True, help="Images per process and micro-step."),
        click.option("--accumulate", type=positive, default=1, show_default=True, help="Micro-steps per update."),
        click.option("--lr", type=above_zero, default=3e-4, show_default=True),
        click.option("--warmup", type=click.IntRange(0), default=100, show_default=True, help="Updates."),
        click.option("--final", type=share, default=0.01, show_default=True, help="Share of --lr at the end."),
        click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
        click.option("--weight-decay", type=click.FloatRange(0), default=0.02, show_default=True),
        click.option("--ema", type=share, default=0.999, show_default=True),
        click.option("--amp", type=click.Choice(["off", "bf16", "fp16"]), default="off", show_default=True),
        click.option("--freeze-norm", is_flag=True, help="Keep batch statistics as they are."),
        click.option("--held", type=click.IntRange(1), default=32, show_default=True, help="Images kept to validate."),
        click.option("--prompts", type=positive, default=8, show_default=True, help="Per image (distill: in rounds)."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--half", is_flag=True, help="Write the checkpoint in float16."),
        click.option("--max-hours", type=above_zero, help="Stop then; the same command goes on."),
        click.option("--save-every", type=click.FloatRange(0), default=600.0, show_default=True, help="Seconds."),
        click.option("--log-every", type=positive, default=20, show_default=True, help="Updates."),
        click.option("--check-every", type=positive, default=500, show_default=True, help="Updates."),
        click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that load."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU where there is one."),
        threads_option,
    )):  # fmt: skip
        function = option(function)
    return function


def records(output: Path, given: dict[str, Any]) -> Records:
    """Where and how often the run with these options writes."""
    from edgesam_deploy.distill.records import Records
    from edgesam_deploy.distill.training import Pause

    limit = given["max_hours"] * 3600 if given["max_hours"] else None
    return Records(
        output,
        every=given["log_every"],
        check=given["check_every"],
        half=given["half"],
        workers=given["workers"],
        pause=Pause(given["save_every"], limit),
    )


@contextmanager
def watching(name: str, first: bool, describe: Callable[[Any], str]) -> Iterator[Any]:
    """The listener of the first process; others are silent. describe: a validation's figures in words."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not (first and console.is_terminal),
    )  # fmt: skip

    class Listener:
        def say(self, message: str) -> None:
            if first:
                say(message)

        def cached(self, items: Any, total: int) -> Any:
            return track("teacher", items, total) if first else items

        def begin(self, step: int, total: int) -> None:
            self._task = bar.add_task(name, total=total, completed=step)

        def update(self, result: StepResult, metric: str) -> None:
            bar.update(self._task, advance=1, description=f"loss {result.loss:.5f}, {metric} {result.metric:.4f}")

        def check(self, step: int, found: Any) -> None:
            say(f"update {step}: {describe(found)}")

    with bar:
        yield Listener()
