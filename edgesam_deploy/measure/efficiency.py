"""How much of a device's peaks engines reach: fitted to published latencies, kept with every figure it came from.

``assets/efficiency.json`` holds the result; ``benchmarks/estimate_fit.py`` writes it. The model is that of
``measure.roofline`` with three factors: shares of the arithmetic peak and of the memory bandwidth, and the time between
two kernels. They are fitted by least squares of the logarithm: a figure twice too long weighs as much as one half as
long as measured.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import InputError, MissingExtraError
from edgesam_deploy.measure.roofline import Efficiency, Kernel, work_ms
from edgesam_deploy.recipe import PACKAGE
from edgesam_deploy.target import Device

FILE = PACKAGE / "assets" / "efficiency.json"
# (compute, memory, launch_ms): what the fit may choose, and where it starts from, several times since it may end beside
# the best of all.
_LOW, _HIGH = (0.02, 0.02, 0.0), (1.0, 1.0, 0.02)
_STARTS = tuple(itertools.product((0.1, 0.4, 0.8), (0.2, 0.7), (0.001, 0.008)))


@dataclass(frozen=True, slots=True)
class Sample:
    """Kernels of a graph with the latency that was measured for it, milliseconds at batch 1."""

    name: str
    device: Device
    kernels: Sequence[Kernel]
    measured_ms: float


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


def fit(samples: Sequence[Sample]) -> Efficiency:
    """The factors with the least sum of squared log errors.

    Raises InputError for fewer samples than factors, MissingExtraError without SciPy.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError("scipy", "dev") from error

    if len(samples) < len(_LOW):
        raise InputError(f"a fit of {len(_LOW)} factors needs as many latencies or more, got {len(samples)}")
    works = [work_ms(sample.kernels, sample.device) for sample in samples]
    measured = np.log([sample.measured_ms for sample in samples])

    def errors(factors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        compute, memory, launch = factors
        model = [np.maximum(w[0] / compute, w[1] / memory).sum() + launch * w.shape[1] for w in works]
        found: npt.NDArray[np.float64] = np.log(model) - measured
        return found

    tries = [least_squares(errors, start, bounds=(_LOW, _HIGH), x_scale=start) for start in _STARTS]
    best = min(tries, key=lambda one: float(one.cost))
    return Efficiency(*(float(f"{value:.4g}") for value in best.x))


def load_fit(path: Path = FILE) -> Fit:
    """What ``benchmarks/estimate_fit.py`` wrote. Raises InputError if it is not that."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Fit(Efficiency(**raw["efficiency"]), _rows(raw["fitted"]), _rows(raw["tried"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no fitted efficiency: {error}; install edgesam-deploy again") from error


def _rows(raw: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(**row) for row in raw)
