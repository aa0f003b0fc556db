"""From simplified FP32 graphs to the graphs that ship: calibrate, search, type, and choose the CPU's backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesam_deploy.bundle import ENGINE_BACKENDS, GRAPHS
from edgesam_deploy.errors import InputError, MissingExtraError, ThresholdError
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.recipe import Int8Rules, Recipe
from edgesam_deploy.runtime import DEFAULT_BACKEND
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.bias_correction import correct_biases
from edgesam_deploy.stages.cache import StageCache
from edgesam_deploy.stages.calibrate import Ranges, calibrate, images_digest, load_ranges
from edgesam_deploy.stages.cpu_encoding import encode_for_cpu
from edgesam_deploy.stages.equalize import equalize
from edgesam_deploy.stages.node_records import uniform_reasons
from edgesam_deploy.stages.placement import eligible
from edgesam_deploy.stages.quantize import NOT_CHOSEN
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import Target

if TYPE_CHECKING:
    from edgesam_deploy.stages.sensitivity import TuneOptions, TuneResult

# (what is going on, the items to go through, how many if that is known) -> the same items
Progress = Callable[[str, Iterable[Any], int | None], Iterable[Any]]
FLOAT_DECODER = "the decoder stays in float: only a search (--search) shows whether INT8 pays there and passes"
BIAS_IMAGES = 8
NOT_ASKED = "INT8 was not asked for"


@dataclass(frozen=True, slots=True)
class Job:
    """What to do with the simplified graphs of a recipe.

    calibration: images, empty for FP32. search: None to let INT8 have every layer of the encoder that the rules allow.
    backend: the CPU backend to use, None for the faster one of those installed. bf16: it may compute in bfloat16 what
    is float, where the CPU does that itself and gains by it.
    """

    recipe: Recipe
    target: Target
    precision: str
    calibration: Sequence[Path]
    cache: StageCache
    progress: Progress
    search: TuneOptions | None = None
    backend: str | None = None
    bf16: bool = False

    @property
    def rules(self) -> Int8Rules:
        return self.target.rules_for(self.recipe)

    @property
    def typing(self) -> Typing:
        """How its graphs are typed: the target's way for INT8, FP16 beside none for FP16."""
        if self.precision == "fp16":
            return Typing("tensorrt", "fp16")
        return Typing(self.target.int8_encoding, self.target.int8_rest)


@dataclass(frozen=True, slots=True)
class Typed:
    """One graph as it ships. source: the FP32 graph it was typed from. reasons: as ``typed.TypedResult``.

    int8: names of its INT8 nodes. backend, bf16: how a CPU runs it best; the target's backend elsewhere.
    """

    graph: Path
    source: Path
    backend: str
    int8: Sequence[str] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """ranges: of calibration by graph, None for FP32. search: what the search found, None where there was none."""

    graphs: Mapping[str, Typed]
    ranges: Mapping[str, Ranges] | None
    search: TuneResult | None


def type_graphs(job: Job, simplified: Mapping[str, Path]) -> Outcome:
    """Give both graphs the precision that a job asks for. Raises ThresholdError where a search finds no answer."""
    if job.precision == "fp32":
        typed = {n: Typed(g, g, job.target.backend, (), uniform_reasons(g, NOT_ASKED)) for n, g in simplified.items()}
        return Outcome({n: _on_cpu(job, n, t, {None: t.graph}) for n, t in typed.items()}, None, None)
    sources, ranges = calibrated(job, simplified)
    if job.precision == "fp16":
        return Outcome({n: _typed(job, n, sources[n], ranges[n], ()) for n in GRAPHS}, ranges, None)
    found = searched(job, sources, ranges) if job.search is not None else None
    if found is not None:
        _demand_int8(job, found)
    chosen: dict[str, Collection[str] | None] = {"encoder": None, "decoder": ()}
    if found is not None:
        chosen = dict(found.int8)
    graphs = {name: _typed(job, name, sources[name], ranges.get(name), chosen[name]) for name in GRAPHS}
    if found is not None:
        graphs = {name: replace(t, reasons=_explained(t.reasons, found)) for name, t in graphs.items()}
    return Outcome(graphs, ranges, found)


def _demand_int8(job: Job, found: TuneResult) -> None:
    """Raise ThresholdError unless the search found INT8 worth having."""
    found.demand()
    if found.search.verdict == "keep":
        raise ThresholdError(
            f"{found.sentence()}; build  sam-export build {job.recipe.name} --target {job.target.name} --precision "
            f"{found.rest}"
        )


