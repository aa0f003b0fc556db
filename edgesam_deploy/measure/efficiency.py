"""How much of a device's peaks engines reach: fitted to published latencies, kept with every figure it came from.

``assets/efficiency.json`` holds the result; ``benchmarks/estimate_fit.py`` writes it (``stages.fit_efficiency``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.roofline import Efficiency
from edgesam_deploy.recipe import PACKAGE

FILE = PACKAGE / "assets" / "efficiency.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One published latency beside the model's. left_out_ms: by factors fitted to all other rows of the fit, None for
    a row that was no part of it. source: of the measured figure.
    """

    name: str
    device: str
    precision: str
    measured_ms: float
    model_ms: float
    source: str
    left_out_ms: float | None = None

    @property
    def error(self) -> float:
        """Relative, of what the model says without having seen this figure: 0.1 is a tenth too long."""
        seen = self.model_ms if self.left_out_ms is None else self.left_out_ms
        return seen / self.measured_ms - 1.0


@dataclass(frozen=True, slots=True)
class Fit:
    """The factors, the rows that they were fitted to, and those that they were tried on afterwards."""

    efficiency: Efficiency
    fitted: tuple[Row, ...]
    tried: tuple[Row, ...] = ()

    @property
    def factor(self) -> float:
        """An estimate is off by at most this factor, either way, in nine of ten of the figures it had not seen."""
        logs = sorted(abs(math.log1p(row.error)) for row in (*self.fitted, *self.tried))
        return math.exp(logs[math.ceil(0.9 * len(logs)) - 1])

    @property
    def median_error(self) -> float:
        """Of the absolute relative errors over all rows."""
        return median(abs(row.error) for row in (*self.fitted, *self.tried))


def load_fit(path: Path = FILE) -> Fit:
    """What ``benchmarks/estimate_fit.py`` wrote. Raises InputError if it is not that."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Fit(Efficiency(**raw["efficiency"]), _rows(raw["fitted"]), _rows(raw["tried"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no fitted efficiency: {error}; install edgesam-deploy again") from error


def _rows(raw: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(**row) for row in raw)
