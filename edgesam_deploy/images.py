"""Image files to RGB arrays: every mode a photograph comes in, or one clear error."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from edgesam_deploy.errors import ImageError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image(path: Path, content: bytes | None = None) -> npt.NDArray[np.uint8]:
    """Read a file as (H,W,3) uint8 RGB with its EXIF rotation applied. content: what is in it, if that is at hand.

    Grey, palette, RGBA (alpha dropped), CMYK and 16-bit grey (its upper 8 bits) are converted. Raises ImageError
    for a file that is missing, truncated, not an image, empty, or larger than Pillow's decompression limit.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about damaged metadata, dropped transparency, and from 89 M pixels on (it refuses at twice
            # that); pixels it cannot read are an error.
            warnings.simplefilter("ignore")
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{path} is not a readable image: {error}") from error
    except OSError as error:
        raise ImageError(f"cannot read the image {path}: {error.strerror or error}") from error


def list_images(folder: Path) -> list[Path]:
    """Image files directly in ``folder``, sorted by name. ImageError if there is none."""
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder of images")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ImageError(f"{folder} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    return paths


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I"):  # "I;16" and its byte orders, or "I" where an older Pillow widens it
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise ValueError("expected 8- or 16-bit pixels, got 32-bit integers; convert it to 8-bit first")
        grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("expected 8- or 16-bit pixels, got floating point; convert it to 8-bit first")
    return np.array(image.convert("RGB"))
