"""build: all stages from a checkpoint to a verified bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesam_deploy.bundle import (
    ANSWERS,
    ENGINE_BACKENDS,
    GRAPHS,
    MANIFEST,
    NODES,
    SCHEMA,
    check_replaceable,
    parse_manifest,
)
from edgesam_deploy.download import NO_CONSENT, Consent
from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.files import sha256_file, write_json, writing_folder
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.accuracy import AccuracyResult, load_answers
from edgesam_deploy.recipe import PACKAGE, PRECISIONS, Recipe
from edgesam_deploy.runtime import CPU_BACKENDS
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.cache import StageCache, StageRun, exclusive, tool_versions
from edgesam_deploy.stages.node_records import node_records, write_nodes
from edgesam_deploy.stages.precision import Job, Outcome, Progress, bar, detail, type_graphs
from edgesam_deploy.stages.verify import verify
from edgesam_deploy.target import Target

if TYPE_CHECKING:
    from edgesam_deploy.stages.sensitivity import TuneOptions

PHOTOS = PACKAGE / "assets" / "photos"
VERIFY, ANSWERS_NAME = ANSWERS.split("/")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build. output: the bundle's folder. calibration, images: folders, None for the shipped photographs.

    min_iou: the mask IoU that it must reach, None for the recipe's. search: find the fastest assignment of INT8 that
    reaches it, None to take all that the rules allow. backend: for CPU targets, None for the faster one installed.
    bf16: for them too, it may compute in bfloat16 what is float; such a bundle runs only where the CPU has it.
    checkpoint: None for the recipe's own, and consent is to what its download takes.
    """

    recipe: Recipe
    target: Target
    precision: str
    output: Path
    checkpoint: Path | None = None
    calibration: Path | None = None
    images: Path | None = None
    force: bool = False
    min_iou: float | None = None
    search: TuneOptions | None = None
    backend: str | None = None
    bf16: bool = False
    consent: Consent = NO_CONSENT

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision '{self.precision}': expected one of {', '.join(PRECISIONS)}")
        if self.min_iou is not None and not 0.0 < self.min_iou <= 1.0:
            raise InputError(f"min_iou must be a number in (0, 1], got {self.min_iou}")
        if self.search is not None and self.precision != "int8":
            raise InputError(f"a search chooses what is INT8, and this build is {self.precision}: ask for int8")
        if self.backend is not None and (self.target.backend in ENGINE_BACKENDS or self.backend not in CPU_BACKENDS):
            raise InputError(
                f"backend must be one of {', '.join(CPU_BACKENDS)}, for a CPU target; got {self.backend} for "
                f"{self.target.name}"
            )

        if self.bf16 and self.target.backend in ENGINE_BACKENDS:
            raise InputError(f"bf16 is for CPU targets, and {self.target.name} runs {self.target.backend}")

    @property
    def threshold(self) -> float:
        """The mask IoU that the bundle must reach."""
        return float(self.recipe.min_mask_iou[self.precision] if self.min_iou is None else self.min_iou)


@dataclass(frozen=True, slots=True)
class BuildResult:
    """passed: whether mask IoU reached the recipe's threshold. stages: in order, with seconds and reuse."""

    bundle: Path
    passed: bool
    min_mask_iou: float
    accuracy: AccuracyResult
    stages: tuple[StageRun, ...]


def _quiet(_: str, items: Iterable[Any], __: int | None) -> Iterable[Any]:
    return items


def build(options: BuildOptions, progress: Progress = _quiet) -> BuildResult:
    """Run every stage that is not up to date, verify, and write the bundle.

    A bundle below its threshold is written too, with ``verified`` false. Raises the stages' own errors; whatever
    happens, a bundle that was there before stays until the new one is complete.
    """
    check_replaceable(options.output)
    images = source_images(options)
    options = replace(options, checkpoint=_checkpoint(options))
    work = options.output.parent / ".stages" / options.output.name
    with exclusive(work):
        cache = StageCache(work, options.force)
        simplified, answers = prepare(options, images, cache, progress)
        outcome = type_graphs(job(options, images, cache, progress), simplified)
        return _assemble(options, cache, outcome, answers, progress)


def job(options: BuildOptions, images: Mapping[str, Sequence[Path]], cache: StageCache, progress: Progress) -> Job:
    """What ``stages.precision`` is to do for a build."""
    return Job(
        recipe=options.recipe,
        target=options.target,
        precision=options.precision,
        calibration=images.get("calibration", ()),
        cache=cache,
        progress=progress,
        search=options.search,
        backend=options.backend,
        bf16=options.bf16,
    )


def source_images(options: BuildOptions) -> dict[str, list[Path]]:
    """The verification images and, below FP32, the calibration images: looked at before anything takes time."""
    images = {VERIFY: list_images(options.images or PHOTOS / "verify")}
    if options.precision != "fp32":
        from edgesam_deploy.stages.calibrate import calibration_images

        images["calibration"] = calibration_images(options.calibration or PHOTOS / "calibration")
    return images


def prepare(
    options: BuildOptions, images: Mapping[str, Sequence[Path]], cache: StageCache, progress: Progress
) -> tuple[dict[str, Path], Path]:
    """Everything up to simplified FP32 graphs: (graph by name, folder of the reference's answers and images)."""
    recipe = options.recipe
    checkpoint = _checkpoint(options)
    # Only what shapes the network: other precision rules or thresholds must not cost an export.
    base = {
        "architecture": [recipe.architecture, dict(recipe.options)],
        "geometry": asdict(recipe.geometry),
        "pixels": asdict(recipe.pixels),
        "opset": recipe.opset,
        "checkpoint": sha256_file(checkpoint),
    }

    def export(folder: Path) -> Mapping[str, Any]:
        from edgesam_deploy.stages.export import export as run

        return detail(run(recipe, checkpoint, folder))

    exported = cache.run("export", base, export)
    simplified = {name: _simplify(cache, name, exported.folder / f"{name}.onnx") for name in GRAPHS}
    return simplified, _reference(options, images[VERIFY], cache, checkpoint, base, progress)


