"""Fit the shares of a device's peaks that engines reach (``measure.roofline.Efficiency``) to measured latencies.

The model is that of ``measure.roofline`` with three factors: shares of the arithmetic peak and of the memory bandwidth,
and the time between two kernels. They are fitted by least squares of the logarithm: a figure twice too long weighs as
much as one half as long as measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import InputError, MissingExtraError
from edgesam_deploy.measure.roofline import Efficiency, Kernel, work_ms
from edgesam_deploy.target import Device

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
