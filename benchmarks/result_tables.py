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


def of_earlier(
    what: str = "`reference`", *, macs: int | None = None, recipe: str | None = None, weights: str | None = None
) -> str:
    """A sentence and a space, where a result is not of the reference model that is shipped now; else "".

    what: its subject. Told by what the result has of it: macs: multiply-adds of the encoder; recipe: digest of the
    recipe; weights: sha256.
    """
    shipped = load_recipe("reference")
    now = {"macs": load(COUNTS)["models"]["reference"]["encoder_macs"], "recipe": shipped.digest,
           "weights": shipped.checkpoint.sha256}  # fmt: skip
    found = {"macs": macs, "recipe": recipe, "weights": weights}
    if all(value in (None, now[name]) for name, value in found.items()):
        return ""
    return f"{what} is here the reference model that was shipped before, with an HGNetV2-B0 encoder of 4.01 GMACs. "
