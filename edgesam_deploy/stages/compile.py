"""Last stage for a GPU: a typed ONNX graph -> a plan, by TensorRT's own parser and builder.

Runs on the device, so it imports neither torch nor onnx. Precision is in the graph; the builder is told nothing about
it. What the builder is told otherwise is in ``CompileOptions`` and goes into the manifest.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesam_deploy.contract import GraphContract, TensorSpec
from edgesam_deploy.errors import BackendError, GraphError, InputError, OutputError
from edgesam_deploy.files import write_bytes
from edgesam_deploy.runtime.bindings import LOG, Library, Message, last_error, listen, logger, quiet, trt
from edgesam_deploy.runtime.tensorrt import DTYPES

MB = 1 << 20

# (what the builder does, steps done, steps in all)
Progress = Callable[[str, int, int], None]
Extent = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ShapeProfile:
    """(min, opt, max) of the decoder's dynamic axes. A click is 2 points (one is SAM's padding point), a box 2.

    One home for both axes: TensorRT accepts different maxima for point_coords and point_labels without a word.
    """

    prompts: Extent = (1, 1, 16)
    points: Extent = (0, 2, 16)

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("points", 0)):
            extent = getattr(self, name)
            if len(extent) != 3 or not all(isinstance(v, int) for v in extent):
                raise InputError(f"shape profile: {name} must be three integers (min, opt, max), got {extent!r}")
            if not least <= extent[0] <= extent[1] <= extent[2] or extent[2] < 1:
                raise InputError(f"shape profile: {name} must be {least} <= min <= opt <= max, got {extent}")

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """The smallest, usual and largest shape of one input."""
        axes = {"prompts": self.prompts, "points": self.points}
        return tuple(tuple(axes[d][i] if isinstance(d, str) else d for d in spec.shape) for i in range(3))


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What the builder is told.

    workspace_mb: memory it may use for tactics, None for all there is. compute_capabilities: TensorRT for RTX only, as
    ``8.6``; empty for a portable plan. version_compatible, hardware_compatible: a plan for later releases of the same
    major version, and for later GPUs (Ampere and newer, never Jetson); both cost speed. tf32: let FP32 layers multiply
    in TF32 (10 bits of mantissa) where the GPU can. layer_details: names and types for inspection; costs nothing in
    speed. timing_cache: a file that keeps measured tactics between builds.
    """

    workspace_mb: int | None = None
    shape_profile: ShapeProfile = ShapeProfile()
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = True
    layer_details: bool = True
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise InputError(f"the workspace must be at least 1 MB, got {self.workspace_mb}")


@dataclass(frozen=True, slots=True)
class CompileResult:
    """timing_cache_read: whether it started from tactics measured before.

    log: the builder's messages, with all layers (``measure.layers``) if it was asked to be verbose.
    """

    output: Path
    seconds: float
    size_bytes: int
    timing_cache_read: bool
    log: tuple[Message, ...]


def compile_graph(
    graph: Path,
    output: Path,
    contract: GraphContract,
    options: CompileOptions,
    library: Library,
    progress: Progress | None = None,
    verbose: bool = False,
) -> CompileResult:
    """Build the plan of one typed graph. library: what ``runtime.bindings.use`` returned.

    Raises GraphError if the parser refuses the graph or it is not of the contract, BackendError if the builder fails,
    KeyboardInterrupt if it was interrupted (the builder is told to stop; nothing is written).
    """
    started = time.perf_counter()
    with listen("VERBOSE" if verbose else "WARNING") as messages:
        builder = _builder(library, messages)
        # Strongly typed on every release; on TensorRT 11 the flag is accepted and always on.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(network, graph, messages)
        _check_network(network, contract, graph)
        config = builder.create_builder_config()
        _configure(config, options, library)
        if any(isinstance(d, str) for spec in contract.inputs for d in spec.shape):
            profile = builder.create_optimization_profile()
            _set_shapes(profile, contract, options.shape_profile)
            if config.add_optimization_profile(profile) < 0:
                raise BackendError(f"{library.name} refuses the shape profile of {graph}: {last_error(messages)}")
        hit = _read_timing_cache(config, options.timing_cache)
        with _stoppable(config, progress) as stopped, quiet():
            plan = builder.build_serialized_network(network, config)
    if stopped.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise BackendError(f"{library.name} {library.version} cannot build {graph}: {last_error(messages)}")
    write_bytes(output, bytes(plan))
    _write_timing_cache(config, options.timing_cache)
    seconds = time.perf_counter() - started
    return CompileResult(output, seconds, output.stat().st_size, hit, tuple(messages))


