"""What an evaluation leaves in a folder: eval.json, masks.csv, images.csv and worst.png, all of them or none."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgesam_deploy.errors import OutputError
from edgesam_deploy.files import write_json, writing, writing_folder
from edgesam_deploy.images import read_image
from edgesam_deploy.masks import tight_box
from edgesam_deploy.measure.evaluate import TRUTH, Case, ImageResult, MaskRecord
from edgesam_deploy.measure.truths import Mask
from edgesam_deploy.overlay import draw_captioned, write_picture
from edgesam_deploy.prompts import Prompts

RESULT, MASKS, IMAGES, WORST = FILES = ("eval.json", "masks.csv", "images.csv", "worst.png")
# The contact sheet: columns and rows of tiles of (width, height) pixels, the gap between them and its colour.
COLUMNS, ROWS = 4, 3
TILE, GAP, GROUND = (360, 300), 6, (24, 24, 24)
# What is shown around the masks and the prompt, as a share of their size, and at least so many pixels of the image.
MARGIN, SMALLEST = 0.35, 48


class Worst:
    """The cases of the lowest IoU, at most one per image, in rising order; of equal ones the largest first."""

    def __init__(self, count: int = COLUMNS * ROWS) -> None:
        self._count = count
        self.cases: list[tuple[Path, Case]] = []

    def add(self, result: ImageResult) -> None:
        if result.worst is not None:
            self.cases.append((result.path, result.worst))
            self.cases.sort(key=lambda case: (case[1].record.iou, -case[1].record.area))
            del self.cases[self._count :]


def check_folder(folder: Path) -> None:
    """Raise OutputError unless ``write_files`` may replace the folder: what is in it is an earlier evaluation."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write an evaluation to {folder}: it is a file; give another --output")
    others = sorted({p.name for p in folder.iterdir()} - set(FILES)) if folder.is_dir() else []
    if others:
        raise OutputError(
            f"cannot write an evaluation to {folder}: it holds {others[0]}, which would be lost; give another --output"
        )


def write_files(
    folder: Path, result: Mapping[str, Any], results: Sequence[ImageResult], worst: Sequence[tuple[Path, Case]]
) -> None:
    """result: what becomes eval.json, with a list of what worst.png shows. worst: photographs and what to draw."""
    check_folder(folder)
    shown = [{name: getattr(case.record, name) for name in ("image", "target", "iou")} for _, case in worst]
    with writing_folder(folder) as place:
        write_json(place / RESULT, {**result, WORST: shown})
        write_masks(place / MASKS, (r for image in results for r in image.records))
        write_images(place / IMAGES, results)
        if worst:
            write_picture(contact_sheet(worst), place / WORST)


def write_masks(path: Path, records: Iterable[MaskRecord]) -> None:
    """A line for each record, written as it comes; None is an empty cell."""
    names = [field.name for field in fields(MaskRecord)]
    _write_csv(path, names, (asdict(record) for record in records))


def write_images(path: Path, results: Sequence[ImageResult]) -> None:
    """A line for each image: its targets, and the mean IoU of every answer to them."""
    rows: list[dict[str, Any]] = []
    answers: dict[str, None] = {}
    for result in results:
        row: dict[str, Any] = {"dataset": result.dataset, "image": result.image, "group": result.group}
        row |= {"width": result.hw[1], "height": result.hw[0], "targets": len({r.target for r in result.records})}
        ious: dict[str, list[float]] = {}
        for r in result.records:
            against = "" if r.against == TRUTH else f" ({r.against})"
            ious.setdefault(f"{r.prompt}, {r.answer}{against}", []).append(r.iou)
        row |= {name: float(np.mean(values)) for name, values in ious.items()}
        answers |= dict.fromkeys(ious)
        rows.append(row)
    _write_csv(path, ["dataset", "image", "group", "width", "height", "targets", *answers], rows)


def contact_sheet(worst: Sequence[tuple[Path, Case]]) -> Image.Image:
    """Tiles in rising order of IoU: the answer tinted, the true outline, the prompt, and both IoUs."""
    rows = -(-len(worst) // COLUMNS)
    size = (COLUMNS * (TILE[0] + GAP) + GAP, rows * (TILE[1] + GAP) + GAP)
    sheet = Image.new("RGB", size, GROUND)
    for i, (path, case) in enumerate(worst):
        tile = _tile(path, case)
        left, top = GAP + i % COLUMNS * (TILE[0] + GAP), GAP + i // COLUMNS * (TILE[1] + GAP)
        sheet.paste(tile, (left + (TILE[0] - tile.width) // 2, top + (TILE[1] - tile.height) // 2))
    return sheet


def _tile(path: Path, case: Case) -> Image.Image:
    """The part of the photograph that matters, enlarged before it is drawn on, so that lines are thin."""
    truth, answer = case.truth.unpack(), case.answer.unpack()
    left, top, right, bottom = _window(truth, answer, case.prompts)
    scale = min(TILE[0] / (right - left), TILE[1] / (bottom - top))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    part = np.s_[top:bottom, left:right]
    photo = Image.fromarray(read_image(path)[part]).resize(size, Image.Resampling.LANCZOS)
    enlarged = [
        np.asarray(Image.fromarray(mask[part]).convert("L").resize(size, Image.Resampling.BILINEAR)) > 127
        for mask in (truth, answer)
    ]
    said = case.record.predicted_iou
    caption = f"IoU {case.record.iou:.3f}" + ("" if said is None else f", predicted {said:.2f}")
    moved = _moved(case.prompts, (left, top), scale)
    return draw_captioned(np.asarray(photo), enlarged[1][None], moved, caption, truth=enlarged[0])


def _window(truth: Mask, answer: Mask, prompts: Prompts) -> tuple[int, int, int, int]:
    """left, top, right, bottom in pixels around everything that is drawn, inside the image."""
    boxes = [tight_box(mask) for mask in (truth, answer) if mask.any()]
    boxes += [] if prompts.boxes is None else list(prompts.boxes)
    if prompts.point_coords is not None:
        boxes += [np.tile(point, 2) for point in prompts.point_coords.reshape(-1, 2)]
    low = np.min([box[:2] for box in boxes], axis=0)
    high = np.max([box[2:] for box in boxes], axis=0)
    half = np.maximum((high - low) * (0.5 + MARGIN), SMALLEST / 2)
    # As wide and high as the tile shows at this scale, where the image has it.
    half = np.maximum(half, half[::-1] * (TILE[0] / TILE[1], TILE[1] / TILE[0]))
    middle, image = (low + high) / 2, np.array(truth.shape[::-1])
    first = np.clip(np.floor(middle - half), 0, image - 1).astype(int)
    last = np.clip(np.ceil(middle + half), first + 1, image).astype(int)
    return int(first[0]), int(first[1]), int(last[0]), int(last[1])


def _moved(prompts: Prompts, corner: tuple[int, int], scale: float) -> Prompts:
    """Prompts on the enlarged part."""
    points, boxes = prompts.point_coords, prompts.boxes
    return Prompts(
        None if points is None else (points + 0.5 - corner) * scale,
        prompts.point_labels,
        None if boxes is None else (boxes - np.tile(corner, 2)) * scale,
        batched=True,
    )


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Row by row: the text of millions of masks is not held in memory. Whole or not at all."""
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
