"""What the makers of README.md and RESULTS.md share: result files, and tables of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgesam_deploy.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COUNTS = ROOT / "edgesam_deploy" / "assets" / "counts.json"


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]


def of_earlier_recipe(result: dict[str, Any]) -> str:
    """As ``of_earlier``, for results that name the recipe they are of."""
    if result["recipe_digest"] == load_recipe("reference").digest:
        return ""
    return "The reference model is here the one that was shipped before, with an HGNetV2-B0 encoder. "


def of_earlier(encoder_macs: int, what: str = "`reference`") -> str:
    """A sentence and a space, for results on a reference model of another network than the one shipped now; else ""."""
    if encoder_macs == load(COUNTS)["models"]["reference"]["encoder_macs"]:
        return ""
    return (
        f"{what} is here the reference model as it was shipped before, with an HGNetV2-B0 encoder "
        f"({encoder_macs / 1e9:.2f} GMACs). "
    )
