"""Whether a student's embeddings mean to the teacher's decoder what the teacher's do: masks of held-out images.

Agreement, not accuracy: the target is the teacher's mask. Masks are compared at the decoder's own size, inside the
picture; ``sam-export eval`` compares at the size of the image, and with the truth.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from edgesam_deploy.contract import (
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_FOREGROUND,
    LABEL_PADDING,
    Geometry,
)
from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.teacher import Teacher, encoder_input, encoder_of
from edgesam_deploy.files import writing
from edgesam_deploy.masks import MASK_THRESHOLD, mask_iou
from edgesam_deploy.models import architecture
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.transforms import resized_hw

# As shares of the picture's width and height.
CLICKS = ((0.5, 0.5), (0.3, 0.35), (0.7, 0.35), (0.5, 0.75), (0.3, 0.7), (0.7, 0.7))
BOXES = ((0.25, 0.25, 0.75, 0.75), (0.1, 0.1, 0.9, 0.9), (0.05, 0.45, 0.5, 0.95), (0.55, 0.1, 0.95, 0.6))
# In the picture of samples: side of one view, and the colour of masks.
VIEW, TINT = 256, np.array([30, 144, 255], np.float32)
SHOWN = (0, 1, len(CLICKS), len(CLICKS) + 1)
# A photograph, the wanted masks, and those that were found.
View = tuple[npt.NDArray[np.uint8], Sequence[npt.NDArray[np.bool_]], Sequence[npt.NDArray[np.bool_]]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over held-out images. loss: mean absolute difference of embeddings."""

    images: int
    click_iou: float
    box_iou: float
    cosine: float
    l1: float


@dataclass
class Judge:
    """Holds the teacher's embeddings of the held-out images and its decoder. model: the teacher's network."""

    corpus: Corpus
    held: Sequence[int]
    teacher: Teacher
    model: nn.Module
    recipe: Recipe
    device: torch.device

    def __post_init__(self) -> None:
        # A copy, which stays where it is cheap: the network itself may move to a GPU.
        model = copy.deepcopy(self.model).cpu()
        decoder: Any = architecture(self.recipe).reference_decoder(model, self.recipe).eval()
        self._shapes, self._embeddings, self._masks = [], [], []
        for index in self.held:
            image = self.corpus.read(index)
            found = self.teacher.embed(encoder_input(image, self.teacher.geometry, self.teacher.pixels)[None])
            self._shapes.append((image.shape[0], image.shape[1]))
            self._embeddings.append(found.astype(np.float16))
            self._masks.append(_decode(decoder, self.recipe.geometry, torch.from_numpy(found), self._shapes[-1], None))

    @torch.no_grad()  # inference mode would leave encoders' caches as tensors that no update may touch
    def __call__(self, student: nn.Module, recipe: Recipe, samples: Path | None = None) -> Agreement:
        """How a student in eval mode does. samples: a picture of the first four images to draw, teacher beside it."""
        encoder: Any = encoder_of(student, recipe).eval().to(self.device)
        decoder: Any = architecture(recipe).reference_decoder(copy.deepcopy(student).cpu(), recipe).eval()
        rows: list[tuple[float, float, float, float]] = []
        drawn: list[View] = []
        for number, index in enumerate(self.held):
            image = self.corpus.read(index)
            given = torch.from_numpy(encoder_input(image, recipe.geometry, recipe.pixels)[None]).to(self.device)
            found = encoder(given).float().cpu()
            wanted = torch.from_numpy(self._embeddings[number]).float()
            theirs, choice = self._masks[number]
            mine, _ = _decode(decoder, recipe.geometry, found, self._shapes[number], choice)
            ious = [mask_iou(a, b) for a, b in zip(mine, theirs, strict=True)]
            cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=1).mean().item()
            difference = (found - wanted).abs().mean().item()
            clicks = len(CLICKS)
            rows.append((float(np.mean(ious[:clicks])), float(np.mean(ious[clicks:])), cosine, difference))
            if number < 4 and samples is not None:
                drawn.append((image, [theirs[i] for i in SHOWN], [mine[i] for i in SHOWN]))
        if samples is not None:
            draw_views(samples, drawn)
        return Agreement(len(rows), *(float(np.mean(column)) for column in zip(*rows, strict=True)))


@torch.inference_mode()
def _decode(
    decoder: Any, geometry: Geometry, embedding: Tensor, hw: tuple[int, int], choice: npt.NDArray[np.int64] | None
) -> tuple[list[npt.NDArray[np.bool_]], npt.NDArray[np.int64]]:
    """Masks inside the picture, clicks first, and which candidate each is: the teacher's choice for both."""
    masks, scores = [], []
    for coords, labels in prompts(geometry, hw):
        blank = torch.zeros(len(coords), 1, geometry.mask_size, geometry.mask_size)
        extra = (blank, torch.zeros(len(coords))) if geometry.mask_input else ()
        low_res, iou = decoder(embedding, torch.from_numpy(coords), torch.from_numpy(labels), *extra)
        masks.append(low_res.numpy())
        scores.append(iou.numpy())
    if choice is None:
        choice = np.zeros(len(CLICKS) + len(BOXES), np.int64)
        # One click is ambiguous: the candidate that the teacher thinks best. A box has one answer.
        if masks[0].shape[1] > 1:
            choice[: len(CLICKS)] = geometry.first_candidate + scores[0][:, geometry.first_candidate :].argmax(1)
    height, width = resized_hw(hw, geometry.mask_size, geometry.resize)
    low = np.concatenate(masks)[np.arange(len(choice)), choice, :height, :width]
    return list(low > MASK_THRESHOLD), choice


def prompts(geometry: Geometry, hw: tuple[int, int]) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """point_coords (P,2,2) in the model frame and point_labels (P,2): first the clicks, then the boxes."""
    height, width = resized_hw(hw, geometry.prompt_size, geometry.resize)
    clicks = np.zeros((len(CLICKS), 2, 2), np.float32)
    clicks[:, 0] = np.array(CLICKS) * (width, height)
    boxes = (np.array(BOXES) * (width, height, width, height)).reshape(-1, 2, 2).astype(np.float32)
    return [
        (clicks, np.tile(np.array([LABEL_FOREGROUND, LABEL_PADDING], np.float32), (len(CLICKS), 1))),
        (boxes, np.tile(np.array([LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT], np.float32), (len(BOXES), 1))),
    ]


def draw_views(path: Path, drawn: Sequence[View]) -> None:
    """A picture of photographs with masks on them: two rows for each, the wanted ones above and the student's below."""
    if not drawn:
        return
    rows = [_row(image, masks) for image, wanted, found in drawn for masks in (wanted, found)]
    with writing(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")


def _row(image: npt.NDArray[np.uint8], masks: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.uint8]:
    scale = VIEW / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    photo = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    row = np.full((VIEW, VIEW * len(masks), 3), 255, np.uint8)
    for place, low in enumerate(masks):
        mask = np.asarray(Image.fromarray(low).resize(size, Image.Resampling.NEAREST))
        tinted = np.where(mask[..., None], 0.45 * photo + 0.55 * TINT, photo).astype(np.uint8)
        row[: size[1], place * VIEW : place * VIEW + size[0]] = tinted
    return row
