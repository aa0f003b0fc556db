"""Fitting shares of the peaks: factors that are known come back."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the dev extra")

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.roofline import Efficiency, Kernel, price
from edgesam_deploy.stages.fit_efficiency import Sample, fit
from edgesam_deploy.target import load_target

DEVICE = load_target("agx-orin-64gb").devices[0]


def networks(count: int, truth: Efficiency) -> list[Sample]:
    """Made-up networks of 20 to 150 kernels, some short of arithmetic, some of bandwidth, timed by known factors."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        kernels = [
            Kernel(f"k{i}", (), int(10 ** rng.uniform(7, 10)), int(10 ** rng.uniform(5, 7.5)), "fp16", True)
            for i in range(20 + 20 * index)
        ]
        made.append(Sample(f"n{index}", DEVICE, kernels, price(kernels, DEVICE, truth).ms))
    return made


@pytest.mark.parametrize(
    "truth", [Efficiency(0.4, 0.7, 0.003), Efficiency(0.15, 0.9, 0.0), Efficiency(0.8, 0.3, 0.012)], ids=str
)
def test_known_factors_come_back(truth: Efficiency) -> None:
    found = fit(networks(7, truth))
    assert found.compute == pytest.approx(truth.compute, rel=0.03)
    assert found.memory == pytest.approx(truth.memory, rel=0.03)
    assert found.launch_ms == pytest.approx(truth.launch_ms, abs=2e-4)


def test_fewer_figures_than_factors_are_refused() -> None:
    with pytest.raises(InputError, match="a fit of 3 factors needs as many latencies"):
        fit(networks(2, Efficiency()))
