"""An independent second opinion on ``sam-export eval``: NanoSAM's rule on COCO boxes, by other people's code.

    python benchmarks/eval_cross_check.py BUNDLE instances.json [--images DIR] [--eval eval.json] [--limit N]
        [--output FILE]

Images, annotations and masks come from pycocotools' ``COCO`` and ``annToMask``, the IoU from ``pycocotools.mask.iou``,
and the masks from the public ``Predictor`` alone: of the answers to each box the one of the highest predicted IoU.
With --eval the mIoU must be that of the file's "box, by predicted IoU" to 1e-6; exit code 1 if it is not. --output:
what came out, with that file's figures for boxes; benchmarks/results/distill/cross-check.json is of the shipped bundle.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from edgesam_deploy import load_bundle, read_image
from edgesam_deploy.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=Path, help="with --eval")
    arguments = parser.parse_args()
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        coco = COCO(str(arguments.annotations))
    ious = []
    with load_bundle(arguments.bundle).open() as predictor:
        used = [i for i in coco.imgs if coco.getAnnIds(imgIds=i, iscrowd=False)]
        for image_id in used[: arguments.limit]:
            info = coco.imgs[image_id]
            predictor.set_image(read_image((arguments.images or arguments.annotations.parent) / info["file_name"]))
            for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id, iscrowd=False)):
                x, y, width, height = annotation["bbox"]
                box = [x, y, x + width, y + height]
                single, candidates = (predictor.predict(box=box, multimask_output=m) for m in (False, True))
                masks = np.concatenate([single.masks, candidates.masks])
                best = masks[np.concatenate([single.iou_predictions, candidates.iou_predictions]).argmax()]
                pair = [np.asfortranarray(m.astype(np.uint8)) for m in (best, coco.annToMask(annotation))]
                answer, truth = (coco_mask.encode(m) for m in pair)
                ious.append(float(coco_mask.iou([answer], [truth], [0])[0, 0]))
    print(f"{len(ious)} masks, mIoU {np.mean(ious):.9f}")
    if arguments.eval is not None:
        rows = json.loads(arguments.eval.read_text(encoding="utf-8"))["truth"]
        (row,) = (r for r in rows if (r["prompt"], r["answer"]) == ("box", "by predicted IoU"))
        difference = abs(row["miou"] - float(np.mean(ious)))
        print(f"{arguments.eval}: {row['count']} masks, mIoU {row['miou']:.9f}, difference {difference:.1e}")
        if arguments.output is not None:
            write_json(arguments.output, result(ious, difference, rows, arguments))
        if row["count"] != len(ious) or difference > 1e-6:
            sys.exit("they differ")


def result(
    ious: list[float], difference: float, rows: list[dict[str, Any]], given: argparse.Namespace
) -> dict[str, Any]:
    kept = ("prompt", "answer", "count", "miou", "interval")
    return {
        "checkpoint_sha256": load_bundle(given.bundle).manifest["checkpoint_sha256"],
        "bundle": given.bundle.name,
        "masks": len(ious),
        "pycocotools": float(np.mean(ious)),
        "difference": difference,
        "eval": [{name: row[name] for name in kept} for row in rows if row["prompt"] == "box"],
        "versions": {name: version(name) for name in ("pycocotools", "onnxruntime")},
    }


if __name__ == "__main__":
    main()
