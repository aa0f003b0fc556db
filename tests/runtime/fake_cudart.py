# ruff: noqa: N802 (the functions are called as CUDA calls them)
"""libcudart as ``runtime.cuda`` sees it through ctypes, on host memory: what is put in its place in these tests.

Work on a stream waits until something synchronizes, as on a GPU: who reads a result too early gets the old bytes.
Addresses are checked against what was allocated, and everything that is made must be destroyed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

INVALID, OUT_OF_MEMORY, NOT_READY, CAPTURE_UNSUPPORTED = 1, 2, 600, 900
NAMES = {
    INVALID: b"cudaErrorInvalidValue",
    OUT_OF_MEMORY: b"cudaErrorMemoryAllocation",
    35: b"cudaErrorInsufficientDriver",
    CAPTURE_UNSUPPORTED: b"cudaErrorStreamCaptureUnsupported",
}
# cudaMemcpyKind -> (kind of the target, kind of the source)
COPIES = {1: ("device", "pinned"), 2: ("pinned", "device")}
# What asks about errors is no call of its own here -> its result type.
UNCOUNTED = {
    "cudaGetErrorName": ctypes.c_char_p,
    "cudaGetErrorString": ctypes.c_char_p,
    "cudaGetLastError": ctypes.c_int,
}


class Function:
    """What ctypes gives for a symbol of a library: it is called, and its result type can be set."""

    def __init__(self, cudart: FakeCudart, name: str) -> None:
        self.cudart = cudart
        self.name = name
        self.restype: Any = ctypes.c_int

    def __call__(self, *arguments: Any) -> Any:
        return self.cudart.call(self.name, self.restype, arguments)


class FakeCudart:
    """calls: the names of the calls so far. fail: number of a call, from 1, or a function's name -> its return code."""

    def __init__(self, capability: tuple[int, int] = (8, 7)) -> None:
        self.capability = capability
        self.calls: list[str] = []
        self.fail: dict[int | str, int] = {}
        self.last_error = 0
        self.memory: dict[int, tuple[str, Any]] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float | None] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.clock_ms = 0.0
        self._functions: dict[str, Function] = {}
        self._next = 0x1000

    def __getattr__(self, name: str) -> Function:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        if not hasattr(type(self), f"_{name}"):
            raise AttributeError(f"undefined symbol: {name}")
        return self._functions.setdefault(name, Function(self, name))

    def call(self, name: str, restype: Any, arguments: tuple[Any, ...]) -> Any:
        if name in UNCOUNTED:
            # Without its type, ctypes would cut a pointer to 32 bits.
            assert restype is UNCOUNTED[name]
            return getattr(self, f"_{name}")(*arguments)
        self.calls.append(name)
        code = self.fail.get(len(self.calls)) or self.fail.get(name) or 0
        if code and name == "cudaStreamEndCapture":
            del self.captures[arguments[0].value]  # it ends whether there was something to capture or not
        code = code or getattr(self, f"_{name}")(*arguments) or 0
        if code not in (0, NOT_READY):
            self.last_error = code
        return code

    @property
    def live(self) -> dict[str, int]:
        """What was made and not destroyed, by kind; empty when all is."""
        kinds = [kind for kind, _ in self.memory.values()]
        counts = {kind: kinds.count(kind) for kind in kinds}
        made = {"stream": self.streams, "event": self.events, "graph": self.graphs, "executable": self.executables}
        return counts | {kind: len(things) for kind, things in made.items() if things}

    def sizes(self, kind: str) -> list[int]:
        """Bytes of each live allocation, in the order in which they were made."""
        return [ctypes.sizeof(block) for found, block in self.memory.values() if found == kind]

    def block(self, kind: str, address: int, size: int) -> bool:
        """Whether these bytes lie in one allocation of a kind."""
        return any(
            found == kind and start <= address and address + size <= start + ctypes.sizeof(block)
            for start, (found, block) in self.memory.items()
        )

    def submit(self, stream: int, work: Callable[[], None]) -> int:
        """Put work on a stream, or into what is being captured there; the code of the call that does."""
        if stream in self.captures:
            self.captures[stream].append(work)
        elif stream in self.streams:
            self.streams[stream].append(work)
        else:
            return INVALID
        return 0

    def _handle(self) -> int:
        self._next += 0x10
        return self._next

    def _drain(self, stream: int) -> None:
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            self.clock_ms += 1.0
            step()

    def _allocate(self, kind: str, result: Any, size: ctypes.c_size_t) -> int:
        if self.captures:
            return CAPTURE_UNSUPPORTED
        block = (ctypes.c_uint8 * size.value)()
        self.memory[ctypes.addressof(block)] = (kind, block)
        result._obj.value = ctypes.addressof(block)
        return 0

    def _release(self, kind: str, address: ctypes.c_void_p) -> int:
        if self.memory.get(address.value or 0, ("", None))[0] != kind:
            return INVALID
        del self.memory[address.value or 0]
        return 0

    def _cudaGetErrorName(self, code: int) -> bytes:
        return NAMES.get(code, b"cudaErrorUnknown")

    def _cudaGetErrorString(self, code: int) -> bytes:
        return b"in words"

    def _cudaGetLastError(self) -> int:
        code, self.last_error = self.last_error, 0
        return code

    def _cudaGetDeviceCount(self, count: Any) -> None:
        count._obj.value = 1

    def _cudaGetDevice(self, device: Any) -> None:
        device._obj.value = 0

    def _cudaDeviceGetAttribute(self, value: Any, attribute: ctypes.c_int, device: ctypes.c_int) -> int:
        # cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute.value]]
        return 0 if device.value == 0 else INVALID

    def _cudaRuntimeGetVersion(self, version: Any) -> None:
        version._obj.value = 12060

    def _cudaMemGetInfo(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = 3 << 30, 8 << 30

    def _cudaMalloc(self, result: Any, size: ctypes.c_size_t) -> int:
        return self._allocate("device", result, size)

    def _cudaMallocHost(self, result: Any, size: ctypes.c_size_t) -> int:
        return self._allocate("pinned", result, size)

    def _cudaFree(self, address: ctypes.c_void_p) -> int:
        return self._release("device", address)

    def _cudaFreeHost(self, address: ctypes.c_void_p) -> int:
        return self._release("pinned", address)

    def _cudaMemcpyAsync(
        self, target: Any, source: Any, size: ctypes.c_size_t, kind: ctypes.c_int, stream: ctypes.c_void_p
    ) -> int:
        to, of = COPIES[kind.value]
        if not (self.block(to, target.value, size.value) and self.block(of, source.value, size.value)):
            return INVALID
        return self.submit(stream.value or 0, lambda: ctypes.memmove(target.value, source.value, size.value) and None)

    def _cudaStreamCreateWithFlags(self, result: Any, flags: ctypes.c_uint) -> int:
        result._obj.value = self._handle()
        self.streams[result._obj.value] = []
        return 0 if flags.value == 1 else INVALID  # cudaStreamNonBlocking

    def _cudaStreamSynchronize(self, stream: ctypes.c_void_p) -> int:
        if stream.value in self.captures:
            return CAPTURE_UNSUPPORTED
        self._drain(stream.value or 0)
        return 0

    def _cudaStreamDestroy(self, stream: ctypes.c_void_p) -> int:
        return 0 if self.streams.pop(stream.value or 0, None) is not None else INVALID

    def _cudaEventCreateWithFlags(self, result: Any, flags: ctypes.c_uint) -> int:
        result._obj.value = self._handle()
        self.events[result._obj.value] = None
        return 0 if not flags.value & 2 else INVALID  # cudaEventDisableTiming

    def _cudaEventRecord(self, event: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        return self.submit(stream.value or 0, lambda: self.events.update({event.value or 0: self.clock_ms}))

    def _cudaEventQuery(self, event: ctypes.c_void_p) -> int:
        return NOT_READY if self.events[event.value or 0] is None else 0

    def _cudaEventSynchronize(self, event: ctypes.c_void_p) -> int:
        for stream in self.streams:
            self._drain(stream)
        return 0 if self.events[event.value or 0] is not None else INVALID

    def _cudaEventElapsedTime(self, elapsed: Any, start: ctypes.c_void_p, end: ctypes.c_void_p) -> int:
        first, last = self.events[start.value or 0], self.events[end.value or 0]
        if first is None or last is None:
            return NOT_READY
        elapsed._obj.value = last - first
        return 0

    def _cudaEventDestroy(self, event: ctypes.c_void_p) -> int:
        del self.events[event.value or 0]
        return 0

    def _cudaStreamBeginCapture(self, stream: ctypes.c_void_p, mode: ctypes.c_int) -> int:
        if stream.value not in self.streams or mode.value != 1:  # cudaStreamCaptureModeThreadLocal
            return INVALID
        self.captures[stream.value or 0] = []
        return 0

    def _cudaStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:
        if stream.value not in self.captures:
            return INVALID
        graph._obj.value = self._handle()
        self.graphs[graph._obj.value] = self.captures.pop(stream.value or 0)
        return 0

    def _cudaGraphInstantiateWithFlags(self, result: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong) -> int:
        result._obj.value = self._handle()
        self.executables[result._obj.value] = self.graphs[graph.value or 0]
        return 0 if flags.value == 0 else INVALID

    def _cudaGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        return 0 if self.graphs.pop(graph.value or 0, None) is not None else INVALID

    def _cudaGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        for work in self.executables[executable.value or 0]:
            self.submit(stream.value or 0, work)
        return 0

    def _cudaGraphExecDestroy(self, executable: ctypes.c_void_p) -> int:
        return 0 if self.executables.pop(executable.value or 0, None) is not None else INVALID