def calibrated(job: Job, simplified: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, Ranges]]:
    """(the FP32 graphs that are typed, by name: simplified, the encoder equalized where the rules say so; ranges).

    There are none of a decoder that stays FP32 whatever they are.
    """
    sources = dict(simplified)
    if job.precision == "int8" and job.rules.equalize:
        sources["encoder"] = _equalized(job.cache, sources["encoder"])
    rules = job.rules
    watched = sources if job.typing.rest == "fp16" or job.search is not None else {"encoder": sources["encoder"]}

    def action(folder: Path) -> Mapping[str, Any]:
        wrapped = bar(job.progress, "calibrate", len(job.calibration))
        ranges = calibrate(watched, job.calibration, job.recipe, rules, folder / "ranges.json", wrapped)
        largest = max(max(r.absmax.values()) for r in ranges.values())
        encoder = ranges["encoder"]
        return {
            "images": encoder.images,
            "images_digest": encoder.images_digest,
            "calibrator": encoder.calibrator,
            "percentile": encoder.percentile,
            "largest": largest,
        }

    inputs: dict[str, object] = {
        "graphs": {name: sha256_file(graph) for name, graph in watched.items()},
        "images": images_digest(job.calibration),
        "pixels": asdict(job.recipe.pixels),
        "rules": asdict(rules),
    }
    return sources, load_ranges(job.cache.run("calibrate", inputs, action).folder / "ranges.json")


def searched(job: Job, sources: Mapping[str, Path], ranges: Mapping[str, Ranges]) -> TuneResult:
    """The fastest assignment of INT8 within the mask-IoU budget; a killed search goes on where it stopped."""
    from edgesam_deploy.stages.sensitivity import load_tune, tune

    options = job.search
    if options is None:
        raise InputError("this job has no search: give it TuneOptions")

    def action(folder: Path) -> Mapping[str, Any]:
        result = tune(
            sources,
            ranges,
            job.calibration,
            job.recipe,
            job.rules,
            job.target,
            job.typing,
            options,
            job.cache.folder / "search-evaluations.jsonl",
            folder,
            job.progress,
        )
        return {"verdict": result.search.verdict, "evaluations": result.search.evaluations, "minutes": result.minutes}

    inputs: dict[str, object] = {
        "graphs": {name: sha256_file(graph) for name, graph in sources.items()},
        "ranges": {name: asdict(r) for name, r in ranges.items()},
        "rules": [asdict(job.rules), asdict(job.recipe.fp16)],
        "target": job.target.name,
        "typing": asdict(job.typing),
        "options": asdict(options),
    }
    return load_tune(job.cache.run("search", inputs, action).folder)


def _equalized(cache: StageCache, graph: Path) -> Path:
    def action(folder: Path) -> Mapping[str, Any]:
        return detail(equalize(graph, folder / "encoder.onnx"))

    return cache.run("equalize", {"graph": sha256_file(graph)}, action).folder / "encoder.onnx"


def _typed(job: Job, name: str, source: Path, ranges: Ranges | None, int8: Collection[str] | None) -> Typed:
    """One graph with INT8 on the given nodes (None for all that the rules allow) and the job's rest beside them."""
    rest = job.typing.rest
    quantized = int8 is None or bool(int8)
    if ranges is None or (not quantized and rest == "fp32"):
        typed = Typed(source, source, job.target.backend, (), _float_reasons(job, source, FLOAT_DECODER))
        return _on_cpu(job, name, typed, {None: source})
    stage = f"{'quantize' if quantized else 'fp16'}-{name}"

    def action(folder: Path) -> Mapping[str, Any]:
        how = Typing("tensorrt", rest)
        mend = _bias_repair(job, source) if quantized and name == "encoder" and job.rules.bias_correction else None
        result = type_graph(source, ranges, job.recipe.fp16, job.rules, how, folder / f"{name}.onnx", int8, mend)
        write_json(folder / "nodes.json", {"int8": result.int8, "reasons": result.reasons})
        return {"int8": len(result.int8), "not int8": len(result.reasons)}

    inputs: dict[str, object] = {
        "graph": sha256_file(source),
        "ranges": asdict(ranges),
        "rules": [asdict(job.rules), asdict(job.recipe.fp16)],
        "rest": rest,
        "int8": None if int8 is None else sorted(int8),
        "images": images_digest(job.calibration) if job.rules.bias_correction else None,
    }
    folder = job.cache.run(stage, inputs, action).folder
    nodes = read_json(folder / "nodes.json")
    reasons = dict(nodes["reasons"])
    if not quantized:
        why = NOT_ASKED if job.precision == "fp16" else FLOAT_DECODER
        reasons = _float_reasons(job, source, why) | reasons
    typed = Typed(folder / f"{name}.onnx", source, job.target.backend, tuple(nodes["int8"]), reasons)
    if job.target.int8_encoding != "cpu" or not quantized:
        return typed
    twin = _encoded(job.cache, name, typed.graph, ranges)
    return _on_cpu(job, name, replace(typed, graph=twin), {"cpu": twin, "tensorrt": typed.graph})


