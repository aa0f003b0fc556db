"""The CUDA seam on pycuda: a fake of its driver module over the fake libcudart, and the same session on it."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgesam_deploy.errors import BackendError
from edgesam_deploy.runtime import SessionOptions, bindings
from edgesam_deploy.runtime.cuda import Cuda
from edgesam_deploy.runtime.tensorrt import TensorRTSession

from . import fake_tensorrt
from .fake_cudart import OUT_OF_MEMORY, FakeCudart
from .fake_tensorrt import plan_bytes

PLAN = plan_bytes({"coords": ["FLOAT", [1, 2], [4, 2]]}, {"masks": ["FLOAT", "coords"]})


class Error(Exception):
    """pycuda.driver.Error, the base of all that pycuda raises for a return code."""


class FakeDriver:
    """The part of ``pycuda.driver`` that the seam uses. As there, an object frees what it holds when it goes."""

    Error = Error
    event_flags = SimpleNamespace(BLOCKING_SYNC=1)

    def __init__(self, cudart: FakeCudart) -> None:
        self.cudart = cudart

    def check(self, function: str, *arguments: Any) -> None:
        if code := getattr(self.cudart, function)(*arguments):
            raise Error(f"{function} failed: {code}")

    def made(self, function: str, *arguments: Any) -> int:
        result = ctypes.c_void_p()
        self.check(function, ctypes.byref(result), *arguments)
        return result.value or 0

    def get_version(self) -> tuple[int, int, int]:
        return (12, 6, 0)

    def mem_get_info(self) -> tuple[int, int]:
        return (3 << 30, 8 << 30)

    def mem_alloc(self, size: int) -> Held:
        return Held(self, self.made("cudaMalloc", ctypes.c_size_t(size)), "cudaFree")

    def pagelocked_empty(self, shape: int, dtype: Any) -> np.ndarray[Any, Any]:
        held = Held(self, self.made("cudaMallocHost", ctypes.c_size_t(shape)), "cudaFreeHost")
        held.__array_interface__ = {"shape": (shape,), "typestr": "|u1", "data": (int(held), False), "version": 3}
        return np.asarray(held)

    def memcpy_htod_async(self, dest: int, src: np.ndarray[Any, Any], stream: Stream | None) -> None:
        self.copy(dest, src.ctypes.data, src.nbytes, 1, stream)

    def memcpy_dtoh_async(self, dest: np.ndarray[Any, Any], src: int, stream: Stream | None) -> None:
        self.copy(dest.ctypes.data, src, dest.nbytes, 2, stream)

    def copy(self, target: int, source: int, size: int, kind: int, stream: Stream | None) -> None:
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        handle = ctypes.c_void_p(stream.handle if stream else 0)
        self.check("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), ctypes.c_int(kind), handle)

    def Stream(self) -> Stream:  # noqa: N802
        return Stream(self, self.made("cudaStreamCreateWithFlags", ctypes.c_uint(1)), "cudaStreamDestroy")

    def Event(self, flags: int = 0) -> Event:  # noqa: N802
        return Event(self, self.made("cudaEventCreateWithFlags", ctypes.c_uint(flags)), "cudaEventDestroy")


class Held:
    """Something of CUDA's, destroyed once: when it is told to, or when it goes."""

    __array_interface__: dict[str, Any]

    def __init__(self, driver: FakeDriver, handle: int, destroy: str) -> None:
        self.driver = driver
        self.handle = handle
        self.destroy = destroy

    def __int__(self) -> int:
        return self.handle

    def free(self) -> None:
        handle, self.handle = self.handle, 0
        self.driver.check(self.destroy, ctypes.c_void_p(handle))

    def __del__(self) -> None:
        if self.handle:
            self.free()


class Stream(Held):
    def synchronize(self) -> None:
        self.driver.check("cudaStreamSynchronize", ctypes.c_void_p(self.handle))


