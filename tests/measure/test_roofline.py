"""Prices of kernels, by hand."""

from __future__ import annotations

import pytest

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.roofline import Efficiency, Kernel, peak, price
from edgesam_deploy.target import load_target

DEVICE = load_target("orin-nano-8gb").devices[0]  # 17 TFLOPS, 33 TOPS, 102 GB/s


@pytest.mark.parametrize(
    ("precision", "dense", "rate"),
    [
        ("int8", True, 33e12),
        ("fp16", True, 17e12),
        ("fp32", True, 17e12 / 2),  # TF32
        ("int8", False, 17e12 / 4),
        ("fp16", False, 17e12 / 4),
        ("fp32", False, 17e12 / 8),
    ],
)
def test_the_longer_of_arithmetic_and_memory(precision: str, dense: bool, rate: float) -> None:
    assert peak(DEVICE, precision, dense) == rate
    heavy = Kernel("n", (), 10**12, 1000, precision, dense)
    light = Kernel("m", (), 1000, 102 * 10**6, precision, dense)
    tiny = Kernel("l", (), 10, 10, precision, dense)
    cost = price([heavy, light, tiny], DEVICE)
    assert [row.bound for row in cost.nodes] == ["compute", "memory", "launch"]
    assert cost.nodes[0].ms == pytest.approx(1e15 / rate + 0.005)
    assert cost.nodes[1].ms == pytest.approx(1.0 + 0.005)
    assert cost.ms == pytest.approx(sum(row.ms for row in cost.nodes))
    assert price([light], DEVICE, Efficiency(memory=0.5, launch_ms=0.0)).ms == pytest.approx(2.0)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(InputError, match="shares"):
        Efficiency(compute=1.5)
    with pytest.raises(InputError, match="precision must be one of"):
        peak(DEVICE, "int4")
