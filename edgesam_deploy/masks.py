"""Low-resolution mask logits to masks of the original size, mask IoU, boxes of masks, and COCO's way to write a mask.

Numpy only, but that COCO's encoding is read by pycocotools (the extra ``eval``).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.contract import LONGEST_SIDE, STRETCH
from edgesam_deploy.errors import MissingExtraError
from edgesam_deploy.transforms import resized_hw

MASK_THRESHOLD = 0.0
# Of SAM 2's image predictor (sam2/build_sam.py, dynamic_multimask_stability_delta).
STABILITY_DELTA = 0.05


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
    """COCO polygons or RLE to a mask (H,W). pycocotools' own ``COCO`` class prints to stdout, which is for results."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise MissingExtraError("pycocotools", "eval") from error

    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():
        # Of numpy 2 about how pycocotools hands over its memory.
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded: npt.NDArray[np.bool_] = coco_mask.decode(segmentation) > 0
    return decoded


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