class Event(Held):
    def record(self, stream: Stream | None = None) -> None:
        handle = ctypes.c_void_p(stream.handle if stream else 0)
        self.driver.check("cudaEventRecord", ctypes.c_void_p(self.handle), handle)

    def query(self) -> bool:
        return bool(self.driver.cudart.cudaEventQuery(ctypes.c_void_p(self.handle)) == 0)

    def synchronize(self) -> None:
        self.driver.check("cudaEventSynchronize", ctypes.c_void_p(self.handle))

    def time_till(self, other: Event) -> float:
        elapsed = ctypes.c_float()
        pair = ctypes.c_void_p(self.handle), ctypes.c_void_p(other.handle)
        self.driver.check("cudaEventElapsedTime", ctypes.byref(elapsed), *pair)
        return elapsed.value


class Device:
    def compute_capability(self) -> tuple[int, int]:
        return (8, 7)


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudart]:
    """The fake that everything ends in, with modules ``pycuda`` and ``tensorrt`` over it."""
    fake = FakeCudart()
    package, context = ModuleType("pycuda"), ModuleType("pycuda.autoprimaryctx")
    package.autoprimaryctx, package.driver = context, FakeDriver(fake)  # type: ignore[attr-defined]
    context.device = Device()  # type: ignore[attr-defined]
    for name, module in (("pycuda", package), ("pycuda.autoprimaryctx", context), ("pycuda.driver", package.driver)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make(fake))
    monkeypatch.setattr(bindings, "_state", bindings._State())
    yield fake
    sys.modules.pop("edgesam_deploy.runtime.pycuda", None)


@pytest.fixture
def seam(cudart: FakeCudart) -> Cuda:
    sys.modules.pop("edgesam_deploy.runtime.pycuda", None)
    found: Cuda = importlib.import_module("edgesam_deploy.runtime.pycuda").PycudaCuda()
    return found


def test_facts_of_the_device(seam: Cuda) -> None:
    assert seam.compute_capability() == "8.7"
    assert seam.runtime_version() == (12, 6)
    assert seam.memory_info() == (3 << 30, 8 << 30)


def test_a_session_runs_on_it_and_frees_all(seam: Cuda, cudart: FakeCudart, tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(PLAN)
    with TensorRTSession(tmp_path / "x.engine", SessionOptions(), "tensorrt", seam) as session:
        for prompts in (3, 4, 1):
            coords = np.arange(prompts * 2, dtype=np.float32).reshape(prompts, 2)
            np.testing.assert_array_equal(session.run({"coords": coords})["masks"], coords * 2)
        assert cudart.live == {"stream": 1, "device": 2, "pinned": 2}
    assert cudart.live == {}


def test_events_time_what_lies_between_them(seam: Cuda, cudart: FakeCudart) -> None:
    stream, start, end = seam.stream_create(), seam.event_create(), seam.event_create()
    seam.event_record(start, stream)
    cudart.submit(stream, lambda: None)
    seam.event_record(end, stream)
    assert not seam.event_query(end)
    seam.event_synchronize(end)
    assert seam.event_query(end)
    assert seam.elapsed_ms(start, end) == 2.0
    for event in (start, end):
        seam.event_destroy(event)
    seam.stream_destroy(stream)
    assert cudart.live == {}


def test_graphs_are_refused_with_the_way_out(seam: Cuda, tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(PLAN)
    with (
        TensorRTSession(tmp_path / "x.engine", SessionOptions(cuda_graph=True), "tensorrt", seam) as session,
        pytest.raises(BackendError, match="pycuda cannot capture CUDA graphs: use the ctypes implementation"),
    ):
        session.run({"coords": np.zeros((1, 2), np.float32)})


def test_a_failed_call_is_one_of_our_errors(seam: Cuda, cudart: FakeCudart) -> None:
    cudart.fail = {"cudaMalloc": OUT_OF_MEMORY}
    with pytest.raises(BackendError, match="cudaMalloc failed: 2"):
        seam.malloc(64)