def _checkpoint(options: BuildOptions) -> Path:
    from edgesam_deploy.models.checkpoint import checkpoint_path

    if options.checkpoint is not None:
        if not options.checkpoint.is_file():
            raise CheckpointError(f"checkpoint {options.checkpoint} does not exist")
        return options.checkpoint
    return checkpoint_path(options.recipe, options.consent)


def _simplify(cache: StageCache, name: str, graph: Path) -> Path:
    def action(folder: Path) -> Mapping[str, Any]:
        from edgesam_deploy.stages.simplify import simplify

        return detail(simplify(graph, folder / f"{name}.onnx"))

    return cache.run(f"simplify-{name}", {"graph": sha256_file(graph)}, action).folder / f"{name}.onnx"


def _reference(
    options: BuildOptions,
    images: Sequence[Path],
    cache: StageCache,
    checkpoint: Path,
    base: Mapping[str, object],
    progress: Progress,
) -> Path:
    """The folder with the verification images and the PyTorch model's answers on them."""

    def action(folder: Path) -> Mapping[str, Any]:
        from edgesam_deploy.stages.reference import record_answers

        for path in images:
            shutil.copyfile(path, folder / path.name)
        answers = record_answers(
            options.recipe, checkpoint, images, folder / ANSWERS_NAME, bar(progress, "reference", len(images))
        )
        return {"images": len(answers.files), "prompts": int(answers.index.size)}

    digests = {p.name: sha256_file(p) for p in images}
    return cache.run("reference", {**base, "images": digests}, action).folder


def _assemble(
    options: BuildOptions, cache: StageCache, outcome: Outcome, answers: Path, progress: Progress
) -> BuildResult:
    """Put the bundle together in a temporary folder, measure it there, then let it take its place."""
    started = time.perf_counter()
    recorded = load_answers(answers / ANSWERS_NAME)
    threshold = options.threshold
    with writing_folder(options.output) as folder:
        for name, typed in outcome.graphs.items():
            graphs.copy(typed.graph, folder / f"{name}.onnx")
        _write_nodes(folder / NODES, outcome)
        (folder / VERIFY).mkdir()
        for name in (*recorded.files, ANSWERS_NAME):
            shutil.copyfile(answers / name, folder / VERIFY / name)
        manifest = _manifest(options, cache, folder, outcome)
        bundle = parse_manifest(manifest, folder)
        accuracy = verify(bundle, progress=bar(progress, "verify", len(recorded.files)))
        passed = accuracy.mask_iou.mean >= threshold
        manifest |= {"verified": passed, "min_mask_iou": threshold, "results": asdict(accuracy)}
        write_json(folder / MANIFEST, manifest)
    note = {"mask_iou": accuracy.mask_iou.mean, "threshold": threshold}
    run = StageRun("verify", options.output, False, time.perf_counter() - started, note)
    return BuildResult(options.output, passed, threshold, accuracy, (*cache.runs, run))


def _write_nodes(path: Path, outcome: Outcome) -> None:
    """What every node computes in and why, for ``sam-export explain`` and for auditing engines."""
    found = outcome.search
    records = {
        name: node_records(
            typed.graph,
            typed.source,
            outcome.ranges.get(name) if outcome.ranges is not None else None,
            typed.reasons,
            found.search.alone if found is not None else {},
            found.block_of if found is not None else {},
        )
        for name, typed in outcome.graphs.items()
    }
    write_nodes(path, records, found.summary() if found is not None else None)


def _manifest(options: BuildOptions, cache: StageCache, folder: Path, outcome: Outcome) -> dict[str, Any]:
    """Everything but the results. Parents are the sha256 of the files that each graph was made from, oldest first."""
    recipe, details = options.recipe, {run.name: run.detail for run in cache.runs}
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "recipe": {"name": recipe.name, "digest": recipe.digest},
        "precision": options.precision,
        "target": options.target.name,
        "backend": outcome.graphs["encoder"].backend,
        "graph_backends": {name: typed.backend for name, typed in outcome.graphs.items()},
        "bf16": {name: typed.bf16 for name, typed in outcome.graphs.items()},
        "int8_encoding": options.target.int8_encoding if options.precision == "int8" else None,
        "rest": options.target.int8_rest if options.precision == "int8" else options.precision,
        "checkpoint_sha256": sha256_file(_checkpoint(options)),
        "geometry": asdict(recipe.geometry),
        "pixels": asdict(recipe.pixels),
        "calibration": details.get("calibrate"),
        "stages": {name: {k: v for k, v in detail.items() if k != "output"} for name, detail in details.items()},
        "tools": tool_versions(),
        # Filled by ``stages.finish`` on the device, for backends that run plans.
        "engines": None,
        "verified": False,
    }
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}
    for name in GRAPHS:
        files[f"{name}.onnx"]["parents"] = _ancestry(cache, name)
    return manifest | {"files": files}


def _ancestry(cache: StageCache, name: str) -> list[dict[str, str]]:
    """The stage files of this build that led to one graph: stage and sha256, in order."""
    files = ((run.name, run.folder / f"{name}.onnx") for run in cache.runs if run.name != "reference")
    return [{"stage": stage, "sha256": sha256_file(path)} for stage, path in files if path.is_file()]
