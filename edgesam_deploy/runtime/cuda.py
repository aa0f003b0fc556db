"""CUDA from Python without a C extension of our own: ctypes on libcudart 12 or 13, or pycuda where the user prefers it.

One seam, ``Cuda``: addresses and handles are plain integers (0 is the null pointer and the default stream), sizes are
bytes, times are milliseconds. Every return code is checked; a failing call raises BackendError with the call's name,
CUDA's own words and the code. ``runtime.tensorrt`` and the latency measurement know nothing below this seam.

Nothing is loaded on import. ``open_cuda`` probes the driver first: without one it says so, and no other call is made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from edgesam_deploy.errors import BackendError, InputError

IMPLEMENTATIONS = ("ctypes", "pycuda")
RUNTIME_MAJORS = (13, 12)

# driver_types.h: cudaMemcpyKind, cudaStreamNonBlocking, cudaEventBlockingSync, cudaStreamCaptureModeThreadLocal,
# cudaDeviceAttr.
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC = 1  # waiting for an event sleeps instead of taking a core
_CAPTURE_THREAD_LOCAL = 1
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_BUS_ID_BYTES = 32
_NOT_READY = 600
_NO_DRIVER, _NO_DEVICE = 35, 100  # cudaErrorInsufficientDriver, cudaErrorNoDevice


class Cuda(Protocol):
    """The CUDA calls that inference and its timing need. All copies are asynchronous on a stream."""

    def compute_capability(self) -> str:
        """Of the current device, as ``8.7``."""

    def pci_bus_id(self) -> str:
        """Of the current device, as ``0000:01:00.0``: NVML counts devices in another order."""

    def runtime_version(self) -> tuple[int, int]: ...

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""

    def malloc(self, size_bytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def malloc_host(self, size_bytes: int) -> int:
        """Pinned host memory: copies from and to it are truly asynchronous."""

    def free_host(self, address: int) -> None: ...

    def copy_to_device(self, device: int, host: int, size_bytes: int, stream: int) -> None: ...

    def copy_to_host(self, host: int, device: int, size_bytes: int, stream: int) -> None: ...

    def stream_create(self) -> int: ...

    def stream_synchronize(self, stream: int) -> None: ...

    def stream_destroy(self, stream: int) -> None: ...

    def event_create(self) -> int: ...

    def event_record(self, event: int, stream: int) -> None: ...

    def event_query(self, event: int) -> bool:
        """Whether all work before the event is done."""

    def event_synchronize(self, event: int) -> None: ...

    def elapsed_ms(self, start: int, end: int) -> float: ...

    def event_destroy(self, event: int) -> None: ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what ``work`` enqueues on ``stream`` as an executable graph, without running it."""

    def graph_launch(self, graph: int, stream: int) -> None: ...

    def graph_destroy(self, graph: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Driver:
    """version: the CUDA version that the installed driver supports, as (12, 6). devices: GPUs that it sees."""

    version: tuple[int, int]
    devices: int


def probe() -> Driver:
    """Ask libcuda, the driver's own library, for its version and devices; BackendError if there is none of either.

    Must come before any TensorRT call: without a driver the lean runtime ends the process.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BackendError(
            "no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded): engines need an NVIDIA GPU. In a "
            "container, start it with --gpus all or --runtime nvidia; without a GPU, build for the target 'cpu'"
        ) from None
    version, count = ctypes.c_int(), ctypes.c_int()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDriverGetVersion", (ctypes.byref(version),)),
        ("cuDeviceGetCount", (ctypes.byref(count),)),
    ):
        if code := getattr(library, name)(*arguments):
            raise BackendError(
                f"the NVIDIA driver refuses to start: {name} returned {code}. Check it with nvidia-smi (on a Jetson, "
                "tegrastats), and that this user may open /dev/nvidia*"
            )
    if count.value == 0:
        raise BackendError("the NVIDIA driver sees no GPU; check nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set")
    return Driver((version.value // 1000, version.value % 1000 // 10), count.value)


def open_cuda(implementation: str = "ctypes") -> Cuda:
    """The CUDA seam by the name of its implementation. Raises BackendError if there is no driver or no libcudart."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"unknown CUDA implementation '{implementation}', expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    driver = probe()
    if implementation == "pycuda":
        from edgesam_deploy.runtime.pycuda import PycudaCuda

        return PycudaCuda()
    return CudaRuntime(load_runtime(driver.version[0]))


def load_runtime(driver_major: int) -> ctypes.CDLL:
    """libcudart of the newest major version that the driver can serve: the system's, or one of a Python package."""
    tried = []
    for major in (m for m in RUNTIME_MAJORS if m <= driver_major):
        for name in (f"libcudart.so.{major}", *_packaged(major)):
            tried.append(str(name))
            try:
                return ctypes.CDLL(str(name))
            except OSError:
                continue
    raise BackendError(
        f"cannot load the CUDA runtime, tried {', '.join(tried) or 'nothing: the driver is older than CUDA 12'}. "
        "Install CUDA 12 or 13, or run  pip install nvidia-cuda-runtime-cu12"
    )


def _packaged(major: int) -> list[Path]:
    """Where NVIDIA's Python packages and the CUDA installers put libcudart."""
    spec = find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    folders = [r / f for r in roots for f in (f"cu{major}/lib", "cuda_runtime/lib")]
    folders += [Path(f"/usr/local/cuda-{major}/lib64"), Path("/usr/local/cuda/lib64")]
    return [p for f in folders if (p := f / f"libcudart.so.{major}").is_file()]


class CudaRuntime:
    """``Cuda`` by ctypes on libcudart. Calls release the GIL; one object may serve several threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """library: libcudart, or anything with its functions. Raises BackendError if no device can be used."""
        self._library = library
        library.cudaGetErrorName.restype = ctypes.c_char_p
        library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))

    def compute_capability(self) -> str:
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(device))
        self._call("cudaDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(_CAPABILITY_MAJOR), device)
        self._call("cudaDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(_CAPABILITY_MINOR), device)
        return f"{major.value}.{minor.value}"

    def pci_bus_id(self) -> str:
        device, text = ctypes.c_int(), ctypes.create_string_buffer(_BUS_ID_BYTES)
        self._call("cudaGetDevice", ctypes.byref(device))
        self._call("cudaDeviceGetPCIBusId", text, ctypes.c_int(_BUS_ID_BYTES), device)
        return text.value.decode()

    def runtime_version(self) -> tuple[int, int]:
        version = ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10

    def memory_info(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def malloc(self, size_bytes: int) -> int:
        return self._made("cudaMalloc", ctypes.c_size_t(size_bytes))

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def malloc_host(self, size_bytes: int) -> int:
        return self._made("cudaMallocHost", ctypes.c_size_t(size_bytes))

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", ctypes.c_void_p(address))

    def copy_to_device(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        self._copy(device, host, size_bytes, _HOST_TO_DEVICE, stream)

    def copy_to_host(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        self._copy(host, device, size_bytes, _DEVICE_TO_HOST, stream)

    def stream_create(self) -> int:
        return self._made("cudaStreamCreateWithFlags", ctypes.c_uint(_STREAM_NON_BLOCKING))

    def stream_synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def stream_destroy(self, stream: int) -> None:
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def event_create(self) -> int:
        return self._made("cudaEventCreateWithFlags", ctypes.c_uint(_EVENT_BLOCKING_SYNC))

    def event_record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def event_query(self, event: int) -> bool:
        code = int(self._library.cudaEventQuery(ctypes.c_void_p(event)))
        if code != _NOT_READY:
            self._check("cudaEventQuery", code)
        return code == 0

    def event_synchronize(self, event: int) -> None:
        self._call("cudaEventSynchronize", ctypes.c_void_p(event))

    def elapsed_ms(self, start: int, end: int) -> float:
        elapsed = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(elapsed), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return float(elapsed.value)

    def event_destroy(self, event: int) -> None:
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        graph = ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(_CAPTURE_THREAD_LOCAL))
        try:
            work()
        except BaseException:
            # A stream must leave capture mode whatever happened, or it refuses all further work.
            self._library.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
            if graph.value:
                self._library.cudaGraphDestroy(graph)
            self._library.cudaGetLastError()
            raise
        self._call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            return self._made("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def graph_launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def graph_destroy(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    def _copy(self, target: int, source: int, size_bytes: int, kind: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            ctypes.c_int(kind),
            ctypes.c_void_p(stream),
        )

    def _made(self, function: str, *arguments: Any) -> int:
        """Call a function whose first parameter receives a pointer or handle, and return that."""
        result = ctypes.c_void_p()
        self._call(function, ctypes.byref(result), *arguments)
        return result.value or 0

    def _call(self, function: str, *arguments: Any) -> None:
        self._check(function, int(getattr(self._library, function)(*arguments)))

    def _check(self, function: str, code: int) -> None:
        if code == 0:
            return
        # An error stays set for the thread until it is read, and would be blamed on a later call.
        self._library.cudaGetLastError()
        name = self._library.cudaGetErrorName(code) or b"unknown error"
        text = self._library.cudaGetErrorString(code) or b""
        cure = "; check the driver with nvidia-smi" if code in (_NO_DRIVER, _NO_DEVICE) else ""
        raise BackendError(f"CUDA: {function} failed: {name.decode()} ({code}), {text.decode()}{cure}")
