"""Which part of the embedding a prompt's mask is decoded in while it is learnt.

The decoder's cost grows with the cells it sees, and a small object needs few of them: a quarter of the side holds a
sixteenth. Positions stay those of the whole image, so that what is learnt holds for the whole embedding, which the last
stage of a curriculum should decode. A single click is always decoded in the whole: how large its object is, is what it
does not say and the decoder must find out, and a window would tell.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edgesam_deploy.contract import LABEL_FOREGROUND, LABEL_PADDING, MASK_UPSCALE
from edgesam_deploy.distill.views import Sample

# Sides of windows in eighths of the embedding's, and the cells that one has at least.
EIGHTHS, SMALLEST = (2, 3, 4, 6, 8), 8
# In windows of this many cells at most a mask is learnt as a caller enlarges it: of a few low-resolution pixels, the
# larger ones show its shape well enough.
FINE = 8
# How often the smallest window that fits is taken, and not the next: always would tell an object's size.
TIGHT = 0.75


def draw_windows(rng: np.random.Generator, sample: Sample, cells: int) -> NDArray[np.int64]:
    """(P,3) int64: side, row and column, in cells of the embedding, of one window for each prompt of ``sample``; it
    holds the prompt's points and its mask; the whole for a single click. cells: E, the side of the embedding."""
    sides = [side for side in (cells * part // 8 for part in EIGHTHS) if side >= min(SMALLEST, cells)]
    windows = np.zeros((len(sample.targets), 3), np.int64)
    for row, (coords, labels, target) in enumerate(
        zip(sample.point_coords, sample.point_labels, sample.targets, strict=True)
    ):
        given = labels[labels != LABEL_PADDING]
        if len(given) == 1 and given[0] == LABEL_FOREGROUND:
            windows[row] = cells, 0, 0
            continue
        low, high = _extent(coords[labels != LABEL_PADDING], sample.image.shape[0], target, cells)
        fitting = [side for side in sides if side >= (high - low).max()]
        side = fitting[0] if rng.random() < TIGHT else fitting[:2][-1]
        first, last = np.maximum(high - side, 0), np.minimum(low, cells - side)
        windows[row] = side, *rng.integers(first, last + 1)
    return windows


def _extent(
    points: NDArray[np.float32], size: int, target: NDArray[np.float32], cells: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, column) of the first cell with a point or a part of the mask, and of the cell after the last."""
    rows, columns = np.nonzero(target)
    pixels = np.stack([rows, columns], axis=1) // MASK_UPSCALE
    inside = np.clip(points[:, ::-1] * (cells / size), 0, cells - 1).astype(np.int64)
    found = np.concatenate([pixels, inside])
    return found.min(0), found.max(0) + 1


def cut_embeddings(embeddings: Tensor, image: Tensor, windows: Tensor) -> Tensor:
    """embeddings (I,C,E,E), number of the image (n,) and windows (n,3) of one side w -> (n,C,w,w)."""
    count, channels, cells, _ = embeddings.shape
    side = int(windows[0, 0])
    if side == cells:
        return embeddings[image] if count > 1 else embeddings.expand(len(image), -1, -1, -1)
    step = torch.arange(side, device=windows.device)
    rows, columns = windows[:, 1, None, None] + step[:, None], windows[:, 2, None, None] + step
    index = (image[:, None, None] * cells + rows) * cells + columns
    # A look-up in a table, whose gradient is quicker than that of slices.
    table = embeddings.permute(0, 2, 3, 1).reshape(count * cells * cells, channels)
    return F.embedding(index, table).permute(0, 3, 1, 2)


def cut_masks(masks: Tensor, windows: Tensor, cells: int) -> Tensor:
    """masks (n,H,H) of E cells a side and windows (n,3) of one side w -> (n,h,h), h = w * H / E."""
    per_cell = masks.shape[-1] // cells
    length = int(windows[0, 0]) * per_cell
    if length == masks.shape[-1]:
        return masks
    step = torch.arange(length, device=masks.device)
    numbers = torch.arange(len(masks), device=masks.device)[:, None, None]
    rows, columns = (windows[:, axis, None] * per_cell + step for axis in (1, 2))
    return masks[numbers, rows[:, :, None], columns[:, None]]
