"""Prompts as people give them -> the decoder's point_coords and point_labels. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesam_deploy.contract import (
    LABEL_BACKGROUND,
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_FOREGROUND,
    LABEL_PADDING,
    LONGEST_SIDE,
)
from edgesam_deploy.errors import PromptError
from edgesam_deploy.transforms import coords_to_model


@dataclass(frozen=True, slots=True)
class Prompts:
    """Checked prompts of one image, B at a time, in the original frame.

    point_coords: (B,N,2) float64 or None; point_labels: (B,N) of 0 and 1, None with it; boxes: (B,4) float64 xyxy
    or None. batched: whether the caller gave a leading prompt axis, and so expects one back.
    """

    point_coords: npt.NDArray[np.float64] | None
    point_labels: npt.NDArray[np.float64] | None
    boxes: npt.NDArray[np.float64] | None
    batched: bool

    @property
    def count(self) -> int:
        """B, the number of prompts; 1 where there are neither points nor boxes."""
        given = self.point_coords if self.point_coords is not None else self.boxes
        return 1 if given is None else given.shape[0]


def check_prompts(
    point_coords: npt.ArrayLike | None,
    point_labels: npt.ArrayLike | None,
    box: npt.ArrayLike | None,
    original_hw: tuple[int, int],
) -> Prompts:
    """Validate prompts in the original frame.

    point_coords: (N,2) or (B,N,2) (x, y); point_labels: (N,) or (B,N), 1 foreground, 0 background;
    box: (4,) or (B,4) xyxy. Raises PromptError for anything not finite, outside the image, of unequal lengths, or a box
    whose corners are swapped; nothing is repaired.
    """
    if (point_coords is None) != (point_labels is None):
        raise PromptError("point_coords and point_labels go together: give both or neither")
    coords = labels = boxes = None
    batched = False
    if point_coords is not None:
        coords = _numbers("point_coords", point_coords)
        labels = _numbers("point_labels", point_labels)
        batched = coords.ndim == 3
        coords, labels = _check_points(coords, labels, original_hw)
    if box is not None:
        boxes = _numbers("box", box)
        batched = batched or boxes.ndim == 2
        boxes = _check_boxes(boxes, original_hw)
    if coords is not None and boxes is not None and coords.shape[0] != boxes.shape[0]:
        raise PromptError(
            f"points and boxes of one call must be for the same prompts: got {coords.shape[0]} prompts with points "
            f"and {boxes.shape[0]} boxes"
        )
    return Prompts(coords, labels, boxes, batched)


def encode_prompts(
    prompts: Prompts,
    original_hw: tuple[int, int],
    prompt_size: int,
    resize: str = LONGEST_SIDE,
    box_padding: bool = False,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Prompts -> point_coords (B,N,2) float32 in the model frame and point_labels (B,N) float32.

    A box becomes two corner points with labels 2 and 3. SAM's prompt encoder adds one padding point (0, 0) with
    label -1 exactly when there are points and no box; SAM 2's also where there is a box (``box_padding``). With neither
    (a mask input alone) N is 0.
    """
    coords: list[npt.NDArray[np.float32]] = []
    labels: list[npt.NDArray[np.float32]] = []
    batch = prompts.count
    if prompts.point_coords is not None and prompts.point_labels is not None:
        coords.append(coords_to_model(prompts.point_coords, original_hw, prompt_size, resize))
        labels.append(prompts.point_labels.astype(np.float32))
    if prompts.boxes is not None:
        coords.append(coords_to_model(prompts.boxes.reshape(batch, 2, 2), original_hw, prompt_size, resize))
        corners = np.array([LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT], dtype=np.float32)
        labels.append(np.tile(corners, (batch, 1)))
    if not coords:
        return np.zeros((batch, 0, 2), dtype=np.float32), np.zeros((batch, 0), dtype=np.float32)
    if prompts.boxes is None or box_padding:
        coords.append(np.zeros((batch, 1, 2), dtype=np.float32))
        labels.append(np.full((batch, 1), LABEL_PADDING, dtype=np.float32))
    return np.concatenate(coords, axis=1), np.concatenate(labels, axis=1)


def _numbers(name: str, value: object) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{name} must be an array of numbers, got {' '.join(repr(value).split())}") from error
    if not np.isfinite(array).all():
        raise PromptError(f"{name} must be finite numbers, got {_short(array)}")
    return array


def _check_points(
    coords: npt.NDArray[np.float64], labels: npt.NDArray[np.float64], original_hw: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if coords.ndim not in (2, 3) or coords.shape[-1] != 2 or coords.size == 0:
        raise PromptError(f"point_coords must have shape (N,2) or (B,N,2) with N > 0, got {coords.shape}")
    if labels.shape != coords.shape[:-1]:
        raise PromptError(
            f"every point needs one label: got points of shape {coords.shape} and labels of shape {labels.shape}"
        )
    if not np.isin(labels, (LABEL_BACKGROUND, LABEL_FOREGROUND)).all():
        raise PromptError(f"point_labels must be 1 (foreground) or 0 (background), got {_short(labels)}")
    _check_inside("point", coords, original_hw)
    if coords.ndim == 2:
        return coords[None], labels[None]
    return coords, labels


def _check_boxes(boxes: npt.NDArray[np.float64], original_hw: tuple[int, int]) -> npt.NDArray[np.float64]:
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4 or boxes.size == 0:
        raise PromptError(f"box must have shape (4,) or (B,4) as x0,y0,x1,y1, got {boxes.shape}")
    boxes = boxes.reshape(-1, 4)
    for x0, y0, x1, y1 in boxes:
        if not (x0 < x1 and y0 < y1):
            raise PromptError(f"a box is x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {x0:g},{y0:g},{x1:g},{y1:g}")
    _check_inside("box corner", boxes.reshape(-1, 2, 2), original_hw)
    return boxes


def _check_inside(what: str, coords: npt.NDArray[np.float64], original_hw: tuple[int, int]) -> None:
    height, width = original_hw
    flat = coords.reshape(-1, 2)
    outside = (flat < 0).any(axis=1) | (flat > (width, height)).any(axis=1)
    if outside.any():
        x, y = flat[outside][0]
        raise PromptError(
            f"{what} ({x:g}, {y:g}) lies outside the image, which is {width} pixels wide and {height} high; "
            "coordinates are (x, y) from the top left"
        )


def _short(array: npt.NDArray[np.float64]) -> str:
    text = np.array2string(array, precision=4, threshold=8, separator=", ")
    return " ".join(text.split())
