"""Plans on disk: how they begin, what they are tied to, and the refusal of one that belongs elsewhere.

A plan holds code for one TensorRT release, one GPU architecture and one operating system. Loaded elsewhere it fails in
ways that name none of the three, so the manifest records them and they are compared before a plan is touched.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import BackendError, BundleError
from edgesam_deploy.runtime.bindings import Library, last_error, listen, logger, parse_release, trt

# The first bytes of a plan: TensorRT's serialization tag, and TensorRT for RTX's as read off the plans it writes.
MAGIC = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}
REBUILD = "rebuild it here: sam-export compile BUNDLE"


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What a bundle's two plans are tied to; the manifest's entry ``engines``.

    compute_capabilities: of the GPUs they run on, as ``8.7``; empty for a portable plan of TensorRT for RTX.
    platform: operating system and processor (``platform_tag``). driver: CUDA version of the driver that built them, or
    None where they were built without a GPU. built_from: sha256 of the ONNX file by graph name. settings: everything
    else that the builder was told.
    """

    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    platform: str
    driver: str | None
    version_compatible: bool
    hardware_compatible: bool
    built_from: Mapping[str, str]
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, raw: Any, where: Path) -> EngineRecord:
        """The manifest's entry. Raises BundleError if it lacks or garbles something."""
        names = {f.name for f in fields(cls)}
        if not isinstance(raw, dict) or set(raw) != names:
            raise BundleError(f"{where} lacks or garbles the entry 'engines', expected {sorted(names)}; {REBUILD}")
        if not isinstance(raw["compute_capabilities"], list) or not isinstance(raw["built_from"], dict):
            raise BundleError(f"{where} garbles the entry 'engines'; {REBUILD}")
        texts = [raw["library"], raw["version"], raw["platform"], *raw["compute_capabilities"]]
        if not all(isinstance(t, str) for t in texts) or not all(
            re.fullmatch(r"\d+\.\d+", c) for c in raw["compute_capabilities"]
        ):
            raise BundleError(f"{where} garbles the entry 'engines'; {REBUILD}")
        return cls(**{**raw, "compute_capabilities": tuple(raw["compute_capabilities"])})


def check_record(record: EngineRecord, bundle: Path, graphs: Mapping[str, str]) -> None:
    """Raise BundleError unless the plans were built from the graphs with these sha256: they are stale otherwise."""
    for name, digest in graphs.items():
        if record.built_from.get(name) != digest:
            raise BundleError(
                f"{bundle}: {name}.engine is stale, it was not built from the {name}.onnx there; {REBUILD}"
            )


def check_machine(record: EngineRecord, bundle: Path, library: Library, compute_capability: str) -> None:
    """Raise BackendError, naming what differs, unless this machine can load plans of ``record``."""
    here = platform_tag()
    if record.platform != here:
        raise BackendError(f"the engines of {bundle} are for {record.platform}, this machine is {here}; {REBUILD}")
    if record.library != library.name or not _release_fits(record, library):
        raise BackendError(
            f"the engines of {bundle} were built by {record.library} {record.version}, this machine has "
            f"{library.name} {library.version}; {REBUILD}"
        )
    if not _capability_fits(record, compute_capability):
        raise BackendError(
            f"the engines of {bundle} are for compute capability {' or '.join(record.compute_capabilities)}, this GPU "
            f"has {compute_capability}; {REBUILD}"
        )


def read_plan(path: Path, library: str) -> bytes:
    """A plan's bytes, after a look at how it begins: what is not a plan of this library never reaches it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackendError(f"cannot read the engine {path}: {error.strerror or error}") from error
    magic = MAGIC[library]
    if data[:4] != magic:
        other = next((name for name, start in MAGIC.items() if data[:4] == start), None)
        what = f"a plan of {other}" if other else f"not a plan (it begins with {data[:4]!r}, not {magic!r})"
        raise BackendError(f"{path} is {what}, expected one of {library}; {REBUILD}")
    return data


def load_plan(
    data: bytes, path: Path, library: Library, host_code: bool = False
) -> tuple[trt.ICudaEngine, trt.IExecutionContext]:
    """The engine and one execution context of a plan. Raises BackendError with TensorRT's reason."""
    with listen() as messages:
        try:
            runtime = trt.Runtime(logger())
            if host_code:
                # A version-compatible plan brings a runtime of its own, which TensorRT loads only if told to trust it.
                runtime.engine_host_code_allowed = True
            engine = runtime.deserialize_cuda_engine(data)
            context = engine.create_execution_context() if engine is not None else None
        except TypeError:  # the bindings' answer where CUDA cannot start: "factory function returned nullptr"
            engine = context = None
    if engine is None or context is None:
        raise BackendError(f"{library.name} {library.version} cannot load {path}: {last_error(messages)}; {REBUILD}")
    return engine, context


def platform_tag() -> str:
    """What a plan is tied to besides TensorRT and the GPU, as ``linux-aarch64``."""
    return f"{sys.platform}-{platform.machine()}"


def _release_fits(record: EngineRecord, library: Library) -> bool:
    if not record.version_compatible:
        # TensorRT refuses a plan of any other release, patch level included.
        return record.version == library.version
    built, here = parse_release(record.version), library.release
    return built[0] == here[0] and built <= here


def _capability_fits(record: EngineRecord, here: str) -> bool:
    if not record.compute_capabilities or here in record.compute_capabilities:
        return True
    # HardwareCompatibilityLevel.AMPERE_PLUS: any later architecture; NVIDIA excludes Jetson from it.
    least = min(tuple(map(int, c.split("."))) for c in record.compute_capabilities)
    return record.hardware_compatible and tuple(map(int, here.split("."))) >= max(least, (8, 0))
