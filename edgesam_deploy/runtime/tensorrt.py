"""TensorRT engines, ``tensorrt`` and ``tensorrt_rtx`` alike: one plan in one session, CUDA through ``runtime.cuda``.

Device and pinned buffers are made once, for the largest shapes of the plan's shape profile, and reused by every run. An
output named in ``SessionOptions.stay`` is handed on as a DeviceTensor and fed to another session without a copy: the
image embedding never leaves the GPU between encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from edgesam_deploy.contract import GraphContract, TensorSpec
from edgesam_deploy.errors import BackendError, InputError
from edgesam_deploy.runtime import Array, SessionOptions, Tensor
from edgesam_deploy.runtime.bindings import Library, last_error, listen, trt, use
from edgesam_deploy.runtime.buffers import Buffer, DeviceTensor, allocate
from edgesam_deploy.runtime.cuda import Cuda, open_cuda
from edgesam_deploy.runtime.plans import load_plan, read_plan

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
# What a dynamic axis is called in specs: a plan does not keep the names.
DYNAMIC = "?"


class TensorRTSession:
    """One engine and one execution context. Not thread-safe: use one session per thread.

    ``run`` is the four-method session's; ``stage``, ``copy_inputs``, ``enqueue``, ``copy_outputs`` and ``results`` are
    its parts, for timing them apart. Enter it as a context manager, or call ``close``, to free the device's memory.
    """

    def __init__(self, plan: Path, options: SessionOptions, library: str, cuda: Cuda | None = None) -> None:
        """plan: an ``.engine`` file. cuda: another implementation of the seam than ``options`` names.

        Raises BackendError where there is no driver, and for a plan that this TensorRT or this GPU does not take.
        """
        data = read_plan(plan, library)
        self.plan = plan
        self.options = options
        # The driver first: without one, TensorRT's lean runtime ends the process.
        self.cuda = cuda or open_cuda(options.cuda)
        self.library: Library = use(library)
        self.runs = 0
        self.buffers: dict[str, Buffer] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: tuple[object, int] | None = None
        self._closed = False
        with ExitStack() as stack:
            self._engine, self._context = load_plan(data, plan, self.library, options.host_code)
            stack.callback(self._forget)
            self.stream = self.cuda.stream_create()
            stack.callback(self.cuda.stream_destroy, self.stream)
            self._inputs, self._outputs = self._names()
            if unknown := [n for n in options.stay if n not in self._outputs]:
                raise InputError(f"{plan} has no output {', '.join(unknown)} to stay, only {', '.join(self._outputs)}")
            self._allocate(stack)
            stack.callback(self._drop_graph)
            capability = self.cuda.compute_capability()
            self._stack = stack.pop_all()
        self.provider = f"{library} {self.library.version}, compute capability {capability}"

    def __enter__(self) -> TensorRTSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free device and pinned memory, stream, context and engine. Safe to call twice."""
        self._closed = True
        self._stack.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(f"the session of {self.plan} is closed")

    def specs(self) -> GraphContract:
        self._check_open()
        return GraphContract(
            tuple(self._spec(name) for name in self._inputs), tuple(self._spec(name) for name in self._outputs)
        )

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises InputError for feeds that are missing or outside the shape profile, BackendError if CUDA fails."""
        self.stage(feeds)
        self.copy_inputs(self.stream)
        self.enqueue(self.stream)
        self.copy_outputs(self.stream)
        self.cuda.stream_synchronize(self.stream)
        return self.results()

    def stage(self, feeds: Mapping[str, Tensor]) -> None:
        """Take the feeds: shapes and addresses into the context, arrays into pinned memory."""
        self._check_open()
        for name in self._inputs:
            if name not in feeds:
                raise InputError(f"the engine needs the input '{name}', got {', '.join(feeds) or 'none'}")
            self._stage(name, feeds[name])
        unknown = self._context.infer_shapes()
        if unknown:
            raise BackendError(f"TensorRT cannot tell the shapes from the inputs, missing: {', '.join(unknown)}")
        for name in self._outputs:
            self._shapes[name] = tuple(self._context.get_tensor_shape(name))

    def copy_inputs(self, stream: int) -> None:
        """Host to device, for the inputs that were staged as arrays."""
        for name in self._inputs:
            if name in self._from_host:
                self._copy(name, lambda b, size: self.cuda.copy_to_device(b.device, b.host, size, stream))

    def enqueue(self, stream: int) -> None:
        """Launch the engine, or the CUDA graph recorded of it."""
        self.runs += 1
        if not self.options.cuda_graph:
            self._enqueue(stream)
            return
        key = (stream, tuple(self._shapes.items()), tuple(self._addresses.items()))
        if self._graph is None or self._graph[0] != key:
            self._drop_graph()
            # The first run of a shape may still allocate, which a capture forbids.
            self._enqueue(stream)
            self.cuda.stream_synchronize(stream)
            self._graph = (key, self.cuda.capture(stream, lambda: self._enqueue(stream)))
        self.cuda.graph_launch(self._graph[1], stream)

    def copy_outputs(self, stream: int) -> None:
        """Device to host, for the outputs that do not stay."""
        for name in self._outputs:
            if name not in self.options.stay:
                self._copy(name, lambda b, size: self.cuda.copy_to_host(b.host, b.device, size, stream))

    def results(self) -> dict[str, Tensor]:
        """The outputs of the last run: arrays of their own, or DeviceTensors for those that stay."""
        return {
            name: self._staying(name)
            if name in self.options.stay
            else self.buffers[name].array(self._shapes[name]).copy()
            for name in self._outputs
        }

    @property
    def cuda_graph(self) -> bool:
        """Whether ``enqueue`` launches a recorded CUDA graph."""
        return self.options.cuda_graph

    @property
    def device_memory_bytes(self) -> int:
        """What the context needs for activations, and our buffers. Weights are not counted."""
        self._check_open()
        sizes = sum(b.view.size for b in self.buffers.values())
        return int(self._engine.device_memory_size_v2) + sizes

    def inspect(self) -> str:
        """EngineInspector's JSON; ``measure.layers`` reads it. Full only if the plan was built with layer details."""
        self._check_open()
        inspector = self._engine.create_engine_inspector()
        # Without a context, shapes and types of dynamic graphs are left open.
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def layer_times(self, feeds: Mapping[str, Tensor], runs: int) -> list[dict[str, float]]:
        """Milliseconds per layer of each run, by IProfiler. Slower than ``run``: layers are timed apart."""
        samples: list[dict[str, float]] = []

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                samples[-1][layer_name] = samples[-1].get(layer_name, 0.0) + ms

        self._context.profiler = Profiler()
        try:
            for _ in range(runs):
                samples.append({})
                self.stage(feeds)
                self.copy_inputs(self.stream)
                self.runs += 1
                self._enqueue(self.stream)
                self.cuda.stream_synchronize(self.stream)
        finally:
            self._context.profiler = None
        return samples

    def _staying(self, name: str) -> DeviceTensor:
        run, buffer, shape = self.runs, self.buffers[name], self._shapes[name]

        def fetch() -> Array:
            if size := buffer.size_bytes(shape):
                self.cuda.copy_to_host(buffer.host, buffer.device, size, self.stream)
            self.cuda.stream_synchronize(self.stream)
            copied: Array = buffer.array(shape).copy()
            return copied

        def address() -> int | None:
            return buffer.device if self.runs == run and not self._closed else None

        return DeviceTensor(name, shape, buffer.dtype, address, fetch)

    def _forget(self) -> None:
        # In this order: a context must not outlive its engine.
        self._context = None
        self._engine = None

    def _names(self) -> tuple[list[str], list[str]]:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        return inputs, [n for n in names if n not in inputs]

    def _allocate(self, stack: ExitStack) -> None:
        """Buffers for the largest shapes, inputs first: the outputs' shapes follow from them."""
        self._from_host: set[str] = set()
        self._addresses: dict[str, int] = {}
        for name in self._inputs:
            shapes = self._engine.get_tensor_profile_shape(name, 0)
            low, high = tuple(shapes[0]), tuple(shapes[2])
            self.buffers[name] = self._buffer(name, low, high, stack)
            if not self._context.set_input_shape(name, high):
                raise BackendError(f"TensorRT refuses the shape {high} for '{name}'")
        for name in self._outputs:
            high = tuple(self._context.get_tensor_shape(name))
            if any(d < 0 for d in high):
                raise BackendError(f"the largest shape of the engine's output '{name}' is not known: {high}")
            self.buffers[name] = self._buffer(name, high, high, stack)
            self._bind(name, self.buffers[name].device)

    def _buffer(self, name: str, low: tuple[int, ...], high: tuple[int, ...], stack: ExitStack) -> Buffer:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise BackendError(f"the engine's tensor '{name}' has the type {kind}; expected one of {', '.join(DTYPES)}")
        return allocate(self.cuda, np.dtype(DTYPES[kind]), low, high, stack)

    def _stage(self, name: str, value: Tensor) -> None:
        buffer = self.buffers[name]
        shape = tuple(value.shape)
        if not buffer.accepts(shape):
            raise InputError(
                f"the engine was compiled for '{name}' of {buffer.low} to {buffer.high}, got {shape}: give fewer "
                "prompts or points in one call, or compile it again with larger --max-prompts or --max-points"
            )
        if self._shapes.get(name) != shape:
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"TensorRT refuses the shape {shape} for '{name}'")
            self._shapes[name] = shape
        if value.dtype != buffer.dtype:
            raise InputError(f"the engine's input '{name}' is {buffer.dtype}, got {value.dtype}")
        if isinstance(value, DeviceTensor):
            self._from_host.discard(name)
            self._bind(name, value.address)
            return
        buffer.array(shape)[...] = value
        self._from_host.add(name)
        self._bind(name, buffer.device)

    def _bind(self, name: str, address: int) -> None:
        if self._addresses.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"TensorRT refuses the address of '{name}'")
        self._addresses[name] = address

    def _enqueue(self, stream: int) -> None:
        with listen() as messages:
            done = self._context.execute_async_v3(stream)
        if not done:
            raise BackendError(f"{self.plan.name} did not run: {last_error(messages)}")

    def _copy(self, name: str, copy: Callable[[Buffer, int], None]) -> None:
        buffer = self.buffers[name]
        if size := buffer.size_bytes(self._shapes[name]):
            copy(buffer, size)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self.cuda.graph_destroy(self._graph[1])
            self._graph = None

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(DYNAMIC if d < 0 else int(d) for d in self._engine.get_tensor_shape(name))
        return TensorSpec(name, str(self.buffers[name].dtype), shape)


def tensorrt_session(plan: Path, options: SessionOptions) -> TensorRTSession:
    return TensorRTSession(plan, options, "tensorrt")


def tensorrt_rtx_session(plan: Path, options: SessionOptions) -> TensorRTSession:
    return TensorRTSession(plan, options, "tensorrt_rtx")
