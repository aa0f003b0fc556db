"""What INT8 costs in mask quality on the reference model: every calibrator, the repair, and a search.

    python benchmarks/precision.py --data DIR [--search FILE] [--images 48] [--seed 0] [--threads 2] [--split val]
                                   [--output benchmarks/results/cpu/precision.json]

DIR holds coco-subset and davis-frames. Every row is measured twice, through ONNX Runtime on the CPU, INT8 in its CPU
encoding: mask IoU with the same weights in PyTorch FP32, prompts as in agreement.py, and mIoU with the truth where the
prompt is the tight box of the true mask, as in reference_quality.py. FILE is the result of a search that a build left
in its folder of stages; its nodes are INT8 and no others. ``--split train`` looks at coco-subset/train alone: choose
settings there, never on val. Standard errors are over images.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from agreement import Prompts, choose
from numpy.typing import NDArray
from reference_quality import ask, coco_objects

from edgesam_deploy.bundle import GRAPHS
from edgesam_deploy.files import write_json
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.measure.accuracy import SIZE_CLASSES, Answers, answer, measure, size_class, summarize_answers
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import checkpoint_path, load_model
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import CALIBRATORS, Int8Rules, Recipe, load_recipe
from edgesam_deploy.runtime import SessionOptions, open_session
from edgesam_deploy.stages.bias_correction import correct_biases
from edgesam_deploy.stages.build import PHOTOS
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.calibrate import calibrate
from edgesam_deploy.stages.cpu_encoding import encode_for_cpu
from edgesam_deploy.stages.equalize import equalize
from edgesam_deploy.stages.export import export
from edgesam_deploy.stages.quantize import quantize
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import load_target

PERCENTILES = (99.9, 99.99, 99.999)
# Of one image: (size class, IoU with the truth) of every object.
Boxes = list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Variant:
    """A row. rules: None for FP32. int8: names of INT8 nodes by graph; None for all of the encoder that rules allow.

    corrected: whether the encoder's biases are corrected (``stages.bias_correction``).
    """

    name: str
    rules: Int8Rules | None = None
    int8: Mapping[str, Sequence[str]] | None = None
    corrected: bool = False


def variants(rules: Int8Rules, search: Path | None) -> list[Variant]:
    """FP32, every calibrator by itself, the repairs with the default one, and the nodes of a search."""
    rows = [Variant("FP32")]
    for calibrator in CALIBRATORS:
        for percentile in PERCENTILES if calibrator == "percentile" else (rules.percentile,):
            name = f"percentile {percentile:g}" if calibrator == "percentile" else calibrator
            plain = replace(rules, calibrator=calibrator, percentile=percentile, equalize=False)
            rows.append(Variant(f"INT8, {name}", plain))
    shown = f"{rules.calibrator} {rules.percentile:g}" if rules.calibrator == "percentile" else rules.calibrator
    plain, even = replace(rules, equalize=False), replace(rules, equalize=True)
    rows.append(Variant(f"INT8, {shown}, equalized", even))
    rows.append(Variant(f"INT8, {shown}, biases corrected", plain, corrected=True))
    rows.append(Variant(f"INT8, {shown}, equalized, biases corrected", even, corrected=True))
    if search is not None:
        rows.append(Variant(f"INT8, {shown}, search", rules, json.loads(search.read_text(encoding="utf-8"))["int8"]))
    return rows


def graphs_of(variant: Variant, simplified: Mapping[str, Path], recipe: Recipe, folder: Path) -> dict[str, Path]:
    """The two graphs of a row, made by the stages that a build runs, in ``folder``."""
    rules = variant.rules
    if rules is None:
        return dict(simplified)
    sources = dict(simplified)
    if rules.equalize:
        sources["encoder"] = equalize(sources["encoder"], folder / "equalized.onnx").output
    images = list_images(PHOTOS / "calibration")
    ranges = calibrate(sources, images, recipe, rules, folder / "ranges.json")
    chosen: Mapping[str, Sequence[str] | None] = {"encoder": None, "decoder": ()} if not variant.int8 else variant.int8
    how = Typing("cpu", "fp32")
    typed = {
        name: type_graph(
            sources[name], ranges[name], recipe.fp16, rules, how, folder / f"{name}.onnx", chosen[name]
        ).output
        for name in GRAPHS
    }
    if variant.corrected:
        plain = quantize(sources["encoder"], ranges["encoder"], rules, folder / "int8.onnx", chosen["encoder"]).output
        # Every fourth photograph: a pass per layer, and means settle soon.
        repaired = correct_biases(sources["encoder"], plain, images[::4], recipe, folder / "corrected.onnx").output
        typed["encoder"] = encode_for_cpu(repaired, ranges["encoder"], folder / "repaired.onnx").output
    return typed


@contextmanager
def opened(graphs: Mapping[str, Path], recipe: Recipe, threads: int) -> Iterator[Predictor]:
    with ExitStack() as stack:
        encoder, decoder = (
            stack.enter_context(open_session(graphs[name], options=SessionOptions(threads=threads)))
            for name in ("encoder", "decoder")
        )
        yield Predictor(encoder, decoder, recipe.geometry, recipe.pixels)


def boxes(predictor: Predictor, data: Path, split: str, count: int | None) -> list[Boxes]:
    """Every object of the first ``count`` images of coco-subset (None: all), asked for by the box of its mask."""
    found: list[Boxes] = []
    for path, objects, truths in coco_objects(data, split):
        if len(found) == count:
            break
        predictor.set_image(read_image(path))
        ious = ask(predictor, truths, box=True)["single"]
        found.append([(size_class(o["area"]), iou) for o, iou in zip(objects, ious, strict=True)])
    return found


def ground_truth(found: list[Boxes], base: list[Boxes]) -> dict[str, Any]:
    """Means over objects by size class, and what they lost against ``base``, in points."""
    groups: dict[str, Any] = {}
    for group in ("all", *SIZE_CLASSES):
        mine, theirs = ([[v for size, v in image if group in ("all", size)] for image in s] for s in (found, base))
        lost = [np.array(b) - np.array(m) for m, b in zip(mine, theirs, strict=True) if m]
        if not lost:
            continue
        groups[group] = {
            "count": sum(len(v) for v in lost),
            "miou": float(np.mean(np.concatenate([np.array(m) for m in mine]))),
            "drop_points": 100 * float(np.mean(np.concatenate(lost))),
            "drop_standard_error": 100 * clustered_error(lost),
        }
    return groups


def clustered_error(groups: Sequence[NDArray[np.float64]]) -> float:
    """The standard error of the mean over all members, where those of one group (image) are not independent.

    The mean is a ratio of sums: Cochran, Sampling Techniques, 3rd ed. 1977, equation 9.14.
    """
    sums, counts = np.array([g.sum() for g in groups]), np.array([g.size for g in groups])
    residuals = sums - counts * (sums.sum() / counts.sum())
    n = len(groups)
    return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum())


def agreement(predictor: Predictor, answers: Answers, images: Path) -> dict[str, Any]:
    """Mask IoU with PyTorch FP32: the distribution, groups of it, and the standard error of its mean."""
    measured = measure(predictor, answers, images)
    error = clustered_error(list(measured.ious))
    return {**asdict(summarize_answers("onnxruntime", answers, measured)), "standard_error": error}


def evaluate(
    rows: Sequence[Variant], recipe: Recipe, chosen: list[tuple[Path, Prompts]], options: argparse.Namespace, work: Path
) -> list[dict[str, Any]]:
    """All rows in order; the first is the base of what the others lose."""
    images = work / "images"
    images.mkdir()
    for path, _ in chosen:
        (images / path.name).symlink_to(path.resolve())
    export(recipe, checkpoint_path(recipe), work / "export")
    simplified = {n: simplify(work / "export" / f"{n}.onnx", work / f"{n}.onnx").output for n in GRAPHS}
    torch_model = reference_predictor(load_model(recipe, checkpoint_path(recipe)), recipe)
    answers = answer(torch_model, [p for p, _ in chosen], [q for _, q in chosen])
    results: list[dict[str, Any]] = []
    base: list[Boxes] = []
    for index, variant in enumerate(rows):
        folder = work / str(index)
        folder.mkdir()
        graphs = graphs_of(variant, simplified, recipe, folder)
        with opened(graphs, recipe, options.threads) as predictor:
            found = boxes(predictor, options.data, options.split, options.box_images)
            base = base or found
            row = {"name": variant.name, "rules": None if variant.rules is None else asdict(variant.rules)}
            row |= {"agreement": agreement(predictor, answers, images), "ground_truth": ground_truth(found, base)}
        results.append(row)
        show(row)
    return results


def show(row: Mapping[str, Any]) -> None:
    iou, truth = row["agreement"], row["ground_truth"]
    sizes = ", ".join(
        f"{s} {iou['by_size'][s]['mean']:.4f} / {truth[s]['drop_points']:+.2f}"
        for s in SIZE_CLASSES
        if s in truth and s in iou["by_size"]
    )
    print(
        f"{row['name']:36s} IoU {iou['mask_iou']['mean']:.4f} ± {iou['standard_error']:.4f}, GT box "
        f"{truth['all']['miou']:.4f}, lost {truth['all']['drop_points']:+.2f} ± "
        f"{truth['all']['drop_standard_error']:.2f} points; {sizes}",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--search", type=Path)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--box-images", type=int, help="images for ground-truth boxes; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/precision.json"))
    options = parser.parse_args()
    recipe = load_recipe("reference")
    chosen = choose(options.data, options.images, np.random.default_rng(options.seed), options.split)
    rows = variants(load_target("cpu").rules_for(recipe), options.search)
    with tempfile.TemporaryDirectory() as folder:
        results = evaluate(rows, recipe, chosen, options, Path(folder))
    limit = "" if options.box_images is None else f" --box-images {options.box_images}"
    write_json(
        options.output,
        {
            "command": f"python benchmarks/precision.py --data DIR --images {options.images}{limit} "
            f"--seed {options.seed} --threads {options.threads} --split {options.split}"
            + ("" if options.search is None else f" --search {options.search.name}"),
            "witness": "ONNX Runtime, CPU encoding of INT8; decoder in FP32 except where a search chose otherwise",
            "split": options.split,
            "images": len(chosen),
            "prompts_per_image": 4,
            "calibration_images": len(list_images(PHOTOS / "calibration")),
            "rows": results,
            "recipe_digest": recipe.digest,
            "machine": machine(),
            "tools": tool_versions(),
        },
    )


if __name__ == "__main__":
    main()
