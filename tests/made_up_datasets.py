"""Tiny datasets of every layout with known masks: coloured rectangles and discs on noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

HW = (60, 90)
Mask = npt.NDArray[np.bool_]


def rectangle(left: int, top: int, right: int, bottom: int, hw: tuple[int, int] = HW) -> Mask:
    mask = np.zeros(hw, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def disc(x: int, y: int, radius: float, hw: tuple[int, int] = HW) -> Mask:
    ys, xs = np.mgrid[: hw[0], : hw[1]]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


# Two images: what is on each.
SCENES = ((rectangle(10, 8, 50, 40), disc(70, 30, 14.0)), (disc(40, 30, 20.0),))


def photograph(masks: tuple[Mask, ...], path: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 110, (*masks[0].shape, 3), dtype=np.uint8)
    for mask in masks:
        pixels[mask] = rng.integers(0, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def grey(values: npt.NDArray[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def rle(mask: Mask) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def annotation(number: int, image: int, mask: Mask, **others: Any) -> dict[str, Any]:
    """With a box a little wider than the mask, and an area that is not its pixels, as COCO's may be."""
    ys, xs = np.nonzero(mask)
    box = [float(xs.min()) - 0.5, float(ys.min()), float(np.ptp(xs)) + 2.0, float(np.ptp(ys)) + 1.0]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": box,
        "area": float(mask.sum()) + 0.5,
        "segmentation": rle(mask),
        **others,
    }


def coco_content() -> dict[str, Any]:
    """Image 1 with RLE, image 2 with a polygon and a crowd, image 3 with nothing."""
    polygon = [20.0, 10.0, 60.0, 10.0, 60.0, 50.0, 20.0, 50.0]
    square = rectangle(20, 10, 60, 50)
    images = [{"id": i, "file_name": f"images/{i}.jpg", "height": HW[0], "width": HW[1]} for i in (1, 2, 3)]
    return {
        "images": images,
        "annotations": [
            annotation(11, 1, SCENES[0][0], source="polygons"),
            annotation(21, 2, square, segmentation=[polygon], bbox=[20.0, 10.0, 40.0, 40.0]),
            annotation(12, 1, SCENES[0][1], source="panoptic"),
            annotation(22, 2, rectangle(0, 0, 90, 5), iscrowd=1),
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def coco(folder: Path) -> Path:
    content = coco_content()
    for number, masks in ((1, SCENES[0]), (2, (rectangle(20, 10, 60, 50),)), (3, SCENES[1])):
        photograph(masks, folder / "images" / f"{number}.jpg", number)
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def lvis(folder: Path) -> Path:
    content = coco_content()
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['id']:012}.jpg"
        del image["file_name"]
        photograph(SCENES[0], folder / "val2017" / f"{image['id']:012}.jpg")
    content["annotations"] = [
        {k: v for k, v in a.items() if k != "iscrowd"} for a in content["annotations"] if not a["iscrowd"]
    ]
    (folder / "lvis.json").write_text(json.dumps(content))
    return folder / "lvis.json"


def sa1b(folder: Path) -> Path:
    for number in (10, 9):
        photograph(SCENES[0], folder / f"sa_{number}.jpg")
        annotations = [annotation(100 * number + i, number, mask) for i, mask in enumerate(SCENES[0])]
        for entry in annotations:
            del entry["iscrowd"], entry["image_id"]
        content = {"image": {"image_id": number, "height": HW[0], "width": HW[1]}, "annotations": annotations}
        (folder / f"sa_{number}.json").write_text(json.dumps(content))
    return folder


def labels(folder: Path) -> Path:
    """Image 7 by two people: one drew both things, the other one and a speck."""
    photograph(SCENES[0], folder / "7.jpg")
    first = np.ones(HW, np.uint8)
    first[SCENES[0][0]], first[SCENES[0][1]] = 2, 3
    second = np.ones(HW, np.uint8)
    second[SCENES[0][0]] = 9
    second[:3, :3] = 200
    grey(first, folder / "7.seg0.png")
    grey(second, folder / "7.seg1.png")
    return folder


def masks(folder: Path) -> Path:
    for name, mask in (("b", SCENES[1][0]), ("a", SCENES[0][0])):
        photograph((mask,), folder / f"{name}.jpg")
        grey(mask.astype(np.uint8) * 255, folder / f"{name}.png")
    return folder


def davis(folder: Path) -> Path:
    """A sequence of one frame, and one of two."""
    for name, mask in (
        ("cow_walk_00000", SCENES[1][0]),
        ("cow_walk_00005", disc(42, 30, 20.0)),
        ("dog_00000", SCENES[0][0]),
    ):
        photograph((mask,), folder / f"{name}.jpg")
        grey(mask.astype(np.uint8) * 255, folder / f"{name}.png")
    return folder


def davis_tree(folder: Path) -> Path:
    for sequence, frame in (("cow", "00000"), ("cow", "00001"), ("dog", "00000")):
        photograph(SCENES[1], folder / "JPEGImages" / "480p" / sequence / f"{frame}.jpg")
        grey(SCENES[1][0].astype(np.uint8) * 255, folder / "Annotations" / "480p" / sequence / f"{frame}.png")
    return folder


def cityscapes(folder: Path, split: str = "val") -> Path:
    name = "bonn_000000_000019"
    photograph(SCENES[0], folder / "leftImg8bit" / split / "bonn" / f"{name}_leftImg8bit.png")
    ids = np.full(HW, 7, np.uint16)  # a road: no instances
    ids[SCENES[0][0]], ids[SCENES[0][1]] = 26001, 24000
    ids[:4, :4] = 26  # a group of cars that nobody told apart
    grey(ids, folder / "gtFine" / split / "bonn" / f"{name}_gtFine_instanceIds.png")
    return folder
