"""Backends: one file each, behind four methods. Nothing here imports torch.

A session runs one graph. Tensors go in and out by name; a backend is a context manager, so that what it holds is freed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias, cast

import numpy.typing as npt

from edgesam_deploy.contract import GraphContract
from edgesam_deploy.errors import InputError

# Since 1.31, importing ONNX Runtime leaves an id and a database in the home folder and reports to its makers, unless
# this is set before. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A numpy array, or what a backend keeps on its device in place of one (np.asarray copies it to the host).
Tensor: TypeAlias = Any
Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a session runs; a backend takes what concerns it.

    threads: CPU threads inside an operator, None for all cores. cuda: the implementation of the CUDA seam
    (``runtime.cuda``). cuda_graph: launch engines as recorded CUDA graphs. stay: outputs left on the device. host_code:
    let a version-compatible plan run the code that it carries for the host; for plans that one built oneself. bf16:
    compute in bfloat16 what the graph has in FP32; OpenVINO on a CPU that can, every other backend refuses. frugal:
    ONNX Runtime takes as little memory as it can: nodes in the file's order, nothing kept for the next run.
    """

    threads: int | None = None
    cuda: str = "ctypes"
    cuda_graph: bool = False
    stay: tuple[str, ...] = ()
    host_code: bool = False
    bf16: bool = False
    frugal: bool = False


class Session(Protocol):
    """One loaded graph."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def specs(self) -> GraphContract:
        """Names, dtypes and shapes of the inputs and outputs, as the backend sees them."""

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once: arrays by input name -> arrays by output name."""


# name -> module:class; imported only when a session is opened.
BACKENDS = {
    "onnxruntime": "edgesam_deploy.runtime.onnxruntime:OnnxRuntimeSession",
    "openvino": "edgesam_deploy.runtime.openvino:OpenVINOSession",
    "tensorrt": "edgesam_deploy.runtime.tensorrt:tensorrt_session",
    "tensorrt_rtx": "edgesam_deploy.runtime.tensorrt:tensorrt_rtx_session",
}
DEFAULT_BACKEND = "onnxruntime"
# Those that run the ONNX files themselves, on the CPU, any of them any bundle for a CPU.
CPU_BACKENDS = ("onnxruntime", "openvino")
BF16_BACKENDS = ("openvino",)


def installed(backend: str) -> bool:
    """Whether a CPU backend's package is there, which is named as the backend is. Nothing is imported."""
    return find_spec(backend) is not None


def open_session(graph: Path, backend: str = DEFAULT_BACKEND, options: SessionOptions | None = None) -> Session:
    """A session for a graph or engine file. options: None for the defaults."""
    options = options or SessionOptions()
    try:
        module, _, name = BACKENDS[backend].partition(":")
    except KeyError:
        raise InputError(f"unknown backend '{backend}', expected one of {sorted(BACKENDS)}") from None
    if options.bf16 and backend not in BF16_BACKENDS:
        raise InputError(f"{backend} does not compute in bf16: that is for {', '.join(BF16_BACKENDS)}")
    return cast(Callable[..., Session], getattr(import_module(module), name))(graph, options)
