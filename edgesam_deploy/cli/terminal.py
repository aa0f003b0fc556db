"""What the commands share: JSON on stdout, tables and progress on stderr or stdout through rich."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgesam_deploy.download import Consent
    from edgesam_deploy.recipe import Recipe

json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON on stdout.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="CPU threads inside an operator. Default: all cores."
)

# As runtime.CPU_BACKENDS, which costs an import.
backend_option = click.option(
    "--backend", type=click.Choice(["onnxruntime", "openvino"]), help="Run a CPU's bundle on this. Default: its own."
)


@dataclass(frozen=True, slots=True)
class Weights:
    """What the user says of weights. files: their own, one or as many as the recipe has parts; none: the recipe's."""

    files: tuple[Path, ...]
    accept_license: bool
    accept_unverified: bool

    @property
    def mentioned(self) -> bool:
        return bool(self.files) or self.accept_license or self.accept_unverified

    def consent(self) -> Consent:
        from edgesam_deploy.download import Consent

        return Consent(self.accept_license, self.accept_unverified, say)

    def given(self, recipe: Recipe) -> Path | None:
        """The user's own checkpoint, joined where it is in parts; None where they gave none."""
        if len(self.files) < 2:
            return self.files[0] if self.files else None
        from edgesam_deploy.models.checkpoint import join

        return join(recipe, self.files)

    def find(self, recipe: Recipe) -> Path:
        """The user's own checkpoint or the recipe's, downloaded now if it has to be."""
        from edgesam_deploy.models.checkpoint import checkpoint_path

        return self.given(recipe) or checkpoint_path(recipe, self.consent())


def checkpoint_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds --checkpoint and what may have to be accepted; the command gets them as ``weights``."""

    @functools.wraps(function)
    def command(
        *args: Any, checkpoint: tuple[Path, ...], accept_license: bool, accept_unverified: bool, **others: Any
    ) -> None:
        function(*args, weights=Weights(checkpoint, accept_license, accept_unverified), **others)

    options = (
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Weights (.pt, .pth, .safetensors), one for each part of a recipe in parts. Default: its own.",
        ),
        click.option("--accept-license", is_flag=True, help="Download weights whose licence forbids commercial use."),
        click.option(
            "--accept-unverified", is_flag=True, help="Download weights whose sha256 nobody is known to state."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def print_json(value: Any) -> None:
    """A result, dataclass or plain, as JSON on stdout."""
    click.echo(json.dumps(plain(value), indent=2))


def plain(value: Any) -> Any:
    """Dataclasses to dicts and paths to strings, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; columns after the first are right-aligned where they hold numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    lines = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(lines) and all(_numeric(line[index]) for line in lines)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    # Piped output is for files and grep: never wrap or truncate it to 80 columns.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    console.print(table, markup=False)


def say(message: str) -> None:
    """One line of the story, on stderr."""
    click.echo(message, err=True)


def track(name: str, items: Iterable[Any], total: int | None) -> Iterable[Any]:
    """A progress bar on stderr while ``items`` are gone through; it disappears when done."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    return rich_track(
        items, description=name, total=total, console=console, transient=True, disable=not console.is_terminal
    )


def _numeric(text: str) -> bool:
    stripped = text.replace("–", "").replace("%", "").replace("×", "").strip()
    return not stripped or stripped.replace(".", "", 1).replace("-", "", 1).isdigit()
