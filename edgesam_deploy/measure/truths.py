"""From annotation files to true masks: COCO's polygons and RLE, SA-1B's files, label maps, binary masks, instance ids.

Each kind is small and can be sent to another process; it reads its file when it is asked for masks.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgesam_deploy.errors import InputError
from edgesam_deploy.masks import decode_segmentation, tight_box

Mask = npt.NDArray[np.bool_]
# Cityscapes writes the instance n of class c as 1000 c + n, and what has no instances as c.
FIRST_INSTANCE = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """One true mask. mask: (H,W) of the image's size, not empty. box_xyxy: (4,) float64, inside the image.

    area: pixels, or what a COCO annotation says of it. source: the annotation's own label of where it is from.
    """

    id: str
    mask: Mask
    box_xyxy: npt.NDArray[np.float64]
    area: float
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a file has of a target. box_xyxy, area: None where the mask itself says it. where: for messages."""

    id: str
    where: str
    mask: Mask
    box_xyxy: tuple[float, float, float, float] | None = None
    area: float | None = None
    source: str | None = None


class Truth(Protocol):
    """Where an image's true masks are."""

    def read(self) -> Iterator[Found]:
        """The masks, one by one, in the file's order. Raises InputError for a file that is not as it should be."""


@dataclass(frozen=True, slots=True)
class CocoAnnotations:
    """annotations: COCO's, of one image; hw: the size that the file states for it. file: where they are, for messages.

    Area and box must be finite: JSON as Python reads it may hold NaN and Infinity.
    """

    annotations: tuple[Mapping[str, Any], ...]
    hw: tuple[int, int]
    file: Path
    tight_boxes: bool = False

    def read(self) -> Iterator[Found]:
        for annotation in self.annotations:
            where = f"annotation {annotation.get('id')}"
            try:
                mask = decode_segmentation(annotation["segmentation"], *self.hw)
                x, y, width, height = (float(v) for v in annotation["bbox"])
                box = None if self.tight_boxes else (x, y, x + width, y + height)
                area, name = float(annotation["area"]), str(annotation["id"])
                if not all(map(math.isfinite, (x, y, width, height, area))):
                    raise ValueError(f"not finite: bbox {annotation['bbox']}, area {area}")
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
                raise InputError(
                    f"{where} is not COCO's: expected id, segmentation (polygons or RLE), bbox and area, and found "
                    f"{type(error).__name__}: {error}; correct it in {self.file}, or take it out"
                ) from error
            yield Found(name, where, mask, box, area, annotation.get("source"))


@dataclass(frozen=True, slots=True)
class Sa1bFile:
    """file: sa_N.json, COCO's annotations of one image."""

    file: Path
    crowds: bool = False
    tight_boxes: bool = False

    def read(self) -> Iterator[Found]:
        content = read_json(self.file)
        try:
            hw = (int(content["image"]["height"]), int(content["image"]["width"]))
            annotations = tuple(a for a in content["annotations"] if self.crowds or not a.get("iscrowd"))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(
                f"{self.file} is not SA-1B's: expected 'image' and 'annotations', lacks or garbles {error}"
            ) from error
        yield from CocoAnnotations(annotations, hw, self.file, self.tight_boxes).read()


@dataclass(frozen=True, slots=True)
class LabelMaps:
    """files: one map per person who drew; every label that covers min_share of the image is a target."""

    files: tuple[Path, ...]
    min_share: float

    def read(self) -> Iterator[Found]:
        for file in self.files:
            labels = read_values(file)
            drawn = file.stem.rpartition(".")[2]
            for label in np.unique(labels).tolist():
                mask = labels == label
                if mask.mean() >= self.min_share:
                    yield Found(f"{drawn}:{label}", str(file), mask)


@dataclass(frozen=True, slots=True)
class BinaryMask:
    """file: 255 where the object is, 0 elsewhere."""

    file: Path

    def read(self) -> Iterator[Found]:
        values = read_values(self.file, grey=True)
        if found := sorted(set(np.unique(values).tolist()) - {0, 255}):
            raise InputError(
                f"{self.file} is not a binary mask: expected 255 = object and 0 = background, got {found[0]} too; cut "
                "it at a threshold, or give it as label maps"
            )
        yield Found("0", str(self.file), values == 255)


@dataclass(frozen=True, slots=True)
class InstanceIds:
    """file: Cityscapes' instanceIds; values from 1000 on are instances."""

    file: Path

    def read(self) -> Iterator[Found]:
        ids = read_values(self.file)
        for value in np.unique(ids).tolist():
            if value >= FIRST_INSTANCE:
                yield Found(str(value), str(self.file), ids == value)


def targets_of(truth: Truth, image: str, image_hw: tuple[int, int], skip_empty: bool) -> Iterator[Target]:
    """Targets of an image of (H,W) pixels, checked; ``image`` is its name in messages."""
    for found in truth.read():
        if found.mask.shape != image_hw:
            (height, width), (image_height, image_width) = found.mask.shape, image_hw
            raise InputError(
                f"{found.where} is {width}x{height} pixels large and its {image} {image_width}x{image_height}: "
                "expected the same size; give the images that were annotated"
            )
        empty = not found.mask.any()
        box = None if empty else _box(found, image_hw)
        if box is None:
            if skip_empty:
                continue
            raise InputError(
                f"{found.where} of {image} has {'no pixel' if empty else 'a box with no area'}: expected a mask to "
                "compare with; take it out, or leave such targets out with --skip-empty"
            )
        area = float(np.count_nonzero(found.mask)) if found.area is None else found.area
        yield Target(found.id, found.mask, box, area, found.source)


def read_json(path: Path) -> Any:
    """Raises InputError for a file that is cut or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"expected annotations in JSON, {path} is not: {error}; download it again") from error


def read_values(path: Path, grey: bool = False) -> npt.NDArray[np.generic]:
    """The values (H,W) of a PNG as they are stored; grey: of a palette, their brightness. Raises InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                values = np.asarray(image.convert("L") if grey and image.mode in ("1", "P") else image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"expected a PNG of labels, {path} is not readable: {error}; copy it again") from error
    if values.ndim != 2:
        raise InputError(f"expected one channel of labels in {path}, got {values.shape[-1]}; save it as a grey PNG")
    return values


def _box(found: Found, image_hw: tuple[int, int]) -> npt.NDArray[np.float64] | None:
    """xyxy: the annotation's own, cut at the image's edge, which rounding may cross; None if nothing is left."""
    if found.box_xyxy is None:
        return tight_box(found.mask).astype(np.float64)
    height, width = image_hw
    box = np.clip(np.array(found.box_xyxy), 0, [width, height, width, height])
    return box if box[0] < box[2] and box[1] < box[3] else None
