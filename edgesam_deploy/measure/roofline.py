"""What kernels would take on a device at its peaks: a lower bound for the time, and good for comparing precisions.

A kernel takes as long as its arithmetic or its memory traffic, whichever is longer (S. Williams, A. Waterman,
D. Patterson, "Roofline", CACM 52(4), 2009), plus the cost of launching it; kernels run one after another. Which ONNX
nodes make up a kernel is told by ``stages.node_work``. Nothing here is measured: see ``Efficiency``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import InputError
from edgesam_deploy.target import Device

PRECISIONS = ("int8", "fp16", "fp32")
# Shares of the dense FP16 tensor peak, by compute capability: (FP32 products on tensor cores, which take them as TF32;
# what runs on the CUDA cores in FP32). Products in FP16 that tensor cores cannot do, those of grouped convolutions, run
# on CUDA cores at twice the FP32 rate on Orin and at the same elsewhere.
# Orin's GPU: half, as A100 (156 of 312 TFLOPS, NVIDIA A100 whitepaper, table 1), and 5.3 TFLOPS of FP32 against 42.6
# (NVIDIA Jetson AGX Orin Series Technical Brief). GeForce: RTX 3080 has 29.8 in both and 119 in FP16 (NVIDIA Ampere
# GA102 whitepaper, table 3); others are taken for alike.
FP32_SHARES = {"8.7": (0.5, 0.125)}
FP32_SHARE_ELSEWHERE = (0.25, 0.25)
FP16_CUDA_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of the peaks a device reaches. The defaults are bounds; fitted ones: ``measure.efficiency.load_fit``.

    compute, memory: shares in (0, 1]. launch_ms: of one kernel, beside its work; 5 µs is an assumption: what an engine
    of some hundred kernels spends between them, far below one launch from the host.
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
    work = work_ms(kernels, device)
    rows = tuple(_row(kernel, work[:, i], used) for i, kernel in enumerate(kernels))
    return GraphCost(sum(row.ms for row in rows), rows)


def peak(device: Device, precision: str, dense: bool = True) -> float:
    """Operations per second. dense: on tensor cores; else on CUDA cores, INT8 there at the rate of FP16."""
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
    half = device.fp16_dense_tflops * 1e12
    tensor_fp32, cuda_fp32 = FP32_SHARES.get(device.compute_capability, FP32_SHARE_ELSEWHERE)
    if dense:
        return {"int8": device.int8_dense_tops * 1e12, "fp16": half, "fp32": half * tensor_fp32}[precision]
    return half * (cuda_fp32 if precision == "fp32" else FP16_CUDA_SHARE)


def work_ms(kernels: Sequence[Kernel], device: Device) -> npt.NDArray[np.float64]:
    """(2,K) milliseconds at the device's peaks: of arithmetic, of memory traffic."""
    bandwidth = device.memory_bandwidth_gb_s * 1e9
    times = [(k.operations / peak(device, k.precision, k.dense), k.bytes / bandwidth) for k in kernels]
    work: npt.NDArray[np.float64] = 1e3 * np.array(times, dtype=np.float64).reshape(-1, 2).T
    return work


def _row(kernel: Kernel, work: npt.NDArray[np.float64], efficiency: Efficiency) -> NodeCost:
    times = {
        "compute": float(work[0]) / efficiency.compute,
        "memory": float(work[1]) / efficiency.memory,
        "launch": efficiency.launch_ms,
    }
    ms = max(times["compute"], times["memory"]) + times["launch"]
    bound = max(times, key=lambda name: times[name])
    return NodeCost(kernel.node, kernel.fused, kernel.operations, kernel.bytes, kernel.precision, ms, bound)
