"""OpenVINO on the CPU: the same ONNX files, often faster than ONNX Runtime on x86 and, where asked, in bfloat16."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.contract import Geometry, GraphContract, TensorSpec, contracts
from edgesam_deploy.device import int8_saturates
from edgesam_deploy.errors import BackendError, GraphError, InputError, MissingExtraError
from edgesam_deploy.runtime import SessionOptions

# OpenVINO does not keep ONNX's names of dynamic axes: those of the contract, by tensor, and what others are called.
AXES = {
    spec.name: spec.shape
    for graph in contracts(Geometry(1, 1, 1, 1, 1)).values()
    for spec in (*graph.inputs, *graph.outputs)
}
DYNAMIC = "?"
TELEMETRY = "openvino_telemetry"


def _import_openvino() -> Any:
    """openvino, without what its import does besides: it sends an event to its makers and leaves an id in ~/intel.

    It does so only where its dependency openvino_telemetry is installed, and goes on with a stub of its own where that
    is missing (openvino/tools/ovc/telemetry_utils.py): so it is missing while openvino is imported for the first time.
    """
    if (loaded := sys.modules.get("openvino")) is not None:
        return loaded
    kept = sys.modules.pop(TELEMETRY, None)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # the import system's word for "there is none"
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingExtraError("openvino", "openvino") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"openvino is installed but cannot be loaded: {_reason(error)}. Install it again: "
            "pip install --force-reinstall openvino"
        ) from error
    finally:
        del sys.modules[TELEMETRY]
        if kept is not None:
            sys.modules[TELEMETRY] = kept
    return openvino


ov = _import_openvino()


@lru_cache(maxsize=1)
def _core() -> Any:
    return ov.Core()


def native_bf16() -> bool:
    """Whether this CPU computes in bfloat16 itself, as OpenVINO sees it; elsewhere it would only lose digits."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOSession:
    """One compiled graph and one request. ``run`` may be called from several threads, which wait for each other."""

    def __init__(self, graph: Path, options: SessionOptions) -> None:
        """Raises GraphError for a graph it cannot load, BackendError where bf16 was asked of a CPU without it."""
        self.graph = graph
        threads = options.threads if options.threads is not None else len(os.sched_getaffinity(0))
        if threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        if options.bf16 and not native_bf16():
            raise BackendError(
                "this CPU does not compute in bfloat16: run without bf16, or on ONNX Runtime (--backend onnxruntime)"
            )
        if not graph.is_file() or graph.stat().st_size == 0:
            raise GraphError(f"{graph} is missing or empty; expected an ONNX graph. Build the bundle again")
        precision = "bf16" if options.bf16 else "f32"
        compiled, self._specs = _compile(graph, threads, precision)
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        computes = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if computes != precision:
            raise BackendError(f"asked OpenVINO to compute in {precision}, it computes in {computes}")
        self.provider = f"OpenVINO {_release()} CPU, {precision}"
        self._request: Any = compiled.create_infer_request()
        self._lock = threading.Lock()

    def __enter__(self) -> OpenVINOSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._request = None

    def specs(self) -> GraphContract:
        self._check_open()
        return self._specs

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The outputs are arrays of their own. Raises BackendError for feeds that are not the graph's."""
        self._check_feeds(feeds)
        with self._lock:
            self._check_open()
            try:
                # Without copies in and out; out of the request's memory, which the next run overwrites, here below.
                self._request.infer(dict(feeds), share_inputs=True, share_outputs=True)
            except Exception as error:  # openvino raises RuntimeError and classes of its own
                raise self._refusal(_reason(error)) from error
            outputs = [np.array(self._request.get_output_tensor(i).data) for i in range(len(self._specs.outputs))]
        return {spec.name: value for spec, value in zip(self._specs.outputs, outputs, strict=True)}

    def _check_open(self) -> None:
        if self._request is None:
            raise BackendError(f"the session of {self.graph} is closed")

    def _check_feeds(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """What OpenVINO lets pass: it converts wrong types, takes a missing input for an empty one, and was seen to
        answer where there were more labels than points.
        """
        wanted = {spec.name: spec for spec in self._specs.inputs}
        if feeds.keys() != wanted.keys():
            raise self._refusal(f"expected {', '.join(wanted)}, got {', '.join(sorted(map(str, feeds))) or 'none'}")
        lengths: dict[str, int] = {}
        for name, spec in wanted.items():
            value = feeds[name]
            if str(value.dtype) != spec.dtype or not spec.accepts(value.shape):
                got = f"{value.dtype} {value.shape}"
                raise self._refusal(f"expected '{name}' of {spec.dtype} {spec.shape}, got {got}")
            for axis, length in zip(spec.shape, value.shape, strict=True):
                if isinstance(axis, str) and axis != DYNAMIC and lengths.setdefault(axis, length) != length:
                    raise self._refusal(f"'{name}' is of {length} {axis}, the inputs before it of {lengths[axis]}")

    def _refusal(self, why: str) -> BackendError:
        return BackendError(f"OpenVINO failed to run {self.graph.name}: {why}")


# Rounded to INT8, summed in FP32. The name of the CPU plugin's own switch (src/plugins/intel_cpu/src/config.cpp).
AS_WRITTEN = {"LP_TRANSFORMS_MODE": False}


def _compile(graph: Path, threads: int, precision: str) -> tuple[Any, GraphContract]:
    """The compiled graph and its inputs and outputs."""
    from openvino.frontend import FrontEndManager

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Where the CPU has AMX or AVX512-BF16, OpenVINO computes FP32 graphs in bfloat16 unless told not to.
        "INFERENCE_PRECISION_HINT": precision,
        # Nor may it round to INT8 what the graph did not: activations of layers whose weights alone are INT8.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        # Pinned, two processes of one thread each share the first core and leave the others idle.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        # The ONNX reader itself: Core.read_model tries every other format too, and these write to stderr.
        reader = FrontEndManager().load_by_framework("onnx")
        model = reader.convert(reader.load(str(graph)))
        # From the model: the compiled one also names an output after tensors that were merged with it.
        specs = GraphContract(tuple(map(_spec, model.inputs)), tuple(map(_spec, model.outputs)))
        if int8_saturates():
            # Without VNNI its INT8 convolutions add pairs of products in 16 bits, which saturate (reference: mask IoU
            # 0.82 instead of 0.98), so Q/DQ graphs are computed as they are written there.
            settings |= AS_WRITTEN
        compiled = _core().compile_model(model, "CPU", settings)
        if _signed(model) and _in_uint8(compiled):
            # A CPU with VNNI but no AMX (Zen 4, 2026.4.1): the same loss, 0.83 instead of 0.98.
            compiled = _core().compile_model(model, "CPU", settings | AS_WRITTEN)
    except Exception as error:  # openvino raises RuntimeError and classes of its own
        raise GraphError(f"OpenVINO {_release()} cannot load {graph}: {_reason(error)}") from error
    if not specs.outputs:
        raise GraphError(f"{graph} is not an ONNX graph: OpenVINO finds no outputs in it. Build the bundle again")
    return compiled, specs


def _in_uint8(compiled: Any) -> bool:
    """Whether a convolution of the compiled graph takes uint8, by OpenVINO's own account."""
    told = (op.get_rt_info() for op in compiled.get_runtime_model().get_ops())
    return any(t["layerType"].astype(str) == "Convolution" and t["runtimePrecision"].astype(str) == "u8" for t in told)


def _signed(model: Any) -> bool:
    """Whether activations of the graph are rounded to int8, as for TensorRT, and not to uint8."""
    return any(
        op.get_type_name() == "Convert"
        and op.get_output_element_type(0).get_type_name() == "i8"
        and op.input_value(0).get_node().get_type_name() == "FakeQuantize"
        for op in model.get_ops()
    )


def _spec(port: Any) -> TensorSpec:
    dimensions = list(port.partial_shape)
    names = AXES.get(port.any_name, ())
    axes = [name if isinstance(name, str) else DYNAMIC for name in names] if len(names) == len(dimensions) else []
    axes = axes or [DYNAMIC] * len(dimensions)
    shape = tuple(a if d.is_dynamic else int(d.get_length()) for a, d in zip(axes, dimensions, strict=True))
    return TensorSpec(port.any_name, str(port.element_type.to_dtype()), shape)


def _release() -> str:
    """As 2026.4.1, without the number of the build."""
    return str(ov.__version__).partition("-")[0]


def _reason(error: Exception) -> str:
    """What went wrong: the last line of a message of several, those above say where in OpenVINO's sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