def _float_reasons(job: Job, source: Path, why: str) -> dict[str, str]:
    """Why a graph without INT8 has none: what the rules forbid anyway by its rule, the rest by ``why``."""
    return uniform_reasons(source, why) | eligible(graphs.load(source), job.rules)[1]


def _bias_repair(job: Job, source: Path) -> Callable[[Path, Path], object]:
    """Bias correction on some of the calibration images: means settle long before ranges do."""
    step = max(len(job.calibration) // BIAS_IMAGES, 1)
    images = job.calibration[::step][:BIAS_IMAGES]

    def repair(quantized: Path, output: Path) -> object:
        return correct_biases(source, quantized, images, job.recipe, output, bar(job.progress, "biases"))

    return repair


def _encoded(cache: StageCache, name: str, quantized: Path, ranges: Ranges) -> Path:
    def action(folder: Path) -> Mapping[str, Any]:
        return detail(encode_for_cpu(quantized, ranges, folder / f"{name}.onnx"))

    inputs: dict[str, object] = {"graph": sha256_file(quantized), "ranges": asdict(ranges)}
    return cache.run(f"encode-{name}", inputs, action).folder / f"{name}.onnx"


def _on_cpu(job: Job, name: str, typed: Typed, encodings: Mapping[str | None, Path]) -> Typed:
    """The graph in the encoding and on the backend that run it fastest on this CPU; as it is for other targets."""
    if job.target.backend in ENGINE_BACKENDS:
        return typed
    from edgesam_deploy.stages.backend import candidates_for, choose_backend

    candidates = [
        c
        for c in candidates_for(encodings, job.bf16)
        # ONNX Runtime has no fast kernels for TensorRT's encoding: nothing to measure.
        if job.backend in (None, c.backend) and (c.backend, c.encoding) != (DEFAULT_BACKEND, "tensorrt")
    ]
    if not candidates:  # candidates_for finds what is installed
        raise MissingExtraError(str(job.backend), "cpu" if job.backend == DEFAULT_BACKEND else str(job.backend))
    if len(candidates) == 1:
        return replace(typed, graph=candidates[0].graph, backend=candidates[0].backend)

    def action(folder: Path) -> Mapping[str, Any]:
        choice = choose_backend(candidates)
        write_json(folder / "choice.json", asdict(choice))
        return {k: v for k, v in asdict(choice).items() if k != "versions"}

    inputs: dict[str, object] = {
        "candidates": [[c.backend, c.encoding, c.bf16, sha256_file(c.graph)] for c in candidates],
        "machine": machine(),
    }
    choice = read_json(job.cache.run(f"backend-{name}", inputs, action).folder / "choice.json")
    graph = next(c.graph for c in candidates if (c.backend, c.encoding) == (choice["backend"], choice["encoding"]))
    return replace(typed, graph=graph, backend=choice["backend"], bf16=choice["bf16"])


def _explained(reasons: Mapping[str, str], found: TuneResult) -> dict[str, str]:
    """Reasons with what the search measured, for the nodes that it left out."""
    return {n: _why(n, found) if why == NOT_CHOSEN and n in found.block_of else why for n, why in reasons.items()}


def _why(node: str, found: TuneResult) -> str:
    """Why the search left a node out: too slow in INT8, or too much of the budget for what it gains."""
    block, result = found.block_of[node], found.search
    gain, loss = result.gain_ms.get(block, 0.0), result.alone.get(block)
    if gain <= 0.0 or loss is None:
        return f"the search leaves {block} in {found.rest}: INT8 gains no time there"
    return (
        f"the search leaves {block} in {found.rest}: INT8 would gain {gain:.3f} ms and cost {loss:.4f} mask IoU alone, "
        f"of a budget down to {found.min_iou:g}"
    )


def detail(result: Any) -> dict[str, Any]:
    """A stage's result dataclass as JSON: paths by their file name only, no path of this machine."""
    return {k: v.name if isinstance(v, Path) else v for k, v in asdict(result).items()}


def bar(progress: Progress, name: str, total: int | None = None) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return lambda items: progress(name, items, total)


def read_json(path: Path) -> Any:
    """What a stage wrote itself; its hash was checked by the cache."""
    return json.loads(path.read_text(encoding="utf-8"))
