"""The CUDA seam on pycuda, for those whose program lives in it already: the device's primary context is shared.

pycuda compiles on the device (``pip install pycuda``; there are no wheels). It has no stream capture: CUDA graphs need
the ctypes implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgesam_deploy.errors import BackendError, MissingExtraError

try:
    import pycuda.autoprimaryctx
    import pycuda.driver as driver
except ModuleNotFoundError as error:
    raise MissingExtraError("pycuda", "pycuda") from error
except Exception as error:  # its own library, or CUDA, does not start
    raise BackendError(f"pycuda is installed but does not start: {error}; install it again, or use ctypes") from error


@contextmanager
def _told() -> Iterator[None]:
    """pycuda raises its own errors; out of the seam comes BackendError."""
    try:
        yield
    except driver.Error as error:
        raise BackendError(f"pycuda: {error}") from error


class PycudaCuda:
    """``Cuda`` by pycuda. pycuda's objects free what they hold when they go, so they are kept by their integer."""

    def __init__(self) -> None:
        self._device: Any = pycuda.autoprimaryctx.device
        self._kept: dict[int, Any] = {}

    @_told()
    def compute_capability(self) -> str:
        major, minor = self._device.compute_capability()
        return f"{major}.{minor}"

    @_told()
    def pci_bus_id(self) -> str:
        return str(self._device.pci_bus_id())

    @_told()
    def runtime_version(self) -> tuple[int, int]:
        version = driver.get_version()
        return int(version[0]), int(version[1])

    @_told()
    def memory_info(self) -> tuple[int, int]:
        free, total = driver.mem_get_info()
        return int(free), int(total)

    @_told()
    def malloc(self, size_bytes: int) -> int:
        return self._keep(driver.mem_alloc(size_bytes))

    @_told()
    def free(self, address: int) -> None:
        self._kept.pop(address).free()

    @_told()
    def malloc_host(self, size_bytes: int) -> int:
        array = driver.pagelocked_empty(size_bytes, np.uint8)
        self._kept[array.ctypes.data] = array
        return int(array.ctypes.data)

    @_told()
    def free_host(self, address: int) -> None:
        self._kept.pop(address).base.free()

    @_told()
    def copy_to_device(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        driver.memcpy_htod_async(device, self._host(host, size_bytes), self._stream(stream))

    @_told()
    def copy_to_host(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        driver.memcpy_dtoh_async(self._host(host, size_bytes), device, self._stream(stream))

    @_told()
    def stream_create(self) -> int:
        stream = driver.Stream()
        self._kept[stream.handle] = stream
        return int(stream.handle)

    @_told()
    def stream_synchronize(self, stream: int) -> None:
        self._kept[stream].synchronize()

    @_told()
    def stream_destroy(self, stream: int) -> None:
        del self._kept[stream]

    @_told()
    def event_create(self) -> int:
        event = driver.Event(driver.event_flags.BLOCKING_SYNC)  # waiting sleeps, as in the other implementation
        self._kept[id(event)] = event
        return id(event)

    @_told()
    def event_record(self, event: int, stream: int) -> None:
        self._kept[event].record(self._stream(stream))

    @_told()
    def event_query(self, event: int) -> bool:
        return bool(self._kept[event].query())

    @_told()
    def event_synchronize(self, event: int) -> None:
        self._kept[event].synchronize()

    @_told()
    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._kept[start].time_till(self._kept[end]))

    @_told()
    def event_destroy(self, event: int) -> None:
        del self._kept[event]

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        raise BackendError("pycuda cannot capture CUDA graphs: use the ctypes implementation, or leave the graph off")

    def graph_launch(self, graph: int, stream: int) -> None:
        raise BackendError("pycuda cannot launch CUDA graphs: use the ctypes implementation")

    def graph_destroy(self, graph: int) -> None:
        raise BackendError("pycuda has no CUDA graphs to destroy")

    def _keep(self, thing: Any) -> int:
        self._kept[int(thing)] = thing
        return int(thing)

    def _stream(self, stream: int) -> Any:
        return self._kept[stream] if stream else None

    def _host(self, address: int, size_bytes: int) -> Any:
        """The first bytes of pinned memory at ``address``, where pycuda wants an array."""
        return self._kept[address][:size_bytes]
