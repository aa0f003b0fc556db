"""Distances inside masks: where a person would click, and how well two outlines agree. The only home of scipy.

The boundary measure F is DAVIS's (Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation", CVPR 2016): precision and recall of boundary pixels that have one of the other boundary within 0.008 of
the image's diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import MissingExtraError
from edgesam_deploy.masks import tight_box

Mask = npt.NDArray[np.bool_]
TOLERANCE = 0.008


@dataclass(frozen=True, slots=True)
class Click:
    """x, y: a pixel. distance: of its centre to that of the nearest pixel outside, 0 where the mask is empty."""

    x: int
    y: int
    distance: float


@dataclass(frozen=True, slots=True)
class Boundary:
    """Of a mask (H,W). pixels: the boundary. near: all pixels within the tolerance of it."""

    pixels: Mask
    near: Mask


def innermost(mask: Mask, clicked: Sequence[tuple[int, int]] = ()) -> Click:
    """The pixel of a mask (H,W) farthest from its border, the first in row order; the image's edge is a border.

    clicked: (x, y) of pixels that are not to be clicked again.
    """
    if not mask.any():
        return Click(0, 0, 0.0)
    left, top, right, bottom = tight_box(mask).astype(int).tolist()
    distances = _distances(np.pad(mask[top:bottom, left:right], 1))[1:-1, 1:-1]
    for x, y in clicked:
        if left <= x < right and top <= y < bottom:
            distances[y - top, x - left] = 0.0
    y, x = divmod(int(distances.argmax()), right - left)
    return Click(left + x, top + y, float(distances[y, x]))


def boundary(mask: Mask) -> Boundary:
    """The boundary as DAVIS's ``seg2bmap`` draws it: pixels that differ from the next to the right, below, or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    pixels = (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])
    near = np.zeros_like(mask)
    if pixels.any():
        reach = tolerance_px(mask.shape)
        left, top, right, bottom = tight_box(pixels).astype(int).tolist()
        part = np.s_[max(top - reach, 0) : bottom + reach, max(left - reach, 0) : right + reach]
        near[part] = _distances(~pixels[part]) <= reach
    return Boundary(pixels, near)


def boundary_f(answer: Boundary, truth: Boundary) -> float:
    """F in 0..1; 1 where neither has a boundary, 0 where one has none."""
    found, wanted = (int(np.count_nonzero(b.pixels)) for b in (answer, truth))
    if not found or not wanted:
        return float(found == wanted)
    precision = np.count_nonzero(answer.pixels & truth.near) / found
    recall = np.count_nonzero(truth.pixels & answer.near) / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def tolerance_px(hw: Sequence[int]) -> int:
    return math.ceil(TOLERANCE * math.hypot(hw[0], hw[1]))


def _distances(mask: Mask) -> npt.NDArray[np.float64]:
    """(H,W): how far each pixel of the mask is from the nearest one outside it."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise MissingExtraError("scipy", "eval") from error
    distances: npt.NDArray[np.float64] = distance_transform_edt(mask)
    return distances
