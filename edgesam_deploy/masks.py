"""Low-resolution mask logits to masks of the original size, and mask IoU. Numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgesam_deploy.transforms import resized_hw

MASK_THRESHOLD = 0.0


def upscale_logits(
    low_res: npt.NDArray[np.floating], original_hw: tuple[int, int], image_size: int
) -> npt.NDArray[np.float32]:
    """(...,4E,4E) logits -> (...,H,W) float32 logits in the original frame.

    SAM's two steps (``Sam.postprocess_masks``): bilinear to the padded S×S square, crop the padding, bilinear to the
    original size; both without antialiasing (torch ``interpolate(..., align_corners=False)``). Each step is
    separable, so both are composed into one small matrix per axis: M_y · logits · M_xᵀ. Where the second step follows
    the crop, its border clamps to the cropped square, exactly as torch's does.
    """
    input_hw = resized_hw(original_hw, image_size)
    side_y, side_x = low_res.shape[-2:]
    rows = _axis_matrix(side_y, image_size, input_hw[0], original_hw[0])
    cols = _axis_matrix(side_x, image_size, input_hw[1], original_hw[1])
    upscaled: npt.NDArray[np.float32] = np.matmul(rows, np.matmul(low_res.astype(np.float32, copy=False), cols.T))
    return upscaled


def mask_iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two boolean masks of equal shape; 1.0 when both are empty."""
    if a.shape != b.shape:
        raise ValueError(f"masks differ in shape: {a.shape} and {b.shape}")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


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
