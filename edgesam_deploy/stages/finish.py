"""On the device: a kit, or a bundle whose engines belong elsewhere, becomes a bundle that runs here.

Needs the base install and TensorRT, neither torch nor onnx. The kit's typed graphs are compiled, the engines answer the
verification prompts, and only then does the new bundle take the kit's place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgesam_deploy.bundle import ENGINE_BACKENDS, ENGINE_SUFFIX, GRAPHS, MANIFEST, Bundle, parse_manifest
from edgesam_deploy.contract import contracts
from edgesam_deploy.errors import BackendError, BundleError, OutputError
from edgesam_deploy.files import sha256_file, write_json, writing_folder
from edgesam_deploy.measure.accuracy import AccuracyResult
from edgesam_deploy.measure.audit import AuditResult, audit
from edgesam_deploy.measure.explain import read_nodes
from edgesam_deploy.measure.layers import layers_from_inspector, layers_from_log
from edgesam_deploy.runtime import SessionOptions
from edgesam_deploy.runtime.bindings import Library, use
from edgesam_deploy.runtime.cuda import open_cuda, probe
from edgesam_deploy.runtime.plans import EngineRecord, platform_tag
from edgesam_deploy.runtime.tensorrt import TensorRTSession
from edgesam_deploy.stages.compile import CompileOptions, CompileResult, Progress, compile_graph, options_as_json
from edgesam_deploy.stages.verify import verify
from edgesam_deploy.target import Target

# How the builder's message that lists all compiled layers begins.
LISTING = "Layers:"


@dataclass(frozen=True, slots=True)
class FinishResult:
    """accuracy, passed: None where the engines cannot run here and are not verified yet; ``unverified`` says why.

    audits: by graph, and compute capability if the plans are for several; empty unless asked for.
    """

    bundle: Path
    record: EngineRecord
    engines: Mapping[str, CompileResult]
    audits: Mapping[str, AuditResult]
    accuracy: AccuracyResult | None
    passed: bool | None
    unverified: str | None
    min_mask_iou: float


def finish(
    bundle: Bundle,
    target: Target,
    options: CompileOptions,
    output: Path | None = None,
    progress: Callable[[str], Progress] | None = None,
    audited: bool = False,
) -> FinishResult:
    """Compile both graphs of a bundle, verify the engines on this GPU, and write the bundle.

    target: the bundle's. output: another folder than the bundle's own. progress: makes a graph's progress callback from
    its name. audited: compare what every node was compiled to with what it was meant to be. Whatever happens, what was
    there before stays until the new bundle is complete.
    """
    if bundle.backend not in ENGINE_BACKENDS:
        raise BundleError(
            f"bundle {bundle.path} is for '{bundle.target}', which runs {bundle.backend} and needs no compiling; build "
            "for a GPU with  sam-export build --target"
        )
    final = output or bundle.path
    _check_elsewhere(final)
    if audited:
        read_nodes(bundle)  # now, rather than after the compiling
    gpu = _gpu(bundle)
    library = use(bundle.backend)
    _check_release(library, target)
    if bundle.backend == "tensorrt":
        cache = options.timing_cache or _timing_cache(final, library, gpu.compute_capability)
        options = replace(options, timing_cache=cache)
    built_for = (gpu.compute_capability,) if bundle.backend == "tensorrt" else options.compute_capabilities
    with writing_folder(final) as folder:
        shutil.copytree(
            bundle.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(f"*{ENGINE_SUFFIX}", "*.cache")
        )
        engines = {}
        for name, contract in contracts(bundle.geometry).items():
            step = progress(name) if progress is not None else None
            plan = folder / f"{name}.engine"
            engines[name] = compile_graph(bundle.graph(name), plan, contract, options, library, step, audited)
        record = EngineRecord(
            library=library.name,
            version=library.version,
            compute_capabilities=built_for,
            platform=platform_tag(),
            driver=gpu.driver,
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            built_from={name: bundle.manifest["files"][f"{name}.onnx"]["sha256"] for name in GRAPHS},
            settings=options_as_json(options),
        )
        manifest = _manifest(bundle, folder, record)
        audits = _audits(parse_manifest(manifest, folder), engines, record) if audited else {}
        accuracy, unverified = _verify(parse_manifest(manifest, folder), gpu)
        threshold = float(manifest["min_mask_iou"])
        passed = None if accuracy is None else accuracy.mask_iou.mean >= threshold
        manifest["verified"] = bool(passed)
        if accuracy is not None:
            manifest["results"] = asdict(accuracy)
        write_json(folder / MANIFEST, manifest)
    return FinishResult(final, record, engines, audits, accuracy, passed, unverified, threshold)


@dataclass(frozen=True, slots=True)
class _Gpu:
    """The GPU at hand. problem: why none can be used; compute_capability is empty and driver None then."""

    compute_capability: str
    driver: str | None
    problem: str | None


def _gpu(bundle: Bundle) -> _Gpu:
    """TensorRT compiles for the GPU at hand, so there must be one; TensorRT for RTX does without."""
    try:
        driver = ".".join(map(str, probe().version))
        return _Gpu(open_cuda().compute_capability(), driver, None)
    except BackendError as error:
        if bundle.backend == "tensorrt":
            raise
        return _Gpu("", None, str(error))


def _verify(bundle: Bundle, gpu: _Gpu) -> tuple[AccuracyResult | None, str | None]:
    """(what the engines' masks are worth, or why that is not known here).

    TensorRT for RTX compiles for other GPUs than the one at hand: engines that do not run here are no failure there.
    """
    if gpu.problem is not None:
        return None, gpu.problem
    try:
        return verify(bundle), None
    except BackendError as error:
        if bundle.backend == "tensorrt":
            raise
        return None, str(error).replace(str(bundle.path), "this bundle")


def _check_elsewhere(folder: Path) -> None:
    """Raise OutputError if the shell stands in the folder that is about to be exchanged."""
    here, final = Path.cwd().resolve(), folder.resolve()
    if final.exists() and (here == final or final in here.parents):
        raise OutputError(
            f"{final} is replaced as a whole, and you are in it: run the command from outside, as in  cd .."
        )


def _check_release(library: Library, target: Target) -> None:
    """Raise BackendError if the target is not for this release of TensorRT."""
    if target.backend != library.name:
        raise BackendError(f"target '{target.name}' needs {target.backend}, this is {library.name} {library.version}")
    if not target.accepts_tensorrt(library.version):
        raise BackendError(
            f"target '{target.name}' takes {library.name} {target.tensorrt_min} up to, not including, "
            f"{target.tensorrt_below}; this machine has {library.version}"
        )


def _audits(bundle: Bundle, engines: Mapping[str, CompileResult], record: EngineRecord) -> dict[str, AuditResult]:
    """By the builder's log for TensorRT for RTX, which needs no GPU; by the engine's inspector for TensorRT."""
    nodes = read_nodes(bundle).graphs
    audits = {}
    for name, result in engines.items():
        wanted = {record.node: record.precision for record in nodes[name]}
        ops = {record.node: record.op for record in nodes[name]}
        if record.library == "tensorrt":
            with TensorRTSession(bundle.engine(name), SessionOptions(), record.library) as session:
                audits[name] = audit(layers_from_inspector(session.inspect()), wanted, ops)
            continue
        listings = [m.text for m in result.log if m.text.startswith(LISTING)]
        names = [f"{name} {c}" for c in record.compute_capabilities] if len(listings) > 1 else [name]
        for key, text in zip(names, listings, strict=True):
            audits[key] = audit(layers_from_log(text), wanted, ops)
    return audits


def _timing_cache(final: Path, library: Library, capability: str) -> Path:
    """Beside the bundle, so that all precisions and models of a target share it."""
    return final.resolve().parent / f".timing-{library.version}-sm{capability.replace('.', '')}.cache"


def _manifest(bundle: Bundle, folder: Path, record: EngineRecord) -> dict[str, Any]:
    """The kit's manifest with the engines: their hashes, their parents, what they are tied to."""
    files = dict(bundle.manifest["files"])
    for name in GRAPHS:
        plan = folder / f"{name}.engine"
        files[plan.name] = {
            "sha256": sha256_file(plan),
            "size_bytes": plan.stat().st_size,
            "parents": [{"stage": "kit", "sha256": record.built_from[name]}],
        }
    entry = {**asdict(record), "compute_capabilities": list(record.compute_capabilities)}
    return {**bundle.manifest, "files": files, "engines": entry, "verified": False}
