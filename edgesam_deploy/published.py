"""What papers and model cards say of a model, each figure with its source: a recipe's ``[published]`` table.

Nothing here shapes a network or a bundle, so nothing here counts in a recipe's digest. Our own measurements of the
same models are not here but in ``benchmarks/results``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edgesam_deploy.errors import RecipeError

# Single figures; each that is stated needs an entry in ``sources``.
FIGURES = ("params_m", "macs_g")


@dataclass(frozen=True, slots=True)
class Quote:
    """One figure as its authors print it. metric: what was measured, on what, with which prompts or on which device."""

    metric: str
    value: float
    source: str

    def __post_init__(self) -> None:
        for name in ("metric", "source"):
            _check_text(f"published.{name}", getattr(self, name))
        _check_positive(f"published value of {self.metric!r}", self.value)


@dataclass(frozen=True, slots=True)
class Published:
    """params_m: parameters of encoder and decoder together, 10⁶. macs_g: multiply-adds of one image at the recipe's
    size, 10⁹, under whichever name the source has for them (many write "FLOPs"). sources: figure -> address and table.

    accuracy: in the units of its metric. latency_ms: milliseconds; the metric says of what, where, in which precision.
    notes: where sources differ, and what a figure does not count.
    """

    params_m: float | None = None
    macs_g: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    accuracy: tuple[Quote, ...] = ()
    latency_ms: tuple[Quote, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stated = [name for name in FIGURES if getattr(self, name) is not None]
        for name in stated:
            _check_positive(f"published.{name}", getattr(self, name))
        if set(self.sources) != set(stated):
            raise RecipeError(f"published.sources must name a source for each of {stated}, got {sorted(self.sources)}")
        for name, source in self.sources.items():
            _check_text(f"published.sources.{name}", source)
        for note in self.notes:
            _check_text("published.notes", note)


def parse_published(raw: Mapping[str, Any]) -> Published:
    """From a recipe's TOML table; an empty one publishes nothing. Raises RecipeError for unknown and wrong entries."""
    _check_names("published", raw, (f.name for f in fields(Published)))
    entries = {**raw, "notes": _list("published.notes", raw.get("notes", []))}
    for name in ("accuracy", "latency_ms"):
        entries[name] = tuple(_quote(name, quote) for quote in _list(f"published.{name}", raw.get(name, [])))
    if not isinstance(entries.get("sources", {}), Mapping):
        raise RecipeError(f"published.sources must be a table of figure = source, got {entries['sources']!r}")
    return Published(**entries)


def _quote(name: str, raw: object) -> Quote:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"published.{name} must be a list of tables of metric, value and source, got {raw!r}")
    _check_names(f"published.{name}", raw, expected := [f.name for f in fields(Quote)])
    if missing := [entry for entry in expected if entry not in raw]:
        raise RecipeError(f"published.{name}: the entry {missing[0]!r} is missing")
    return Quote(**raw)


def _list(what: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"{what} must be a list, got {value!r}")
    return tuple(value)


def _check_names(what: str, raw: Mapping[str, Any], known: Iterable[str]) -> None:
    expected = sorted(known)
    if unknown := sorted(set(raw) - set(expected)):
        raise RecipeError(f"unknown entries {unknown} for {what}, expected {expected}")


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{what} must be a text, got {value!r}")


def _check_positive(what: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(float(value)) or value <= 0:  # type: ignore[arg-type, operator]
        raise RecipeError(f"{what} must be a positive number, got {value!r}")
