"""Pictures for people: mask, prompts and score drawn on the image. Numpy and Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from edgesam_deploy.errors import OutputError
from edgesam_deploy.files import write_bytes
from edgesam_deploy.prompts import Prompts

MASK_RGB = (30, 144, 255)
FOREGROUND_RGB = (0, 200, 80)
BACKGROUND_RGB = (230, 50, 50)
BOX_RGB = (255, 200, 0)
TRUTH_RGB = (255, 40, 220)
_OPACITY = 0.5


def draw(
    image: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], prompts: Prompts, scores: npt.NDArray[np.float32]
) -> Image.Image:
    """image (H,W,3) RGB with masks (B,H,W) tinted and outlined, prompts in the original frame, and scores (B,)."""
    return draw_captioned(image, masks, prompts, "predicted IoU " + ", ".join(f"{s:.2f}" for s in scores))


def draw_captioned(
    image: npt.NDArray[np.uint8],
    masks: npt.NDArray[np.bool_],
    prompts: Prompts,
    caption: str,
    truth: npt.NDArray[np.bool_] | None = None,
) -> Image.Image:
    """As ``draw`` with any caption; truth: a mask (H,W) of which the outline alone is drawn."""
    canvas = image.astype(np.float32)
    for mask in masks:
        canvas[mask] = canvas[mask] * (1 - _OPACITY) + np.array(MASK_RGB) * _OPACITY
        canvas[_outline(mask)] = (255, 255, 255)
    if truth is not None:
        canvas[_outline(truth)] = TRUTH_RGB
    picture = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    unit = max(1.0, max(image.shape[:2]) / 200)
    for x0, y0, x1, y1 in prompts.boxes if prompts.boxes is not None else ():
        pen.rectangle((x0, y0, x1, y1), outline=BOX_RGB, width=round(unit))
    if prompts.point_coords is not None and prompts.point_labels is not None:
        coords, labels = prompts.point_coords.reshape(-1, 2), prompts.point_labels.ravel()
        for (x, y), label in zip(coords, labels, strict=True):
            colour = FOREGROUND_RGB if label else BACKGROUND_RGB
            r = 2 * unit
            pen.ellipse(
                (x - r, y - r, x + r, y + r), fill=colour, outline=(255, 255, 255), width=max(1, round(unit / 2))
            )
    _caption(pen, caption, unit)
    return picture


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file's suffix means. Raises OutputError for an unknown suffix."""
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats:
        raise OutputError(f"cannot tell the picture format of {path}: give a name that ends in .png or .jpg")
    return formats[path.suffix.lower()]


def write_picture(picture: Image.Image, path: Path) -> None:
    """Encode by the file's suffix and write it whole or not at all. Raises OutputError for an unknown suffix."""
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format=picture_format(path))
    except (OSError, KeyError, ValueError) as error:
        raise OutputError(f"cannot encode {path}: {error}; give a name that ends in .png or .jpg") from error
    write_bytes(path, buffer.getvalue())


def _outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mask pixels with a neighbour (up, down, left, right) outside the mask."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _caption(pen: ImageDraw.ImageDraw, text: str, unit: float) -> None:
    font = ImageFont.load_default(size=max(10.0, 5 * unit))
    left, top, right, bottom = pen.textbbox((2 * unit, 2 * unit), text, font=font)
    pen.rectangle((left - unit, top - unit, right + unit, bottom + unit), fill=(0, 0, 0))
    pen.text((2 * unit, 2 * unit), text, fill=(255, 255, 255), font=font)
