"""The one measure of disagreement with upstream, and what was measured so far in a test."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

MEASURED: list[float] = []


def error(ours: Tensor | npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The largest difference, as a part of the largest value of upstream; kept for the report (``conftest``)."""
    assert tuple(ours.shape) == expected.shape
    MEASURED.append(float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()))
    return MEASURED[-1]
