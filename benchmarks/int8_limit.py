"""What INT8 can do on this CPU: by the width of its units and the clock, and by a product of large matrices."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.runtime import SessionOptions, open_session
from edgesam_deploy.stages import graph as graphs

# (flag in /proc/cpuinfo, INT8 operations a cycle and core; a multiply-add is two). AMX: TDPBUSD multiplies 16x64 by
# 64x16 in 16 cycles (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Advanced Matrix Extensions").
# VNNI: two pipes, of 512 or 256 bits.
UNITS = (("amx_int8", 2048), ("avx512_vnni", 256), ("avx_vnni", 128))
# Rows, width and number of the products that the measured peak is taken from.
PRODUCT = (2048, 1024, 8)


Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Peak:
    """INT8 operations a second. limit: what the units can do, by their width and the clock. measured: of a product of
    large matrices in OpenVINO. unit, operations_per_cycle, clock_hz, cores: where the limit comes from.
    """

    unit: str
    operations_per_cycle: int
    clock_hz: float
    cores: int
    measured: float

    @property
    def limit(self) -> float:
        return self.operations_per_cycle * self.clock_hz * self.cores


def find_peak(threads: int, folder: Path) -> Peak | None:
    """None on a CPU without the units, or whose flags are not told."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags, clock = facts.get("flags", "").split(), facts.get("cpu MHz")
    unit = next(((name, operations) for name, operations in UNITS if name in flags), None)
    if unit is None or clock is None:
        return None
    rows, width, layers = PRODUCT
    feeds = {"x": np.random.default_rng(0).integers(0, 256, (rows, width), dtype=np.uint8)}
    with open_session(_products(folder / "products.onnx"), "openvino", SessionOptions(threads)) as session:
        times = []
        for _ in range(40):
            started = time.perf_counter()
            session.run(feeds)
            times.append(time.perf_counter() - started)
    measured = 2 * rows * width * width * layers / min(times)
    return Peak(unit[0], unit[1], float(clock) * 1e6, threads, measured)


def _products(path: Path) -> Path:
    """uint8 x (M,K) through matrices (K,K), INT8 throughout."""
    rows, width, layers = PRODUCT
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.integers(-127, 128, (width, width)).astype(np.int8) for i in range(layers)}
    constants: dict[str, Array] = {
        **weights,
        "scale": np.array(0.02, dtype=np.float32),
        "zero": np.array(128, dtype=np.uint8),
        "weight_scale": np.full(width, 0.0005, dtype=np.float32),
        "weight_zero": np.zeros(width, dtype=np.int8),
    }
    nodes, last = [], "x"
    for i in range(layers):
        nodes += [
            helper.make_node("DequantizeLinear", [last, "scale", "zero"], [f"a{i}"]),
            helper.make_node("DequantizeLinear", [f"w{i}", "weight_scale", "weight_zero"], [f"b{i}"], axis=1),
            helper.make_node("MatMul", [f"a{i}", f"b{i}"], [f"c{i}"]),
            helper.make_node("QuantizeLinear", [f"c{i}", "scale", "zero"], [f"q{i}"]),
        ]
        last = f"q{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, [rows, width]) for name in ("x", last)]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], initializers)
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    return path
