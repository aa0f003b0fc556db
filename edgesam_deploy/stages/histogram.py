"""A histogram of |x| that grows with what it meets, and three ways to choose from it the |x| that a scale covers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import GraphError

BINS = 2048
# Counted of one tensor of one image: shares of a hundredth of a percent are still made of a hundred values.
SAMPLES = 1 << 20
# INT8 without its sign.
LEVELS = 128
# Thresholds that the entropy calibrator tries lie this many bins apart: finer ones change a scale by under 1 %.
_STEP = 16


class Histogram:
    """Counts of |x| in equal bins from 0; when a larger value comes, the range doubles and bins merge in pairs."""

    def __init__(self) -> None:
        self.limit = 0.0
        self.absmax = 0.0
        self.counts = np.zeros(BINS, dtype=np.int64)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Add an array of any shape. Raises GraphError for values that are not finite.

        The largest value counts whatever its place; of more than ``SAMPLES`` values, evenly spaced ones are counted.
        """
        flat = values.reshape(-1)
        top = max(float(flat.max(initial=0.0)), -float(flat.min(initial=0.0)))
        if not np.isfinite(top):
            raise GraphError("calibration met a value that is not finite in FP32; the checkpoint is damaged")
        self.absmax = max(self.absmax, top)
        if self.limit == 0.0:
            self.limit = top
        while 0.0 < self.limit < top:
            self.limit *= 2
            half = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([half, np.zeros(BINS - half.size, dtype=np.int64)])
        if self.limit > 0.0:
            # An odd step visits every column of tensors whose width is a power of two.
            magnitudes = np.abs(flat[:: -(-flat.size // SAMPLES) | 1])
            bins = np.minimum((magnitudes * np.float32(BINS / self.limit)).astype(np.int32), BINS - 1)
            self.counts += np.bincount(bins, minlength=BINS)

    def amax(self, calibrator: str, percentile: float) -> float:
        """The |x| that a scale should cover, by one of ``recipe.CALIBRATORS``."""
        if calibrator == "entropy":
            return self.entropy()
        return self.percentile(percentile if calibrator == "percentile" else 100.0)

    def percentile(self, percent: float) -> float:
        """The smallest bin edge that covers ``percent`` of the values; never above the largest value seen."""
        if percent >= 100.0 or self.absmax == 0.0:
            return self.absmax
        covered = np.cumsum(self.counts)
        index = int(np.searchsorted(covered, covered[-1] * percent / 100.0))
        return min(self.absmax, (index + 1) * self.limit / BINS)

    def entropy(self) -> float:
        """The threshold whose 128 levels keep most of the distribution: least Kullback-Leibler divergence.

        S. Migacz, "8-bit Inference with TensorRT", GTC 2017; that the first bin, where rectifiers leave their zeros,
        counts as the second does is from NVIDIA's pytorch-quantization (calib/histogram.py).
        """
        counts = self.counts.astype(np.float64)
        counts[0] = counts[1]
        used = int(np.max(np.nonzero(counts)[0], initial=0)) + 1
        if self.absmax == 0.0 or used <= LEVELS:
            return self.absmax
        stops = [*range(LEVELS, used, _STEP), used]
        best = min(stops, key=lambda stop: _divergence(counts, stop))
        return float(min(self.absmax, best * self.limit / BINS))


def _divergence(counts: npt.NDArray[np.float64], stop: int) -> float:
    """Kullback-Leibler divergence of counts saturated at bin ``stop`` from the same counts in ``LEVELS`` steps."""
    kept = counts[:stop]
    wanted = kept.copy()
    wanted[-1] += counts[stop:].sum()
    edges = np.floor(np.linspace(0, stop, LEVELS, endpoint=False)).astype(np.int64)
    filled = kept > 0
    totals = np.add.reduceat(kept, edges)
    members = np.add.reduceat(filled.astype(np.float64), edges)
    level = np.divide(totals, members, out=np.zeros_like(totals), where=members > 0)
    spread = np.repeat(level, np.diff([*edges, stop])) * filled
    p, q = wanted / wanted.sum(), spread / max(spread.sum(), 1e-300)
    # Where saturation put values into a bin that was empty, the levels know nothing of them.
    q = np.maximum(q, 1e-12)
    mask = p > 0
    return float((p[mask] * np.log(p[mask] / q[mask])).sum())
