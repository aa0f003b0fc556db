"""What kernels would take on a device at its peaks: a lower bound for the time, and good for comparing precisions.

A kernel takes as long as its arithmetic or its memory traffic, whichever is longer (S. Williams, A. Waterman,
D. Patterson, "Roofline", CACM 52(4), 2009), plus the cost of launching it; kernels run one after another. Which ONNX
nodes make up a kernel is told by ``stages.node_work``. Nothing here is measured: see ``Efficiency``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgesam_deploy.errors import InputError
from edgesam_deploy.target import Device

PRECISIONS = ("int8", "fp16", "fp32")
# FP32 as a share of the dense FP16 tensor peak, TF32 or not: RTX 3080 has 29.8 TFLOPS in FP32, 29.8 in TF32 on tensor
# cores and 119 in FP16 there (NVIDIA Ampere GA102 whitepaper, table 3). The other Ampere design, GA100's, which Orin's
# GPU follows, is at 1/8 in FP32 and 1/2 in TF32 (A100: 19.5, 156 and 312); the share lies between.
FP32_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of the peaks a device reaches, the one place for such factors: 1 until measurements say otherwise.

    compute, memory: shares in (0, 1]. launch_ms: of one kernel, beside its work; 5 µs is an assumption, not a
    measurement: what an engine of some hundred kernels spends between them, far below one launch from the host.
    """

    compute: float = 1.0
    memory: float = 1.0
    launch_ms: float = 0.005

    def __post_init__(self) -> None:
        if not 0.0 < self.compute <= 1.0 or not 0.0 < self.memory <= 1.0 or self.launch_ms < 0.0:
            raise InputError(f"an efficiency has shares in (0, 1] and a launch time from 0 on, got {self}")


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one launch does. node: its first ONNX node. fused: the others, in order.

    operations: two for a multiply-add; what is not a product of matrices is not counted, memory bounds it. bytes: read
    and written. precision: of the products, or of the data. dense: whether tensor cores can do it (no: grouped
    convolutions, and all without products).
    """

    node: str
    fused: tuple[str, ...]
    operations: int
    bytes: int
    precision: str
    dense: bool


@dataclass(frozen=True, slots=True)
class NodeCost:
    """A kernel with its time. bound: what takes longest of "compute", "memory" and "launch"."""

    node: str
    fused: tuple[str, ...]
    operations: int
    bytes: int
    precision: str
    ms: float
    bound: str


@dataclass(frozen=True, slots=True)
class GraphCost:
    """ms: of the whole graph at batch 1. nodes: one row per kernel, in graph order."""

    ms: float
    nodes: tuple[NodeCost, ...]


def price(kernels: Sequence[Kernel], device: Device, efficiency: Efficiency | None = None) -> GraphCost:
    """The time of kernels on a device. efficiency: None for the peaks themselves."""
    used = efficiency or Efficiency()
    rows = tuple(_row(kernel, device, used) for kernel in kernels)
    return GraphCost(sum(row.ms for row in rows), rows)


def peak(device: Device, precision: str, dense: bool = True) -> float:
    """Operations per second. dense: on tensor cores; all else runs at the rate of FP32."""
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
    half = device.fp16_dense_tflops * 1e12
    if not dense or precision == "fp32":
        return half * FP32_SHARE
    return device.int8_dense_tops * 1e12 if precision == "int8" else half


def _row(kernel: Kernel, device: Device, efficiency: Efficiency) -> NodeCost:
    rate = peak(device, kernel.precision, kernel.dense) * efficiency.compute
    times = {
        "compute": kernel.operations / rate * 1e3,
        "memory": kernel.bytes / (device.memory_bandwidth_gb_s * 1e9 * efficiency.memory) * 1e3,
        "launch": efficiency.launch_ms,
    }
    ms = max(times["compute"], times["memory"]) + times["launch"]
    bound = max(times, key=lambda name: times[name])
    return NodeCost(kernel.node, kernel.fused, kernel.operations, kernel.bytes, kernel.precision, ms, bound)
