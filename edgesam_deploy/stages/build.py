"""build: all stages from a checkpoint to a verified bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.files import sha256_file, write_json, writing_folder
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.accuracy import AccuracyResult, load_answers
from edgesam_deploy.recipe import PACKAGE, PRECISIONS, Recipe
from edgesam_deploy.stages.cache import StageCache, StageRun, exclusive, tool_versions
from edgesam_deploy.stages.verify import verify
from edgesam_deploy.target import Target

PHOTOS = PACKAGE / "assets" / "photos"
VERIFY, ANSWERS_NAME = ANSWERS.split("/")

# (what is going on, the items to go through, how many if that is known) -> the same items
Progress = Callable[[str, Iterable[Any], int | None], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build. output: the bundle's folder. calibration, images: folders, None for the shipped photographs."""

    recipe: Recipe
    target: Target
    precision: str
    output: Path
    checkpoint: Path | None = None
    calibration: Path | None = None
    images: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision '{self.precision}': expected one of {', '.join(PRECISIONS)}")


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
    images = _images(options)
    work = options.output.parent / ".stages" / options.output.name
    with exclusive(work):
        cache = StageCache(work, options.force)
        graphs, answers = _stages(options, images, cache, progress)
        return _assemble(options, cache, graphs, answers, progress)


def _images(options: BuildOptions) -> dict[str, list[Path]]:
    """The verification images and, below FP32, the calibration images: looked at before anything takes time."""
    images = {VERIFY: list_images(options.images or PHOTOS / "verify")}
    if options.precision != "fp32":
        from edgesam_deploy.stages.calibrate import calibration_images

        images["calibration"] = calibration_images(options.calibration or PHOTOS / "calibration")
    return images


def _stages(
    options: BuildOptions, images: Mapping[str, Sequence[Path]], cache: StageCache, progress: Progress
) -> tuple[dict[str, Path], Path]:
    """Everything up to typed graphs: (graph file by name, folder of the reference's answers and images)."""
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

        return _detail(run(recipe, checkpoint, folder))

    exported = cache.run("export", base, export)
    simplified = {name: _simplify(cache, name, exported.folder / f"{name}.onnx") for name in GRAPHS}
    answers = _reference(options, images[VERIFY], cache, checkpoint, base, progress)
    if options.precision == "fp32":
        return simplified, answers
    if options.precision == "fp16":
        maxima = _maxima(options, images["calibration"], cache, simplified, progress)
        return {name: _fp16(cache, recipe, name, graph, maxima) for name, graph in simplified.items()}, answers
    # INT8: the encoder carries the load; the decoder is small, sensitive, and stays FP32.
    encoder = _equalize(cache, simplified["encoder"]) if recipe.int8.equalize else simplified["encoder"]
    encoder = _int8(options, images["calibration"], cache, encoder, progress)
    return {"encoder": encoder, "decoder": simplified["decoder"]}, answers


def _checkpoint(options: BuildOptions) -> Path:
    from edgesam_deploy.models.checkpoint import checkpoint_path

    if options.checkpoint is not None:
        if not options.checkpoint.is_file():
            raise CheckpointError(f"checkpoint {options.checkpoint} does not exist")
        return options.checkpoint
    return checkpoint_path(options.recipe)


def _simplify(cache: StageCache, name: str, graph: Path) -> Path:
    def action(folder: Path) -> Mapping[str, Any]:
        from edgesam_deploy.stages.simplify import simplify

        return _detail(simplify(graph, folder / f"{name}.onnx"))

    return cache.run(f"simplify-{name}", {"graph": sha256_file(graph)}, action).folder / f"{name}.onnx"


def _equalize(cache: StageCache, graph: Path) -> Path:
    def action(folder: Path) -> Mapping[str, Any]:
        from edgesam_deploy.stages.equalize import equalize

        return _detail(equalize(graph, folder / "encoder.onnx"))

    return cache.run("equalize", {"graph": sha256_file(graph)}, action).folder / "encoder.onnx"


def _maxima(
    options: BuildOptions,
    images: Sequence[Path],
    cache: StageCache,
    simplified: Mapping[str, Path],
    progress: Progress,
) -> Path:
    """The file of how large every tensor gets on the calibration images."""
    from edgesam_deploy.stages.calibrate import images_digest

    def action(folder: Path) -> Mapping[str, Any]:
        from edgesam_deploy.stages.range_pass import range_pass

        bar = _bar(progress, "ranges", len(images))
        maxima = range_pass(simplified, images, options.recipe, folder / "maxima.json", bar)
        largest = max(max(tensors.values()) for tensors in maxima.absmax.values())
        return {"images": maxima.images, "images_digest": maxima.images_digest, "largest": largest}

    hashes = {name: sha256_file(graph) for name, graph in simplified.items()}
    inputs: dict[str, object] = {**hashes, "images": images_digest(images), "pixels": asdict(options.recipe.pixels)}
    return cache.run("ranges", inputs, action).folder / "maxima.json"


