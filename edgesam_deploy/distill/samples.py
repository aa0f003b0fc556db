"""What one update sees: a pure function of (seed, step, process), so that a stopped run goes on as if it never was.

The images of step s are positions s*G to s*G+G-1 of an endless row: the permutation of epoch 0, then that of epoch 1,
and so on (G: images of one update, all processes together). What is done to an image depends on (seed, epoch, image).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from edgesam_deploy.contract import Geometry
from edgesam_deploy.distill.cache import TeacherCache
from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.options import DistillOptions, TrainOptions
from edgesam_deploy.distill.teacher import encoder_input
from edgesam_deploy.recipe import Pixels

UInt8 = npt.NDArray[np.uint8]
# (epoch, image, micro-step of the run): the images of a micro-step share what depends on the last alone.
Key = tuple[int, int, int]
# Smallest side of a random view, as a share of the picture's.
SMALLEST_VIEW = 0.4


@dataclass(frozen=True, slots=True)
class Frame:
    """How one of the two networks takes a picture."""

    geometry: Geometry
    pixels: Pixels


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """(epoch, image, micro-step) -> the student's input (3,S,S) uint8; the teacher's embedding (C,E,E) float16 from its
    cache, or without one the teacher's input of the same view (3,S',S') uint8; and (3,) int64, what prompts are drawn
    with: height and width of the view, and a random number."""

    def __init__(
        self, corpus: Corpus, student: Frame, teacher: Frame, options: DistillOptions, cache: TeacherCache | None
    ) -> None:
        self.corpus, self.student, self.teacher, self.options, self.cache = corpus, student, teacher, options, cache

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, Tensor]:
        epoch, index, _ = key
        rng = np.random.default_rng((self.options.seed, epoch, index))
        image = self.corpus.read(index)
        if rng.random() < self.options.views:
            image = view(rng, image)
        shown = change_colours(rng, image) if rng.random() < self.options.colours else image
        first = torch.from_numpy(encoder_input(shown, self.student.geometry, self.student.pixels))
        draw = torch.tensor([*image.shape[:2], int(rng.integers(2**62))])
        if self.cache is not None:
            return first, torch.from_numpy(self.cache[index]), draw
        return first, torch.from_numpy(encoder_input(image, self.teacher.geometry, self.teacher.pixels)), draw


class Steps(Sampler[list[Key]]):
    """The keys of every micro-step of one process, from ``start`` (in updates) to ``stop``."""

    def __init__(
        self, images: npt.NDArray[np.int64], options: TrainOptions, start: int, stop: int, rank: int, world: int
    ) -> None:
        self.images, self.options = images, options
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return (self.stop - self.start) * self.options.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        batch, known = self.options.batch, (-1, self.images)
        for micro in range(self.start * self.options.accumulate, self.stop * self.options.accumulate):
            first = (micro * self.world + self.rank) * batch
            keys = []
            for position in range(first, first + batch):
                epoch, place = divmod(position, len(self.images))
                if known[0] != epoch:
                    known = epoch, np.random.default_rng((self.options.seed, epoch)).permutation(self.images)
                keys.append((epoch, int(known[1][place]), micro))
            yield keys


def split(count: int, held: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers of the images to train on and of those to validate on: ``held`` of them evenly over the whole."""
    held_out = np.unique(np.linspace(0, count - 1, min(held, count // 2)).round().astype(np.int64))
    return np.setdiff1d(np.arange(count, dtype=np.int64), held_out), held_out


def updates(images: int, options: TrainOptions, world: int) -> int:
    """How many updates a run takes."""
    return max(1, round(options.epochs * images / (options.batch * options.accumulate * world)))


def view(rng: np.random.Generator, image: UInt8) -> UInt8:
    """A random window of the picture, half of them mirrored."""
    height, width = image.shape[:2]
    scale = rng.uniform(SMALLEST_VIEW, 1.0)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    cut = image[y : y + h, x : x + w]
    return np.ascontiguousarray(cut[:, ::-1] if rng.random() < 0.5 else cut)


def change_colours(rng: np.random.Generator, image: UInt8) -> UInt8:
    """Random contrast, brightness and a little mixing of the channels."""
    mix = np.eye(3) * rng.uniform(0.7, 1.3) + rng.normal(0, 0.05, (3, 3))
    shifted = image.reshape(-1, 3).astype(np.float32) @ mix.astype(np.float32) + rng.uniform(-20, 20, 3)
    changed: UInt8 = np.clip(shifted, 0, 255).astype(np.uint8).reshape(image.shape)
    return changed
