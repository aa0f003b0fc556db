"""NVIDIA's management library through the optional package ``nvidia-ml-py`` (module ``pynvml``)."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Nvml:
    """An open NVML and one GPU. Close it when done.

    gpu: NVML's index (PCI order, not CUDA's; CUDA_VISIBLE_DEVICES does not change it), or the PCI bus id, as text,
    that CUDA gives for a device (``cudaDeviceGetPCIBusId``).
    """

    def __init__(self, library: types.ModuleType, gpu: int | str) -> None:
        self.library = library
        by = library.nvmlDeviceGetHandleByPciBusId if isinstance(gpu, str) else library.nvmlDeviceGetHandleByIndex
        self.handle = by(gpu)
        name = library.nvmlDeviceGetName(self.handle)
        # Releases of the package before 11.5 gave bytes.
        self.name = name.decode() if isinstance(name, bytes) else str(name)

    def ask(self, query: str, *arguments: Any) -> Any:
        """The answer of ``nvmlDevice<query>`` for this GPU, None where the GPU or the driver does not support it."""
        return self._or_none(lambda: getattr(self.library, f"nvmlDevice{query}")(self.handle, *arguments))

    def close(self) -> None:
        self._or_none(self.library.nvmlShutdown)

    def _or_none(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except self.library.NVMLError:
            return None


def open_nvml(gpu: int | str = 0) -> Nvml | str:
    """Open NVML for a GPU, or say in one sentence why that is not possible."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return "NVML: the Python package nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        return f"NVML: {error}"
    try:
        return Nvml(library, gpu)
    except library.NVMLError as error:
        library.nvmlShutdown()
        return f"NVML: GPU {gpu}: {error}"