def _fp16(cache: StageCache, recipe: Recipe, name: str, graph: Path, maxima: Path) -> Path:
    def action(folder: Path) -> Mapping[str, Any]:
        from edgesam_deploy.stages.fp16 import convert_to_fp16
        from edgesam_deploy.stages.range_pass import load_maxima

        absmax = load_maxima(maxima).absmax[name]
        return _detail(convert_to_fp16(graph, recipe.fp16, folder / f"{name}.onnx", absmax))

    inputs = {"graph": sha256_file(graph), "rules": asdict(recipe.fp16), "maxima": sha256_file(maxima)}
    return cache.run(f"fp16-{name}", inputs, action).folder / f"{name}.onnx"


def _int8(options: BuildOptions, images: Sequence[Path], cache: StageCache, graph: Path, progress: Progress) -> Path:
    """calibrate -> quantize -> (for the CPU) encode; returns the typed encoder."""
    from edgesam_deploy.stages.calibrate import calibrate, images_digest, load_ranges
    from edgesam_deploy.stages.cpu_encoding import encode_for_cpu
    from edgesam_deploy.stages.quantize import quantize

    recipe, rules = options.recipe, options.recipe.int8

    def run_calibrate(folder: Path) -> Mapping[str, Any]:
        ranges = calibrate(
            graph,
            images,
            folder / "ranges.json",
            recipe.pixels,
            rules.percentile,
            _bar(progress, "calibrate", len(images)),
        )
        return {"images": ranges.images, "images_digest": ranges.images_digest, "percentile": ranges.percentile}

    inputs: dict[str, object] = {
        "graph": sha256_file(graph),
        "images": images_digest(images),
        "percentile": rules.percentile,
    }
    ranges_file = cache.run("calibrate", inputs, run_calibrate).folder / "ranges.json"
    ranges = load_ranges(ranges_file)
    inputs = {"graph": sha256_file(graph), "ranges": sha256_file(ranges_file), "rules": asdict(rules)}
    quantized = (
        cache.run(
            "quantize", inputs, lambda folder: _detail(quantize(graph, ranges, rules, folder / "encoder.onnx"))
        ).folder
        / "encoder.onnx"
    )
    if options.target.int8_encoding != "cpu":
        return quantized
    inputs = {"graph": sha256_file(quantized), "ranges": sha256_file(ranges_file)}
    return (
        cache.run(
            "encode", inputs, lambda folder: _detail(encode_for_cpu(quantized, ranges, folder / "encoder.onnx"))
        ).folder
        / "encoder.onnx"
    )


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
            options.recipe, checkpoint, images, folder / ANSWERS_NAME, _bar(progress, "reference", len(images))
        )
        return {"images": len(answers.files), "prompts": int(answers.index.size)}

    digests = {p.name: sha256_file(p) for p in images}
    return cache.run("reference", {**base, "images": digests}, action).folder


def _assemble(
    options: BuildOptions, cache: StageCache, graphs: Mapping[str, Path], answers: Path, progress: Progress
) -> BuildResult:
    """Put the bundle together in a temporary folder, measure it there, then let it take its place."""
    started = time.perf_counter()
    recorded = load_answers(answers / ANSWERS_NAME)
    threshold = float(options.recipe.min_mask_iou[options.precision])
    with writing_folder(options.output) as folder:
        for name, graph in graphs.items():
            shutil.copyfile(graph, folder / f"{name}.onnx")
        if options.target.backend in ENGINE_BACKENDS:
            from edgesam_deploy.stages.typed_nodes import node_table

            write_json(folder / NODES, {name: node_table(graph) for name, graph in graphs.items()})
        (folder / VERIFY).mkdir()
        for name in (*recorded.files, ANSWERS_NAME):
            shutil.copyfile(answers / name, folder / VERIFY / name)
        manifest = _manifest(options, cache, folder, graphs)
        bundle = parse_manifest(manifest, folder)
        accuracy = verify(bundle, progress=_bar(progress, "verify", len(recorded.files)))
        passed = accuracy.mask_iou.mean >= threshold
        manifest |= {"verified": passed, "min_mask_iou": threshold, "results": asdict(accuracy)}
        write_json(folder / MANIFEST, manifest)
    detail = {"mask_iou": accuracy.mask_iou.mean, "threshold": threshold}
    run = StageRun("verify", options.output, False, time.perf_counter() - started, detail)
    return BuildResult(options.output, passed, threshold, accuracy, (*cache.runs, run))


def _manifest(options: BuildOptions, cache: StageCache, folder: Path, graphs: Mapping[str, Path]) -> dict[str, Any]:
    """Everything but the results. Parents are the sha256 of the files that each graph was made from, oldest first."""
    recipe, details = options.recipe, {run.name: run.detail for run in cache.runs}
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "recipe": {"name": recipe.name, "digest": recipe.digest},
        "precision": options.precision,
        "target": options.target.name,
        "backend": options.target.backend,
        "int8_encoding": options.target.int8_encoding if options.precision == "int8" else None,
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


def _detail(result: Any) -> dict[str, Any]:
    """A stage's result dataclass as JSON: paths by their file name only, no path of this machine."""
    return {k: v.name if isinstance(v, Path) else v for k, v in asdict(result).items()}


def _bar(progress: Progress, name: str, total: int | None = None) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return lambda items: progress(name, items, total)
