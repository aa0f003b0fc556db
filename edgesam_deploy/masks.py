"""Low-resolution mask logits to masks of the original size, mask IoU, boxes of masks, and COCO's way to write a mask.

Numpy only, but that COCO's encoding is read by pycocotools (the extra ``eval``).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.contract import LONGEST_SIDE, STRETCH
from edgesam_deploy.errors import MissingExtraError
from edgesam_deploy.transforms import resized_hw

MASK_THRESHOLD = 0.0
# Of SAM 2's image predictor (sam2/build_sam.py, dynamic_multimask_stability_delta).
STABILITY_DELTA = 0.05
# Characters of a number in COCO's compressed RLE: pycocotools' runs have 32 bits, its differences one more.
MAX_RLE_DIGITS = 7
# Pixels. Of a polygon's coordinates, many times the side of any image.
MAX_COORDINATE = 1e5


def upscale_logits(
    low_res: npt.NDArray[np.floating], original_hw: tuple[int, int], side: int, resize: str = LONGEST_SIDE
) -> npt.NDArray[np.float32]:
    """(...,4E,4E) logits -> (...,H,W) float32 logits in the original frame.

    side: of the square in the model frame (prompt_size). resize: "stretch" has no padding and goes there in one
    bilinear step (``SAM2Transforms.postprocess_masks``).
    SAM's two steps (``Sam.postprocess_masks``): bilinear to the padded square, crop the padding, bilinear to the
    original size; both without antialiasing (torch ``interpolate(..., align_corners=False)``). Each step is
    separable, so both are composed into one small matrix per axis: M_y · logits · M_xᵀ. Where the second step follows
    the crop, its border clamps to the cropped square, exactly as torch's does.
    """
    low_y, low_x = low_res.shape[-2:]
    if resize == STRETCH:
        rows = _interpolate_rows(np.eye(low_y), original_hw[0]).astype(np.float32)
        cols = _interpolate_rows(np.eye(low_x), original_hw[1]).astype(np.float32)
    else:
        input_hw = resized_hw(original_hw, side)
        rows = _axis_matrix(low_y, side, input_hw[0], original_hw[0])
        cols = _axis_matrix(low_x, side, input_hw[1], original_hw[1])
    upscaled: npt.NDArray[np.float32] = np.matmul(rows, np.matmul(low_res.astype(np.float32, copy=False), cols.T))
    return upscaled


def stability_scores(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(B,h,w) logits -> (B,): IoU of the masks cut a little above and a little below the threshold; 1 where empty.

    ``MaskDecoder._get_stability_scores`` of SAM 2.
    """
    flat = logits.reshape(len(logits), -1)
    inner, outer = (np.count_nonzero(flat > MASK_THRESHOLD + d, axis=1) for d in (STABILITY_DELTA, -STABILITY_DELTA))
    return np.where(outer > 0, inner / np.maximum(outer, 1), 1.0)


def mask_iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two boolean masks of equal shape; 1.0 when both are empty."""
    if a.shape != b.shape:
        raise ValueError(f"masks differ in shape: {a.shape} and {b.shape}")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


def tight_box(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Tight box xyxy float32 of a mask (H,W) that is not empty, in pixel edges: one pixel's box is one pixel wide."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)


def decode_segmentation(segmentation: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """COCO polygons or RLE to a mask (H,W): of height and width, or of the size that the RLE states.

    pycocotools' own ``COCO`` class prints to stdout, which is for results. Raises ValueError for what it cannot read,
    and for what it would read wrongly or crash on; KeyError and TypeError for what is neither polygons nor RLE.
    """
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise MissingExtraError("pycocotools", "eval") from error

    if isinstance(segmentation, list):
        _check_polygons(segmentation)
    else:
        _check_runs(segmentation["counts"], segmentation["size"])
    with warnings.catch_warnings():
        # Of numpy 2 about how pycocotools hands over its memory.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            if isinstance(segmentation, list):
                segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                segmentation = coco_mask.frPyObjects(segmentation, height, width)
            decoded: npt.NDArray[np.bool_] = coco_mask.decode(segmentation) > 0
        except Exception as error:  # it raises a bare Exception, too
            raise ValueError(f"pycocotools cannot read it: {error}") from error
    return decoded


def rle_counts(compressed: str | bytes) -> npt.NDArray[np.int64]:
    """(n,) pixels of the runs of COCO's compressed RLE, column by column, the first of background.

    pycocotools' ``rleFrString``: a number has 5 bits in each character from "0" on, lowest first; bit 5 says that more
    follow, bit 4 of the last one is the sign. From the fourth on it is the difference to the run two before.
    Raises ValueError for characters that no number has, and a number that is cut or too large.
    """
    data = np.frombuffer(compressed.encode() if isinstance(compressed, str) else compressed, np.uint8)
    digits = data.astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits & 32 == 0)
    if not len(ends) or ends[-1] + 1 < len(digits) or digits.min() < 0 or digits.max() > 63:
        raise ValueError("compressed RLE that is cut, or has characters other than '0' to 'o'")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends + 1 - starts
    if lengths.max() > MAX_RLE_DIGITS:
        raise ValueError(
            f"compressed RLE with a number of {lengths.max()} characters, expected {MAX_RLE_DIGITS} at most"
        )
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    numbers: npt.NDArray[np.int64] = np.add.reduceat((digits & 31) << shifts, starts)
    numbers -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def _check_polygons(polygons: list[Any]) -> None:
    """Of coordinates that are not finite or far away pycocotools makes so many pixels that the process crashes."""
    if not polygons or len(polygons[0]) < 6:
        raise ValueError("no polygon of at least 3 points")
    for polygon in polygons:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or len(points) % 2:
            raise ValueError("a polygon that is not x1, y1, x2, y2, … in one list")
        if not (np.abs(points) <= MAX_COORDINATE).all():
            raise ValueError(f"a polygon with coordinates that are not finite, or beyond {MAX_COORDINATE:.0f} pixels")


def _check_runs(counts: list[int] | str | bytes, size: Sequence[int]) -> None:
    """Pixels that the runs of a cut RLE leave out would have pycocotools' uninitialized memory, or be background."""
    if len(size) != 2:
        raise ValueError(f"expected height and width as the size of an RLE, got {size}")
    runs = np.asarray(counts) if isinstance(counts, list) else rle_counts(counts)
    pixels = size[0] * size[1]
    if runs.dtype.kind != "i" or (runs < 0).any():
        raise ValueError("RLE with runs that are not whole numbers from 0 on")
    # The sum of larger ones could wrap around.
    if (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(f"RLE with runs of {sum(runs.tolist())} pixels for {pixels} of its size {size[1]}x{size[0]}")


def _axis_matrix(low: int, square: int, cropped: int, original: int) -> npt.NDArray[np.float32]:
    to_square = _interpolate_rows(np.eye(low), square)
    return _interpolate_rows(to_square[:cropped], original).astype(np.float32)


def _interpolate_rows(matrix: npt.NDArray[np.float64], target: int) -> npt.NDArray[np.float64]:
    """(n, k) -> (target, k) by 1-D linear interpolation between rows, half-pixel centres, clamped at the borders."""
    count = matrix.shape[0]
    position = np.maximum((np.arange(target) + 0.5) * count / target - 0.5, 0.0)
    left = np.minimum(position.astype(np.int64), count - 1)
    right = np.minimum(left + 1, count - 1)
    weight = (position - left)[:, None]
    blended: npt.NDArray[np.float64] = matrix[left] * (1.0 - weight) + matrix[right] * weight
    return blended
