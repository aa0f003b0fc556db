"""What the commands share: JSON on stdout, tables and progress on stderr or stdout through rich."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON on stdout.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="CPU threads inside an operator. Default: all cores."
)

# As runtime.CPU_BACKENDS, which costs an import.
backend_option = click.option(
    "--backend", type=click.Choice(["onnxruntime", "openvino"]), help="Run a CPU's bundle on this. Default: its own."
)


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
