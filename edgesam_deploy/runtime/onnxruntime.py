"""ONNX Runtime on the CPU: the default backend, used wherever there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.contract import GraphContract, TensorSpec
from edgesam_deploy.errors import BackendError, GraphError, InputError, MissingExtraError
from edgesam_deploy.runtime import SessionOptions

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

PROVIDER = "CPUExecutionProvider"
# Pad_Fusion folds a zero Pad into MaxPool, whose own padding is -inf: wrong wherever values are negative, as in the
# stem of HGNetV2 (seen with onnxruntime 1.31; onnxsim's issue 290 is the same mistake in another tool).
DISABLED_OPTIMIZERS = ["Pad_Fusion"]
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class OnnxRuntimeSession:
    """One graph in one ``InferenceSession``. ``run`` may be called from several threads at once."""

    def __init__(self, graph: Path, options: SessionOptions) -> None:
        """Raises GraphError for a graph it cannot load, BackendError if it runs elsewhere than asked."""
        self.graph = graph
        self.threads = options.threads if options.threads is not None else len(os.sched_getaffinity(0))
        if self.threads < 1:
            raise InputError(f"threads must be at least 1, got {self.threads}")
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = self.threads
        settings.inter_op_num_threads = 1
        # Idle pools would spin: with two sessions and numpy in one process they take each other's cores (a whole
        # prediction on 2 cores took 100-112 ms with spinning, 45-54 ms without).
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # On x86 without VNNI sums of uint8 x int8 saturate unless weights become uint8. Meant for such CPUs alone; what
        # it does on others has not been measured.
        settings.add_session_config_entry("session.x64quantprecision", "1")
        if options.frugal:
            # The default order may leave all that only a graph output reads to the end, and with it what it reads.
            settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            settings.enable_mem_pattern = settings.enable_cpu_mem_arena = False
        settings.log_severity_level = 3  # errors only: graph optimisation warns about things that are meant
        if not graph.is_file() or graph.stat().st_size == 0:
            raise GraphError(f"{graph} is missing or empty; expected an ONNX graph. Build the bundle again")
        try:
            self._session: Any = ort.InferenceSession(
                str(graph), settings, providers=[PROVIDER], disabled_optimizers=DISABLED_OPTIMIZERS
            )
        except Exception as error:  # onnxruntime raises its own unexported classes
            raise GraphError(f"ONNX Runtime {ort.__version__} cannot load {graph}: {_first_line(error)}") from error
        self.provider = self._session.get_providers()[0]
        if self.provider != PROVIDER:
            raise BackendError(f"asked ONNX Runtime for {PROVIDER}, it runs on {self.provider}")
        self._outputs = [o.name for o in self._session.get_outputs()]

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def specs(self) -> GraphContract:
        session = self._session
        return GraphContract(
            tuple(_spec(i) for i in session.get_inputs()), tuple(_spec(o) for o in session.get_outputs())
        )

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._session is None:
            raise BackendError(f"the session of {self.graph} is closed")
        try:
            results = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed to run {self.graph.name}: {_first_line(error)}") from error
        return {name: np.asarray(value) for name, value in zip(self._outputs, results, strict=True)}


def _spec(node: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d) for d in node.shape)
    return TensorSpec(node.name, _DTYPES.get(node.type, node.type), shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
