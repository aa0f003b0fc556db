"""Mask quality of the reference model against ground truth, at the deployed size, in PyTorch float32.

    python benchmarks/reference_quality.py --data DIR [--weights FILE] [--output benchmarks/results/cpu/FILE.json]

DIR holds the evaluation packs (coco-subset, bsds500, ecssd, davis-frames). mIoU is the mean over masks of the IoU at
the original image size. Prompts: "GT box", the tight box of the true mask; "centre click", one foreground point at the
pixel of the true mask farthest from its border. Answers: "single", mask 0; "best of 3", the candidate (masks 1-3)
closest to the truth; "by predicted IoU", the candidate that the model itself ranks first. interval: 95 % of the mIoU by
resampling the images, or DAVIS's sequences.

``sam-export eval`` measures the same of any model, with --tight-boxes for these boxes. Its clicks are at the pixel of
the largest Euclidean distance, here at the last to survive erosion by squares, as in the committed results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.images import read_image
from edgesam_deploy.masks import MASK_THRESHOLD, decode_segmentation, mask_iou, tight_box
from edgesam_deploy.measure.accuracy import size_class
from edgesam_deploy.measure.protocol import BASELINES, ELLIPSE, fill
from edgesam_deploy.measure.quality import bootstrap
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.recipe import PACKAGE, load_recipe

Mask = NDArray[np.bool_]
# Name of an answer -> IoU of each mask.
Ious = dict[str, list[float]]
# What is resampled together, an image or a sequence, and the IoU of one of its masks.
Found = list[tuple[str, float]]
CHUNK = 16
BSDS_IMAGES = 60
BSDS_MIN_SHARE = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=PACKAGE / "assets" / "reference.pt")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/reference-quality.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe("reference")
    predictor = reference_predictor(load_model(recipe, arguments.weights), recipe)
    figures = []
    for name, measure in (("coco", coco), ("bsds", bsds), ("ecssd", ecssd), ("davis", davis)):
        print(f"measuring {name}", file=sys.stderr)
        figures += measure(predictor, arguments.data)
    for figure in figures:
        ends = "({:.3f}-{:.3f})".format(*figure["interval"])
        told = "{pack:14} {split:5} {prompt:13} {answer:18} {group:16} n={count:<5} mIoU {miou:.4f}".format(**figure)
        print(told, ends)
    origin = {
        "weights_sha256": sha256_file(arguments.weights),
        "image_size": recipe.geometry.image_size,
        "torch": torch.__version__,
        "precision": "float32",
        "threads": arguments.threads,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"python benchmarks/reference_quality.py --data DIR --weights {arguments.weights.name} "
        f"--threads {arguments.threads}",
    }
    write_json(arguments.output, {"origin": origin, "figures": figures})


def coco(predictor: Predictor, data: Path) -> list[dict[str, Any]]:
    """GT boxes on coco-subset/val without crowds, by size and by the kind of annotation; and two baselines."""
    answers: dict[str, dict[str, Found]] = defaultdict(lambda: defaultdict(list))
    for path, objects_in, truths in coco_objects(data, "val"):
        predictor.set_image(read_image(path))
        ious = ask(predictor, truths, box=True)
        for name in BASELINES:
            ious[name] = [mask_iou(fill(tight_box(t), t.shape, ellipse=name == ELLIPSE), t) for t in truths]
        for answer, values in ious.items():
            for annotation, iou in zip(objects_in, values, strict=True):
                for group in ("all", size_class(annotation["area"]), annotation["source"]):
                    answers[answer][group].append((path.name, iou))
    return [row("coco-subset", "val", "GT box", a, g, v) for a, groups in answers.items() for g, v in groups.items()]


def coco_objects(data: Path, split: str) -> Iterator[tuple[Path, list[dict[str, Any]], list[Mask]]]:
    """(image, annotations, their masks) for every image of coco-subset that has an object; crowds are left out."""
    folder = data / "coco-subset"
    content = json.loads((folder / f"instances_{split}.json").read_text("utf-8"))
    for info in content["images"]:
        annotations = [a for a in content["annotations"] if a["image_id"] == info["id"] and not a["iscrowd"]]
        truths = [decode_segmentation(a["segmentation"], info["height"], info["width"]) for a in annotations]
        if truths:
            yield folder / info["file_name"], annotations, truths


def bsds(predictor: Predictor, data: Path) -> list[dict[str, Any]]:
    """Centre clicks in the regions that annotators of bsds500/test drew, the first images by name."""
    answers: dict[str, Found] = defaultdict(list)
    for path in sorted((data / "bsds500" / "test").glob("*.jpg"))[:BSDS_IMAGES]:
        predictor.set_image(read_image(path))
        truths = []
        for file in sorted(path.parent.glob(f"{path.stem}.seg*.png")):
            labels = read_image(file)[..., 0]
            regions = [labels == k for k in np.unique(labels)]
            truths += [r for r in regions if r.mean() >= BSDS_MIN_SHARE]
        for answer, values in ask(predictor, truths, box=False).items():
            answers[answer] += [(path.name, iou) for iou in values]
    return [row("bsds500", "test", "centre click", a, f"{BSDS_IMAGES} images", v) for a, v in answers.items()]


def ecssd(predictor: Predictor, data: Path) -> list[dict[str, Any]]:
    return objects(predictor, data, "ecssd", by_sequence=False)


def davis(predictor: Predictor, data: Path) -> list[dict[str, Any]]:
    return objects(predictor, data, "davis-frames", by_sequence=True)


def objects(predictor: Predictor, data: Path, pack: str, by_sequence: bool) -> list[dict[str, Any]]:
    """One object per image; frames of a sequence count as one mask, their mean IoU."""
    answers: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((data / pack / "val").glob("*.jpg")):
        truth = read_image(path.with_suffix(".png"))[..., 0] > 127
        predictor.set_image(read_image(path))
        for prompt, box in (("GT box", True), ("centre click", False)):
            for answer, values in ask(predictor, [truth], box=box).items():
                answers[prompt, answer][path.stem.rpartition("_")[0] if by_sequence else path.stem] += values
    group = "mean per sequence" if by_sequence else "all"
    return [
        row(pack, "val", prompt, answer, group, [(name, float(np.mean(v))) for name, v in groups.items()])
        for (prompt, answer), groups in answers.items()
    ]


def ask(predictor: Predictor, truths: list[Mask], box: bool) -> Ious:
    """IoU of the model's answers to one prompt per true mask, by the name of the answer, in the order of ``truths``."""
    result: Ious = defaultdict(list)
    for start in range(0, len(truths), CHUNK):
        chunk = truths[start : start + CHUNK]
        height, width = chunk[0].shape
        if box:
            prompts = check_prompts(None, None, np.stack([tight_box(t) for t in chunk]), (height, width))
        else:
            points = [[centre(t)] for t in chunk]
            prompts = check_prompts(points, np.ones((len(chunk), 1)), None, (height, width))
        low_res, scores = predictor.decode(prompts)
        for truth, logits, score in zip(chunk, low_res, scores, strict=True):
            # Upscaling is what takes the time: a box has one answer, the others are not looked at.
            wanted = logits[:1] if box else logits
            masks = predictor.postprocess(wanted[None], (height, width))[0] > MASK_THRESHOLD
            ious = [mask_iou(m, truth) for m in masks]
            if box:
                result["single"].append(ious[0])
            else:
                result["best of 3"].append(max(ious[1:]))
                result["by predicted IoU"].append(ious[1 + int(np.argmax(score[1:]))])
    return result


def centre(mask: Mask) -> tuple[float, float]:
    """(x, y) of the last pixel to survive erosion by a 3x3 square; outside the image counts as outside the mask."""
    current = mask
    while current.any():
        last, padded = current, np.pad(current, 1)
        rows = padded[:-2] & padded[1:-1] & padded[2:]
        current = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    ys, xs = np.nonzero(last)
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    return float(xs[nearest]), float(ys[nearest])


def row(pack: str, split: str, prompt: str, answer: str, group: str, found: Found) -> dict[str, Any]:
    names, ious = zip(*found, strict=True)
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    interval = bootstrap(np.array(ious), np.array([number_of[name] for name in names]), by_group=False)
    return {"pack": pack, "split": split, "prompt": prompt, "answer": answer, "group": group, "count": len(ious),
            "miou": round(float(np.mean(ious)), 4), "interval": [round(end, 4) for end in interval]}  # fmt: skip


if __name__ == "__main__":
    main()
