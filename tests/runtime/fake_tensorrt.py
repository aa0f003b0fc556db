"""The module ``tensorrt`` as ``runtime.tensorrt`` sees it, over the fake libcudart: engines that double their inputs.

A plan is the magic bytes and JSON: ``{"inputs": {name: [type, min, max]}, "outputs": {name: [type, input]}}``. An
output is twice its input, element by element. Only what the package uses is here, under the real bindings' names.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np

from .fake_cudart import FakeCudart

NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT32": np.int32, "BF16": np.uint16}
ACTIVATIONS = 4096


def plan_bytes(inputs: dict[str, Any], outputs: dict[str, Any], magic: bytes = b"ftrt") -> bytes:
    return magic + json.dumps({"inputs": inputs, "outputs": outputs}).encode()


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    UINT8 = 5
    BF16 = 7


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class LayerInformationFormat(Enum):
    ONELINE = 0
    JSON = 1


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class Dims:
    """Not a tuple, as in the bindings: a length, and integers by position."""

    def __init__(self, shape: Iterable[int]) -> None:
        self._shape = tuple(shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: int) -> int:
        return self._shape[index]


class Runtime:
    cudart: FakeCudart  # set by make()

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            facts = json.loads(serialized_engine[4:])
        except ValueError:
            self._logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: bad plan\nat line 1")
            return None
        return ICudaEngine(facts, self._logger, self.cudart)


class ICudaEngine:
    device_memory_size_v2 = ACTIVATIONS

    def __init__(self, facts: dict[str, Any], logger: ILogger, cudart: FakeCudart) -> None:
        self._facts = facts
        self._logger = logger
        self._cudart = cudart
        self._names = [*facts["outputs"], *facts["inputs"]]  # in no order that one could count on

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._facts["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[(self._facts["inputs"] | self._facts["outputs"])[name][0]]

    def get_tensor_shape(self, name: str) -> Dims:
        _, low, high = self._facts["inputs"][self._source(name)]
        return Dims(a if a == b else -1 for a, b in zip(low, high, strict=True))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert profile_index == 0
        _, low, high = self._facts["inputs"][name]
        return [Dims(low), Dims(low), Dims(high)]

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def _source(self, name: str) -> str:
        return name if name in self._facts["inputs"] else str(self._facts["outputs"][name][1])


class EngineInspector:
    execution_context: IExecutionContext

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return '{"Layers": ["double"]}' if format is LayerInformationFormat.JSON else "double"


class IExecutionContext:
    refuse = False  # whether the next enqueues are refused; set by the tests
    profiler: IProfiler | None = None

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._seen: set[tuple[tuple[int, ...], ...]] = set()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        _, low, high = self._engine._facts["inputs"][name]
        if len(shape) != len(low) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        shape = self._shapes.get(self._engine._source(name))
        return Dims(shape) if shape is not None else self._engine.get_tensor_shape(name)

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._facts["inputs"] if name not in self._shapes]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        cudart, facts = self._engine._cudart, self._engine._facts
        cudart.calls.append("enqueue")
        work = []
        for output, (_, source) in facts["outputs"].items():
            blocks = [self._block(output), self._block(source)]
            work.append(lambda blocks=blocks: np.copyto(blocks[0], blocks[1] * 2, casting="unsafe"))
        # The first run of new shapes allocates, which no capture allows.
        fresh = tuple(self._shapes.values()) not in self._seen
        if self.refuse or (fresh and cudart.captures):
            self._engine._logger.log(Severity.ERROR, "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (boom)")
            return False
        self._seen.add(tuple(self._shapes.values()))
        for step in work:
            assert cudart.submit(stream_handle, step) == 0
        if self.profiler is not None:
            self.profiler.report_layer_time("double", 0.25)
            self.profiler.report_layer_time("double", 0.5)
            self.profiler.report_layer_time("reformat", 0.125)
        return True

    def _block(self, name: str) -> Any:
        """The array at a tensor's address, which must be device memory that is large enough."""
        dtype = np.dtype(NUMPY[self._engine.get_tensor_dtype(name).name])
        shape, address = tuple(self.get_tensor_shape(name)), self._addresses[name]
        size = int(np.prod(shape)) * dtype.itemsize
        assert self._engine._cudart.block("device", address, size), f"{name}: {size} bytes at {address} are not ours"
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return memory.view(dtype).reshape(shape)


CLASSES = (
    DataType,
    Dims,
    EngineInspector,
    ICudaEngine,
    IExecutionContext,
    ILogger,
    IProfiler,
    LayerInformationFormat,
    Runtime,
    TensorIOMode,
)


def make(cudart: FakeCudart, version: str = "10.3.0", name: str = "tensorrt") -> ModuleType:
    """A module for ``sys.modules``. Its engines work on the memory of ``cudart``."""
    module = ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]
    for found in CLASSES:
        setattr(module, found.__name__, found)
    module.Runtime = type("Runtime", (Runtime,), {"cudart": cudart})  # type: ignore[attr-defined]
    return module
