"""How exactly a model places small boxes: ellipses in them, which need nothing of the image.

    python benchmarks/box_places.py --photos DIR --weights FILE [FILE ...] [--threads 1]

A decoder that does not know where a box's corners lie cannot be right about a small object, whatever its encoder sees.
On the first photographs of --photos, boxes at random places are asked for as a caller asks, their sides even in their
logarithm, and each answer is compared with the plain ellipse in its box, at the size of the photograph. Sides are in
pixels of the model's input. All --weights, of the reference recipe, get the same boxes. Writes benchmarks/results/
distill/places.json, an entry per file of weights, the others stay; about a minute for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_runs import RESULTS, origin, put
from numpy.typing import NDArray

from edgesam_deploy.files import sha256_file
from edgesam_deploy.images import SUFFIXES, read_image
from edgesam_deploy.masks import MASK_THRESHOLD, mask_iou
from edgesam_deploy.measure.protocol import fill
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.recipe import load_recipe

OUTPUT = RESULTS / "places.json"
PHOTOS, BOXES, SEED = 8, 16, 3
# Of the longer side, in pixels of the input; of COCO's objects those below 25 are small at 512.
SIDES = ((6, 10), (10, 16), (16, 25), (25, 50), (50, 100), (100, 200), (200, 400))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe("reference")
    photos = sorted(p for p in options.photos.iterdir() if p.suffix.lower() in SUFFIXES)[:PHOTOS]
    for path in options.weights:
        predictor = reference_predictor(load_model(recipe, path), recipe)
        found = measure(predictor, photos, recipe.geometry.image_size)
        print(path, " ".join(f"{name}: {value['iou']:.3f}" for name, value in found.items()), flush=True)
        entry = {"sides": found, "photos": len(photos), "boxes": BOXES, **origin()}
        put(options.output, sha256_file(path), {k: v for k, v in entry.items() if k != "teacher_weights_sha256"})


def measure(predictor: Predictor, photos: list[Path], size: int) -> dict[str, dict[str, Any]]:
    """Mean IoU with the ellipse, and the share of the answers' area that is outside the box, for each of ``SIDES``."""
    rng = np.random.default_rng(SEED)
    found: dict[str, list[tuple[float, float]]] = {}
    for path in photos:
        image = read_image(path)
        predictor.set_image(image)
        shape, scale = image.shape[:2], max(image.shape[:2]) / size
        for low, high in SIDES:
            boxes = draw(rng, low * scale, high * scale, shape)
            logits, _ = predictor.decode(check_prompts(None, None, boxes, shape))
            for box, mask in zip(boxes, logits, strict=True):
                answer = predictor.postprocess(mask[None, :1], shape)[0, 0] > MASK_THRESHOLD
                ellipse, inside = (fill(box, shape, ellipse=kind) for kind in (True, False))
                outside = float((answer & ~inside).sum()) / max(int(answer.sum()), 1)
                found.setdefault(f"{low}-{high}", []).append((mask_iou(answer, ellipse), outside))
    means = {name: np.mean(values, axis=0).round(4).tolist() for name, values in found.items()}
    return {name: {"iou": iou, "outside": outside} for name, (iou, outside) in means.items()}


def draw(rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(BOXES,4) boxes in an image of ``shape``: longer sides in low..high, the other at least a half of it."""
    longer = np.exp(rng.uniform(np.log(low), np.log(high), BOXES))
    sides = np.stack([longer, longer * rng.uniform(0.5, 1, BOXES)], axis=1)
    sides = np.minimum(np.where(rng.random((BOXES, 1)) < 0.5, sides, sides[:, ::-1]), np.array(shape[1::-1]))
    corner = rng.uniform(0, 1, (BOXES, 2)) * (np.array(shape[1::-1]) - sides)
    return np.concatenate([corner, corner + sides], axis=1).astype(np.float32)


if __name__ == "__main__":
    main()
