"""Prompts in the loop: the student's masks against the teacher's, with new clicks where the two disagree.

After EdgeSAM (Zhou et al. 2023, arXiv:2312.06660, §3.3), which samples prompts this way from SA-1B's masks and boxes.
Here nothing is labelled: first clicks are random, and boxes are those of the teacher's own answers to clicks.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.contract import (
    LABEL_BACKGROUND,
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_FOREGROUND,
    LABEL_PADDING,
    Geometry,
)
from edgesam_deploy.distill.options import DistillOptions
from edgesam_deploy.masks import MASK_THRESHOLD, tight_box
from edgesam_deploy.models import architecture
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.transforms import resized_hw

# Of a box edge, as a share of the box's side: real boxes are not exact.
BOX_JITTER = 0.05
Floats = npt.NDArray[np.float32]


class Prompts(NamedTuple):
    """coords (P,N,2) float32 in pixels of the low-resolution mask, labels (P,N) float32; all boxes, or none."""

    coords: Floats
    labels: Floats

    @property
    def ambiguous(self) -> bool:
        """One click each, whose answer is one of the candidates."""
        return self.coords.shape[1] == 2 and bool((self.labels[:, 1] == LABEL_PADDING).all())


class PromptLoop(nn.Module):
    """embeddings and wanted (B,C,E,E), draw (B,3) int64 -> mean mask loss over images, prompts and rounds."""

    def __init__(
        self, student: nn.Module, recipe: Recipe, teacher: nn.Module, teacher_recipe: Recipe, options: DistillOptions
    ) -> None:
        super().__init__()
        self.options = options
        self.decoder: Any = architecture(recipe).reference_decoder(student, recipe)
        # A copy: the same module may be the student's, and learn.
        frozen = copy.deepcopy(teacher).requires_grad_(False).eval()
        self.teacher: Any = architecture(teacher_recipe).reference_decoder(frozen, teacher_recipe)
        self.geometry, self.teacher_geometry = recipe.geometry, teacher_recipe.geometry

    def forward(self, embeddings: Tensor, wanted: Tensor, draw: Tensor) -> Tensor:
        losses = []
        for embedding, target, (height, width, seed) in zip(embeddings, wanted, draw.tolist(), strict=True):
            rng = np.random.default_rng(seed)
            hw = resized_hw((height, width), self.geometry.mask_size, self.geometry.resize)
            for prompts in self._first(target[None], hw, rng):
                losses.append(self._rounds(embedding[None], target[None], prompts, hw, rng))
        return torch.stack(losses).mean()

    def _first(self, target: Tensor, hw: tuple[int, int], rng: np.random.Generator) -> list[Prompts]:
        """Half of the prompts as clicks, half as the boxes of what the teacher gives for clicks."""
        count = self.options.prompts
        clicks = np.zeros((count, 2, 2), np.float32)
        clicks[:, 0] = rng.uniform(0, 1, (count, 2)) * (hw[1], hw[0])
        labels = np.tile(np.array([LABEL_FOREGROUND, LABEL_PADDING], np.float32), (count, 1))
        asked = Prompts(clicks, labels)
        boxes = count // 2
        if not boxes:
            return [asked]
        masks, _, _ = self._teach(target, Prompts(clicks[:boxes], labels[:boxes]), hw)
        corners = np.stack([_box(mask, hw, rng) for mask in masks.cpu().numpy()])
        kinds = np.tile(np.array([LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT], np.float32), (boxes, 1))
        found = [Prompts(corners, kinds)]
        return found if boxes == count else [Prompts(clicks[boxes:], labels[boxes:]), *found]

    def _rounds(
        self, embedding: Tensor, target: Tensor, prompts: Prompts, hw: tuple[int, int], rng: np.random.Generator
    ) -> Tensor:
        losses = []
        for number in range(self.options.rounds):
            masks, scores, index = self._teach(target, prompts, hw)
            logits, mine = self._ask(self.decoder, self.geometry, embedding, prompts)
            rows = torch.arange(len(index), device=index.device)
            chosen = logits[rows, index][:, : hw[0], : hw[1]]
            losses.append(mask_loss(chosen, masks) + F.mse_loss(mine[rows, index], scores))
            if number + 1 < self.options.rounds:
                found = (chosen.detach() > MASK_THRESHOLD).cpu().numpy()
                prompts = _refine(prompts, found, masks.cpu().numpy(), rng)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _teach(self, target: Tensor, prompts: Prompts, hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's masks (P,h,w) bool inside the picture, their predicted IoUs (P,) and which they are (P,)."""
        logits, scores = self._ask(self.teacher, self.teacher_geometry, target, prompts)
        index = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        if prompts.ambiguous and logits.shape[1] > 1:
            first = self.teacher_geometry.first_candidate
            index = first + scores[:, first:].argmax(1)
        rows = torch.arange(len(index), device=index.device)
        return logits[rows, index][:, : hw[0], : hw[1]] > MASK_THRESHOLD, scores[rows, index], index

    @staticmethod
    def _ask(decoder: Any, geometry: Geometry, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        device, count = embedding.device, len(prompts.coords)
        scale = geometry.prompt_size / geometry.mask_size
        coords, labels = (torch.from_numpy(v).to(device) for v in (prompts.coords * np.float32(scale), prompts.labels))
        extra: tuple[Tensor, ...] = ()
        if geometry.mask_input:
            blank = torch.zeros(count, 1, geometry.mask_size, geometry.mask_size, device=device)
            extra = (blank, torch.zeros(count, device=device))
        logits, scores = decoder(embedding, coords, labels, *extra)
        return logits.float(), scores.float()


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus dice (EdgeSAM's loss) of logits (P,H,W) against masks (P,H,W) bool, mean over P."""
    wanted = masks.float()
    pixels = F.binary_cross_entropy_with_logits(logits, wanted)
    probability = logits.sigmoid()
    overlap = 2 * (probability * wanted).sum((1, 2))
    dice = 1 - (overlap + 1) / (probability.sum((1, 2)) + wanted.sum((1, 2)) + 1)
    return pixels + dice.mean()


def _box(mask: npt.NDArray[np.bool_], hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    """(2,2) corners of a mask's box, moved a little; of a random box where there is no mask."""
    if mask.any():
        box = tight_box(mask)
    else:
        ends = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * (hw[1], hw[0])
        box = ends.ravel().astype(np.float32)
    moved = box + rng.normal(0, BOX_JITTER, 4) * np.tile(box[2:] - box[:2], 2)
    limit = np.array([hw[1], hw[0], hw[1], hw[0]])
    return np.clip(moved, 0, limit).astype(np.float32).reshape(2, 2)


def _refine(
    prompts: Prompts, found: npt.NDArray[np.bool_], wanted: npt.NDArray[np.bool_], rng: np.random.Generator
) -> Prompts:
    """One click more for each prompt, before the others: anywhere that found and wanted (P,h,w) differ, labelled as
    wanted there. Where they agree, anywhere on the wanted mask, or anywhere."""
    clicks, labels = [], []
    for mine, theirs in zip(found, wanted, strict=True):
        places = np.argwhere(mine ^ theirs)
        if not len(places):
            places = np.argwhere(theirs)
        y, x = places[rng.integers(len(places))] if len(places) else (rng.integers(0, n) for n in theirs.shape)
        clicks.append((x + 0.5, y + 0.5))  # the middle of the pixel
        labels.append(LABEL_FOREGROUND if theirs[y, x] else LABEL_BACKGROUND)
    more = np.array(clicks, np.float32)[:, None]
    said = np.array(labels, np.float32)[:, None]
    return Prompts(np.concatenate([more, prompts.coords], axis=1), np.concatenate([said, prompts.labels], axis=1))
