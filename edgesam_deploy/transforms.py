"""Resize, pad and coordinate maths between the three frames (numpy and Pillow only).

Frames: *original* (pixels of the user's image), *input* (pixels of the encoder's square input) and *model*
(pixels of prompt_size, in which point_coords are given). The rounding of the resized size is
segment-anything's ``ResizeLongestSide.get_preprocess_shape``; it is written here once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgesam_deploy.contract import LONGEST_SIDE, STRETCH


def resized_hw(original_hw: tuple[int, int], side: int, resize: str = LONGEST_SIDE) -> tuple[int, int]:
    """Height and width of the picture inside a square of ``side`` pixels; never below 1.

    resize: "stretch" fills the square; "longest_side" scales the longer side to it, as segment-anything does.
    segment-anything rounds half up with ``int(x + 0.5)``; a side that would vanish (an image over 1024 times
    as long as wide) is kept at 1 pixel, where segment-anything fails.
    """
    if resize == STRETCH:
        return side, side
    height, width = original_hw
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def to_encoder_input(
    image: npt.NDArray[np.uint8], image_size: int, padding: tuple[int, int, int], resize: str = LONGEST_SIDE
) -> npt.NDArray[np.uint8]:
    """image (H,W,3) uint8 RGB -> (1,3,S,S) uint8: longer side to S, padded right and below with ``padding``.

    resize: "stretch" scales both sides to S instead, and nothing is padded.

    Resized by Pillow's antialiased bilinear filter, as segment-anything does through torchvision. SAM pads with
    0 after normalisation; with the normalisation inside the graph the mean colour stands for it (models.graphs).
    """
    height, width = resized_hw((image.shape[0], image.shape[1]), image_size, resize)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    square = np.empty((image_size, image_size, 3), dtype=np.uint8)
    square[:] = padding
    square[:height, :width] = np.asarray(resized)
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None])


def coords_to_model(
    coords: npt.NDArray[np.floating], original_hw: tuple[int, int], prompt_size: int, resize: str = LONGEST_SIDE
) -> npt.NDArray[np.float32]:
    """(...,2) (x, y) in the original frame -> float32 in the model frame.

    x and y are scaled separately, by the *rounded* resized size, as in ``ResizeLongestSide.apply_coords``.
    """
    height, width = resized_hw(original_hw, prompt_size, resize)
    scale = np.array([width / original_hw[1], height / original_hw[0]], dtype=np.float64)
    return (np.asarray(coords, dtype=np.float64) * scale).astype(np.float32)
