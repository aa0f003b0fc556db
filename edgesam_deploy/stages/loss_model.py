"""What mask IoU an assignment of INT8 may have, from those that were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

# Losses of mask IoU below this are all alike.
LEAST = 2e-4
# Variance that no model explains, in squares of the mean loss of a block.
_NOISE = 0.02

Array = npt.NDArray[np.float64]


class LossModel:
    """Loss of mask IoU by assignment: what the blocks cost alone, corrected by a Gaussian process on what was measured.

    Blocks that cost much are taken to be uncertain in proportion, alone and in pairs (kernel of a random linear and a
    random quadratic form of the losses alone); the scale follows from how wrong the sums were (Rasmussen and Williams,
    Gaussian Processes for Machine Learning, 2006, equations 2.25, 2.26 and 5.8 for the scale).
    """

    def __init__(self, alone: Mapping[str, float], rest: float, measured: Mapping[frozenset[str], float]) -> None:
        """alone: loss by block. rest: mask IoU without INT8. measured: mask IoU by assignment; one at least."""
        self._blocks, self._rest = tuple(alone), rest
        self._losses = np.array([max(loss, LEAST) for loss in alone.values()])
        self._rows = np.array([self._row(int8) for int8 in measured])
        errors = rest - np.array(list(measured.values())) - self._rows @ self._losses
        noise = _NOISE * float(np.mean(self._losses)) ** 2
        self._inverse = np.linalg.inv(self._kernel(self._rows, self._rows) + noise * np.eye(len(measured)))
        self._weights = self._inverse @ errors
        # Twice the standard deviation: with masks, surprises are commoner than a normal distribution has them.
        self._scale = 4.0 * max(float(errors @ self._weights) / len(measured), 1e-6)

    def predict(self, chosen: frozenset[str]) -> tuple[float, float]:
        """(mask IoU expected of an assignment, the standard deviation of what may come instead)."""
        row = self._row(chosen)[None]
        near = self._kernel(row, self._rows)[0]
        variance = self._scale * (float(self._kernel(row, row)[0, 0]) - float(near @ self._inverse @ near))
        mean = self._rest - float(row[0] @ self._losses) - float(near @ self._weights)
        return mean, math.sqrt(max(variance, LEAST**2))

    def _kernel(self, first: Array, second: Array) -> Array:
        linear = first * self._losses**2 @ second.T
        pairs: Array = linear + (first * self._losses @ second.T) ** 2
        return pairs

    def _row(self, chosen: frozenset[str]) -> Array:
        return np.array([float(b in chosen) for b in self._blocks])
