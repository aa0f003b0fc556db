"""Mask IoU of every precision with PyTorch FP32, on real images with objects, and of the two INT8 encodings.

    python benchmarks/agreement.py --data DIR [--images 48] [--seed 0] [--output benchmarks/results/cpu/agreement.json]

DIR holds coco-subset and davis-frames (evaluation splits). Each image gets four prompts from its ground truth: the
centre click (the pixel of the mask farthest from its border) and the tight box of two objects, drawn with the seed;
where there is one object, the second click and box are the default ones of ``measure.accuracy``. Ground truth is used
for prompts only: what is compared is masks with masks of the same weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from pycocotools.coco import COCO

from edgesam_deploy.bundle import Bundle, load_bundle, open_graphs
from edgesam_deploy.files import write_json
from edgesam_deploy.measure.accuracy import AccuracyResult, answer, compare, default_prompts
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import checkpoint_path, load_model
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import PRECISIONS, Recipe, load_recipe
from edgesam_deploy.runtime import SessionOptions
from edgesam_deploy.stages.build import BuildOptions, build
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.verify import witness
from edgesam_deploy.target import load_target

Prompts = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
MIN_AREA = 100  # pixels; smaller objects have no sensible centre


def choose(data: Path, count: int, rng: np.random.Generator, split: str = "val") -> list[tuple[Path, Prompts]]:
    """Two thirds coco-subset/val, one third davis-frames (one frame per sequence), with their prompts.

    split: "train" for coco-subset/train alone, which may be used to choose settings by.
    """
    coco = COCO(str(data / "coco-subset" / f"instances_{split}.json"))
    chosen: list[tuple[Path, Prompts]] = []
    ids = [i for i in sorted(coco.imgs) if _objects(coco, i)]
    frames = sorted((data / "davis-frames" / "val").glob("*.jpg")) if split == "val" else []
    davis = sorted({p.stem.rpartition("_")[0]: p for p in frames}.items())
    for image_id in rng.permutation(ids)[: count - min(len(davis), count // 3)]:
        path = data / "coco-subset" / coco.imgs[int(image_id)]["file_name"]
        masks = [coco.annToMask(a).astype(bool) for a in _objects(coco, int(image_id))]
        chosen.append((path, _prompts(masks, rng)))
    for _, path in davis[: min(len(davis), count // 3)]:
        mask = np.asarray(Image.open(path.with_suffix(".png"))) > 0
        chosen.append((path, _prompts([mask], rng)))
    return chosen


def _objects(coco: Any, image_id: int) -> list[Any]:
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False))
    return [a for a in annotations if a["area"] >= MIN_AREA]


def _prompts(masks: list[npt.NDArray[np.bool_]], rng: np.random.Generator) -> Prompts:
    points, boxes = default_prompts((masks[0].shape[0], masks[0].shape[1]))
    points, boxes = points[:2].copy(), boxes[:2].copy()
    for slot, index in enumerate(rng.permutation(len(masks))[:2]):
        rows, cols = np.nonzero(masks[index])
        points[slot] = _centre(masks[index])
        boxes[slot] = cols.min(), rows.min(), cols.max() + 1, rows.max() + 1
    return points, boxes


def _centre(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """(x, y) of the centre of a pixel far from the border: erode until the next step would leave nothing."""
    inner = Image.fromarray(np.pad(mask, 1).astype(np.uint8) * 255)
    while True:
        smaller = inner.filter(ImageFilter.MinFilter(3))
        if not np.asarray(smaller).any():
            rows, cols = np.nonzero(np.asarray(inner)[1:-1, 1:-1])
            middle = len(rows) // 2
            return np.array([cols[middle] + 0.5, rows[middle] + 0.5])
        inner = smaller


@contextmanager
def tensorrt_encoding(bundle: Bundle, stages: Path) -> Iterator[Predictor]:
    """The INT8 graph in TensorRT's encoding, run by ONNX Runtime: slow, and the same numbers."""
    graphs = {"encoder": stages / "quantize-encoder" / "encoder.onnx", "decoder": bundle.graph("decoder")}
    with open_graphs(graphs, bundle, SessionOptions(), "onnxruntime") as predictor:
        yield predictor


def evaluate(recipe: Recipe, chosen: list[tuple[Path, Prompts]], images: Path, work: Path) -> dict[str, AccuracyResult]:
    """Results by name: each precision against PyTorch, and the CPU twin against TensorRT's encoding."""
    paths, prompts = [p for p, _ in chosen], [q for _, q in chosen]
    reference = answer(reference_predictor(load_model(recipe, checkpoint_path(recipe)), recipe), paths, prompts)
    results: dict[str, AccuracyResult] = {}
    for precision in PRECISIONS:
        folder = work / f"{recipe.name}-{precision}"
        build(BuildOptions(recipe, load_target("cpu"), precision, folder, backend="onnxruntime"))
        bundle = load_bundle(folder)
        with witness(bundle) as (predictor, name):
            results[precision] = compare(predictor, reference, images, name)
        if precision == "int8":
            stages = folder.parent / ".stages" / folder.name
            with tensorrt_encoding(bundle, stages) as predictor:
                results["int8, TensorRT encoding"] = compare(predictor, reference, images, "onnxruntime")
                theirs = answer(predictor, paths, prompts)
            with bundle.open() as predictor:
                results["the two INT8 encodings"] = compare(predictor, theirs, images, "onnxruntime")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/agreement.json"))
    options = parser.parse_args()
    recipe = load_recipe("reference")
    chosen = choose(options.data, options.images, np.random.default_rng(options.seed))
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for path, _ in chosen:
            (images / path.name).symlink_to(path.resolve())
        linked = [(images / path.name, prompts) for path, prompts in chosen]
        results = evaluate(recipe, linked, images, Path(folder) / "engines")
    print(f"{'':26s}{'mean':>8s}{'median':>8s}{'p5':>8s}{'min':>8s}   by size, by prompt (means)")
    for name, result in results.items():
        iou = result.mask_iou
        groups = ", ".join(f"{k} {s.mean:.4f} ({s.count})" for k, s in {**result.by_size, **result.by_prompt}.items())
        print(f"{name:26s}{iou.mean:8.4f}{iou.median:8.4f}{iou.p5:8.4f}{iou.min:8.4f}   {groups}")
    write_json(
        options.output,
        {
            "command": f"python benchmarks/agreement.py --data DIR --images {options.images} --seed {options.seed}",
            "images": len(chosen),
            "prompts_per_image": 4,
            "results": {name: asdict(result) for name, result in results.items()},
            "checkpoint_sha256": recipe.checkpoint.sha256,
            "recipe_digest": recipe.digest,
            "tools": tool_versions(),
        },
    )


if __name__ == "__main__":
    main()
