"""Device memory as the engine sessions hold it: a buffer per tensor, and outputs that stay where they are."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import BackendError
from edgesam_deploy.runtime.cuda import Cuda


class DeviceTensor:
    """An output that stayed on the device. Valid until its session runs again; ``np.asarray`` copies it to the host."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        address: Callable[[], int | None],
        fetch: Callable[[], npt.NDArray[Any]],
    ) -> None:
        """address: of the tensor, or None once it was overwritten. fetch: a copy of it on the host."""
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._address = address
        self._fetch = fetch

    @property
    def address(self) -> int:
        """On the device. Raises BackendError once the session has run again: another result is there then."""
        address = self._address()
        if address is None:
            raise BackendError(f"'{self.name}' of an earlier run was overwritten; use it before the session runs again")
        return address

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        _ = self.address
        array = self._fetch()
        return array if dtype is None else array.astype(dtype)


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of one input or output: addresses on the device and of pinned host memory, and numpy's view of the latter.

    low, high: the smallest and largest shapes that the plan's shape profile allows.
    """

    device: int
    host: int
    view: npt.NDArray[np.uint8]
    dtype: np.dtype[Any]
    low: tuple[int, ...]
    high: tuple[int, ...]

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize

    def array(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The pinned memory as an array of a shape that fits."""
        return self.view[: self.size_bytes(shape)].view(self.dtype).reshape(shape)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.high) and all(
            low <= n <= high for low, n, high in zip(self.low, shape, self.high, strict=True)
        )


def allocate(cuda: Cuda, dtype: np.dtype[Any], low: tuple[int, ...], high: tuple[int, ...], stack: ExitStack) -> Buffer:
    """A buffer for shapes up to ``high``; ``stack`` frees it."""
    # TensorRT wants an address even for a tensor without elements.
    size = max(int(np.prod(high, dtype=np.int64)) * dtype.itemsize, 1)
    device = cuda.malloc(size)
    stack.callback(cuda.free, device)
    host = cuda.malloc_host(size)
    stack.callback(cuda.free_host, host)
    view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
    return Buffer(device, host, view, dtype, low, high)