def _builder(library: Library, messages: list[Message]) -> trt.Builder:
    try:
        return trt.Builder(logger())
    except TypeError as error:  # the bindings' answer where CUDA cannot start: "factory function returned nullptr"
        raise BackendError(f"{library.name} {library.version} cannot start: {last_error(messages)}") from error


def _parse(network: trt.INetworkDefinition, graph: Path, messages: list[Message]) -> None:
    try:
        data = graph.read_bytes()
    except OSError as error:
        raise GraphError(f"cannot read the ONNX graph {graph}: {error.strerror or error}") from error
    parser = trt.OnnxParser(network, logger())
    if parser.parse(data, str(graph)):
        return
    if parser.num_errors:
        fault = parser.get_error(0)
        where = f"{fault.node_operator()} '{fault.node_name()}': " if fault.node_name() else ""
        raise GraphError(f"TensorRT's parser refuses {graph}: {where}{' '.join(fault.desc().split())}")
    raise GraphError(f"TensorRT's parser refuses {graph}: {last_error(messages)}")


def _check_network(network: trt.INetworkDefinition, contract: GraphContract, graph: Path) -> None:
    """Raise GraphError unless the parsed network has the contract's inputs and outputs."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for what, specs, tensors in (("inputs", contract.inputs, inputs), ("outputs", contract.outputs, outputs)):
        wanted = {spec.name: (spec.dtype, _fixed(spec.shape)) for spec in specs}
        found = {t.name: (DTYPES.get(t.dtype.name, t.dtype.name), _fixed(tuple(t.shape))) for t in tensors}
        if wanted != found:
            raise GraphError(f"{graph} has other {what} than the contract: expected {wanted}, found {found}")


def _fixed(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(d, str) else int(d) for d in shape)


def _configure(config: trt.IBuilderConfig, options: CompileOptions, library: Library) -> None:
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * MB)
    if options.layer_details:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible and library.name != "tensorrt":
        raise InputError(f"{library.name} makes no version-compatible plans; leave --version-compatible out")
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        _set_capabilities(config, options.compute_capabilities, library)


def _set_capabilities(config: trt.IBuilderConfig, capabilities: tuple[str, ...], library: Library) -> None:
    """Tell TensorRT for RTX which GPUs to compile for; TensorRT itself always compiles for the one at hand."""
    if library.name != "tensorrt_rtx" or not hasattr(config, "set_compute_capability"):
        raise InputError("only tensorrt_rtx takes a list of compute capabilities; tensorrt builds for the GPU at hand")
    known = {name[2:]: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    unknown = [c for c in capabilities if c.replace(".", "") not in known]
    if unknown:
        names = ", ".join(f"{name[:-1]}.{name[-1]}" for name in known)
        raise InputError(f"{library.name} {library.version} cannot compile for {', '.join(unknown)}, only for {names}")
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(known[capability.replace(".", "")], index):
            raise InputError(f"{library.name} {library.version} refuses compute capability {capability}")


def _set_shapes(profile: trt.IOptimizationProfile, contract: GraphContract, shapes: ShapeProfile) -> None:
    for spec in contract.inputs:
        if any(isinstance(d, str) for d in spec.shape):
            low, usual, high = shapes.shapes(spec)
            profile.set_shape(spec.name, low, usual, high)


def _read_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> bool:
    """Start from the tactics measured before; whether they are this GPU's and this release's."""
    if path is None:
        return False
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, False):
        return bool(data)
    # Damaged, or of another GPU or release: start an empty one in its place.
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return False


def _write_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> None:
    cache = config.get_timing_cache() if path is not None else None
    if path is not None and cache is not None:
        try:
            write_bytes(path, bytes(cache.serialize()))
        except OutputError as error:  # it only saves time: a plan that was built must not be lost for it
            LOG.warning("the timing cache was not kept: %s", error)


@contextmanager
def _stoppable(config: trt.IBuilderConfig, progress: Progress | None) -> Iterator[threading.Event]:
    """Report the builder's progress, and turn control-C into its answer to "go on?": it must not meet an exception."""
    stop = threading.Event()
    steps: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps[phase_name] = num_steps
            if progress is not None:
                progress(phase_name, 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if progress is not None and phase_name in steps:
                progress(phase_name, step + 1, steps[phase_name])
            return not stop.is_set()

    config.progress_monitor = Monitor()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def options_as_json(options: CompileOptions) -> Mapping[str, Any]:
    """What the manifest records of the options: all but the timing cache's path."""
    return {
        "workspace_mb": options.workspace_mb,
        "shape_profile": {
            "prompts": list(options.shape_profile.prompts),
            "points": list(options.shape_profile.points),
        },
        "tf32": options.tf32,
        "layer_details": options.layer_details,
    }
