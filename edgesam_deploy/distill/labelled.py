"""Images with true masks to learn from, by number, read when they are asked for.

The layouts are those of ``sam-export eval``. A dataset that is given twice is seen twice as often.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgesam_deploy.distill.samples import split
from edgesam_deploy.errors import InputError
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.datasets import Dataset
from edgesam_deploy.measure.truths import CocoAnnotations, LabelMaps, Target, Truth

MAX_LABEL = 255
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Source:
    """image: RGB, (W,H) as Pillow counts. layers: label maps of the same size, mode L: 0 is no target, every other
    value one region."""

    name: str
    image: Image.Image
    layers: tuple[Image.Image, ...]


class Labelled:
    """All images of ``datasets``, one after the other. Raises InputError for fewer than two photographs."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._images = [image for dataset in datasets for image in dataset.images]
        # What is held out together: a photograph in all datasets that have it, or a sequence, whose frames are alike.
        self._together = [
            f"{dataset.name}/{image.group}" if dataset.by_group else str(image.path.resolve())
            for dataset in datasets
            for image in dataset.images
        ]
        if len(set(self._together)) < 2:
            raise InputError(
                f"expected at least 2 photographs or sequences to learn from and to validate on, got "
                f"{len(set(self._together))}: give more images"
            )

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Source:
        """One image with its regions. Raises ImageError and InputError that name what cannot be read."""
        entry = self._images[index]
        pixels = read_image(entry.path)
        hw = (pixels.shape[0], pixels.shape[1])
        by_person: dict[str, list[Target]] = defaultdict(list)
        for target in entry.targets(hw):
            # Of a label map, the name before the colon says who drew it; several people's regions overlap.
            by_person[target.id.rpartition(":")[0]].append(target)
        layers = tuple(Image.fromarray(label_map(targets, hw)) for targets in by_person.values())
        return Source(entry.name, Image.fromarray(pixels), layers)

    def split(self, held: int) -> tuple[Numbers, Numbers]:
        """Numbers to train on and to validate on. A photograph that several datasets have, and a sequence of frames, is
        on one side alone; a copy of a photograph elsewhere counts as another one."""
        place = {name: number for number, name in enumerate(sorted(set(self._together)))}
        of_image = np.array([place[name] for name in self._together])
        held_out = split(len(place), held)[1]
        numbers = np.arange(len(self._images), dtype=np.int64)
        is_held = np.isin(of_image, held_out)
        return numbers[~is_held], numbers[is_held]

    def digest(self) -> str:
        """sha256 over names, sizes in bytes and COCO annotations: another set of files gives another one."""
        found = hashlib.sha256()
        for image in self._images:
            found.update(f"{image.name} {image.path.stat().st_size} {_fingerprint(image.truth)}\n".encode())
        return found.hexdigest()


def label_map(targets: Sequence[Target], hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """(H,W) uint8 of the targets, the 255 largest at most: where masks overlap, the smaller is in front."""
    labels = np.zeros(hw, np.uint8)
    largest = sorted(targets, key=lambda target: -int(np.count_nonzero(target.mask)))
    for label, target in enumerate(largest[:MAX_LABEL], start=1):
        labels[target.mask] = label
    return labels


def _fingerprint(truth: Truth) -> str:
    if isinstance(truth, CocoAnnotations):
        return repr((truth.annotations, truth.hw))
    files: tuple[Path, ...] = truth.files if isinstance(truth, LabelMaps) else (truth.file,)  # type: ignore[attr-defined]
    return ", ".join(f"{file.name} {file.stat().st_size}" for file in files)
