"""The CUDA seam over a libcudart of ours, the driver probe over a libcuda of ours: what is called, what is said."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesam_deploy.errors import BackendError, InputError, MissingExtraError
from edgesam_deploy.runtime import cuda
from edgesam_deploy.runtime.cuda import CudaRuntime, load_runtime, open_cuda, probe

from .fake_cudart import CAPTURE_UNSUPPORTED, OUT_OF_MEMORY, FakeCudart


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


@pytest.fixture
def runtime(cudart: FakeCudart) -> CudaRuntime:
    opened = CudaRuntime(cudart)  # type: ignore[arg-type]
    cudart.calls.clear()
    return opened


def pinned(address: int, size: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def test_facts_of_the_device(runtime: CudaRuntime, cudart: FakeCudart) -> None:
    assert runtime.compute_capability() == "8.7"
    assert runtime.runtime_version() == (12, 6)
    assert runtime.memory_info() == (3 << 30, 8 << 30)
    cudart.capability = (12, 1)
    assert runtime.compute_capability() == "12.1"


def test_bytes_make_the_round_trip_when_the_stream_is_waited_for(runtime: CudaRuntime, cudart: FakeCudart) -> None:
    stream, device = runtime.stream_create(), runtime.malloc(64)
    source, target = runtime.malloc_host(64), runtime.malloc_host(64)
    pinned(source, 64)[:] = np.arange(64)
    runtime.copy_to_device(device, source, 64, stream)
    runtime.copy_to_host(target, device, 48, stream)
    assert not pinned(target, 64).any()
    runtime.stream_synchronize(stream)
    assert pinned(target, 64).tolist() == [*range(48), *[0] * 16]
    for free, address in ((runtime.free, device), (runtime.free_host, source), (runtime.free_host, target)):
        free(address)
    runtime.stream_destroy(stream)
    assert cudart.live == {}


def test_events_time_what_lies_between_them(runtime: CudaRuntime, cudart: FakeCudart) -> None:
    stream, start, end = runtime.stream_create(), runtime.event_create(), runtime.event_create()
    runtime.event_record(start, stream)
    for _ in range(3):
        cudart.submit(stream, lambda: None)
    runtime.event_record(end, stream)
    assert not runtime.event_query(end)
    runtime.event_synchronize(end)
    assert runtime.event_query(end)
    assert runtime.elapsed_ms(start, end) == 4.0  # the three, and the second record itself
    for event in (start, end):
        runtime.event_destroy(event)
    runtime.stream_destroy(stream)
    assert cudart.live == {}


def test_a_graph_is_recorded_without_running_and_launched_as_often_as_wanted(
    runtime: CudaRuntime, cudart: FakeCudart
) -> None:
    stream, ran = runtime.stream_create(), []
    graph = runtime.capture(stream, lambda: cudart.submit(stream, lambda: ran.append(1)) and None)
    runtime.stream_synchronize(stream)
    assert ran == []
    for _ in range(3):
        runtime.graph_launch(graph, stream)
    runtime.stream_synchronize(stream)
    assert ran == [1, 1, 1]
    assert cudart.live == {"stream": 1, "executable": 1}
    runtime.graph_destroy(graph)
    runtime.stream_destroy(stream)
    assert cudart.live == {}


def broken_work(cudart: FakeCudart, stream: int) -> None:
    cudart.submit(stream, lambda: None)
    raise ValueError("the work failed")


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        ({}, ValueError, "the work failed"),
        ({"cudaStreamEndCapture": CAPTURE_UNSUPPORTED}, ValueError, "the work failed"),
    ],
    ids=["the-work", "the-work-and-the-end"],
)
def test_a_capture_that_fails_leaves_the_stream_usable(
    runtime: CudaRuntime, cudart: FakeCudart, fail: dict[int | str, int], error: type[Exception], message: str
) -> None:
    stream = runtime.stream_create()
    cudart.fail = fail
    with pytest.raises(error, match=message):
        runtime.capture(stream, lambda: broken_work(cudart, stream))
    cudart.fail = {}
    assert cudart.captures == {}
    assert cudart.live == {"stream": 1}
    assert cudart.last_error == 0
    runtime.stream_synchronize(stream)


@pytest.mark.parametrize(
    "function", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"]
)
def test_a_capture_that_cuda_refuses_leaves_nothing_behind(
    runtime: CudaRuntime, cudart: FakeCudart, function: str
) -> None:
    stream = runtime.stream_create()
    cudart.fail = {function: CAPTURE_UNSUPPORTED}
    with pytest.raises(BackendError, match=rf"{function} failed: cudaErrorStreamCaptureUnsupported \(900\)"):
        runtime.capture(stream, lambda: None)
    assert cudart.captures == {}
    assert cudart.live == {"stream": 1}
    assert cudart.last_error == 0


CALLS: dict[str, Callable[[CudaRuntime], object]] = {
    "cudaGetDevice": lambda c: c.compute_capability(),
    "cudaDeviceGetAttribute": lambda c: c.compute_capability(),
    "cudaRuntimeGetVersion": lambda c: c.runtime_version(),
    "cudaMemGetInfo": lambda c: c.memory_info(),
    "cudaMalloc": lambda c: c.malloc(8),
    "cudaFree": lambda c: c.free(8),
    "cudaMallocHost": lambda c: c.malloc_host(8),
    "cudaFreeHost": lambda c: c.free_host(8),
    "cudaMemcpyAsync": lambda c: c.copy_to_device(8, 8, 8, 0),
    "cudaStreamCreateWithFlags": lambda c: c.stream_create(),
    "cudaStreamSynchronize": lambda c: c.stream_synchronize(8),
    "cudaStreamDestroy": lambda c: c.stream_destroy(8),
    "cudaEventCreateWithFlags": lambda c: c.event_create(),
    "cudaEventRecord": lambda c: c.event_record(8, 8),
    "cudaEventQuery": lambda c: c.event_query(8),
    "cudaEventSynchronize": lambda c: c.event_synchronize(8),
    "cudaEventElapsedTime": lambda c: c.elapsed_ms(8, 8),
    "cudaEventDestroy": lambda c: c.event_destroy(8),
    "cudaStreamBeginCapture": lambda c: c.capture(8, lambda: None),
    "cudaGraphLaunch": lambda c: c.graph_launch(8, 8),
    "cudaGraphExecDestroy": lambda c: c.graph_destroy(8),
}


@pytest.mark.parametrize("function", CALLS)
def test_every_return_code_is_checked_and_cleared(runtime: CudaRuntime, cudart: FakeCudart, function: str) -> None:
    cudart.fail = {function: OUT_OF_MEMORY}
    with pytest.raises(BackendError) as caught:
        CALLS[function](runtime)
    assert str(caught.value) == f"CUDA: {function} failed: cudaErrorMemoryAllocation (2), in words"
    assert cudart.last_error == 0


def test_without_a_usable_device_the_runtime_is_refused(cudart: FakeCudart) -> None:
    cudart.fail = {"cudaGetDeviceCount": 35}
    with pytest.raises(BackendError, match=r"cudaErrorInsufficientDriver \(35\).*nvidia-smi"):
        CudaRuntime(cudart)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("driver", "majors"), [(13, ["13", "12"]), (14, ["13", "12"]), (12, ["12"])], ids=["13", "newer", "12"]
)
def test_the_runtime_library_is_no_newer_than_the_driver(
    monkeypatch: pytest.MonkeyPatch, driver: int, majors: list[str]
) -> None:
    tried: list[str] = []

    def refuse(name: str) -> None:
        tried.append(name)
        raise OSError("not here")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(
        BackendError, match=r"cannot load the CUDA runtime, tried libcudart\.so\.1.*pip install"
    ) as caught:
        load_runtime(driver)
    assert [name.rpartition(".")[2] for name in tried if "/" not in name] == majors
    assert all(name in str(caught.value) for name in tried)


def test_a_driver_older_than_cuda_12_is_told_so() -> None:
    with pytest.raises(BackendError, match="the driver is older than CUDA 12"):
        load_runtime(11)


def test_the_runtime_library_of_a_python_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    libraries = [tmp_path / "nvidia" / folder for folder in ("cu13/lib", "cuda_runtime/lib")]
    for folder, major in zip(libraries, (13, 12), strict=True):
        folder.mkdir(parents=True)
        (folder / f"libcudart.so.{major}").touch()
    spec = importlib.util.spec_from_loader("nvidia", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(tmp_path / "nvidia")]
    monkeypatch.setattr(cuda, "find_spec", lambda name: spec)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name if "/" in name else (_ for _ in ()).throw(OSError(name)))
    assert str(load_runtime(13)) == str(libraries[0] / "libcudart.so.13")
    assert str(load_runtime(12)) == str(libraries[1] / "libcudart.so.12")


def test_without_a_driver_the_probe_says_so_and_nothing_else_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(name: str) -> None:
        asked.append(name)
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for attempt in (probe, open_cuda, lambda: open_cuda("pycuda")):
        with pytest.raises(BackendError, match=r"no NVIDIA driver on this machine \(libcuda.so.1 cannot be loaded\)"):
            attempt()
    assert asked == ["libcuda.so.1"] * 3


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(InputError, match="unknown CUDA implementation 'cupy', expected one of ctypes, pycuda"):
        open_cuda("cupy")


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is not None, reason="pycuda is installed")
def test_without_pycuda_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"edgesam-deploy\[pycuda\]"):
        importlib.import_module("edgesam_deploy.runtime.pycuda")


LIBCUDA = """
#include <stdlib.h>
static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
int cuInit(unsigned flags) { return number("FAKE_INIT"); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_VERSION"); return 0; }
int cuDeviceGetCount(int *count) { *count = number("FAKE_DEVICES"); return number("FAKE_COUNT_CODE"); }
"""
PROBE = """
from edgesam_deploy.errors import BackendError
from edgesam_deploy.runtime.cuda import probe
try:
    print(probe())
except BackendError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that answers what the environment says."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for a libcuda of ours")
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "cuda.c").write_text(LIBCUDA, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "cuda.c")]
    subprocess.run(command, check=True, timeout=60)
    return folder


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({"FAKE_VERSION": "12060", "FAKE_DEVICES": "2"}, "Driver(version=(12, 6), devices=2)"),
        ({"FAKE_VERSION": "13000", "FAKE_DEVICES": "1"}, "Driver(version=(13, 0), devices=1)"),
        ({"FAKE_VERSION": "12060"}, "the NVIDIA driver sees no GPU; check nvidia-smi"),
        ({"FAKE_INIT": "999"}, "the NVIDIA driver refuses to start: cuInit returned 999. Check it with nvidia-smi"),
        ({"FAKE_COUNT_CODE": "3"}, "the NVIDIA driver refuses to start: cuDeviceGetCount returned 3."),
    ],
    ids=["two-gpus", "cuda-13", "no-gpu", "no-start", "no-count"],
)
def test_the_probe_reports_what_the_driver_says(libcuda: Path, environment: dict[str, str], answer: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(libcuda), **environment},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(answer)
    assert len(done.stdout.splitlines()) == 1
