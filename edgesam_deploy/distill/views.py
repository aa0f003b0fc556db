"""Training views for promptable segmentation: a random part of an image, prompts, and the masks they mean.

Regions come from the label maps of ``labelled.Source``. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgesam_deploy.contract import (
    LABEL_BACKGROUND,
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_FOREGROUND,
    LABEL_PADDING,
)
from edgesam_deploy.distill.labelled import MAX_LABEL, Source
from edgesam_deploy.errors import InputError
from edgesam_deploy.masks import tight_box

# Views of one image without a region large enough to learn, before another image is taken; and in all.
SAME_IMAGE, ATTEMPTS = 4, 400
# Masks below this many low-resolution pixels are sharpened, by the one of these factors that keeps their area.
SMALL, FACTORS = 100, 1.2 ** np.arange(18)
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a sample looks like; shares are probabilities.

    size: S, side of the square view in pixels; also the frame of point_coords. mask_size: side of the targets.
    prompts: P, prompts per view. padding: RGB colour outside the image.
    flat: share of views with every region in one colour, which teaches what a prompt means.
    paste: share of views that get objects of another source. fit: share of views that show the whole image at the
    top left, as the deployed model sees it. box: share of boxes among the two-token prompts. exact: share of boxes
    that fit, the others have their edges moved. small: the power of a region's area by which a box asks for it less
    often; with 0 all are equally often, and ellipses of all sizes. Clicks always ask for all equally often.
    """

    size: int
    mask_size: int
    prompts: int
    padding: tuple[int, int, int]
    flat: float
    paste: float
    fit: float
    box: float
    small: float = 0.0
    exact: float = 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    """image (S,S,3) uint8; point_coords (P,N,2) float32 in pixels of the view; point_labels (P,N) float32; masks
    (P,S,S) bool; targets (P,mask_size,mask_size) float32, the covered share of each low-resolution pixel, small masks
    sharpened."""

    image: UInt8
    point_coords: Float32
    point_labels: Float32
    masks: NDArray[np.bool_]
    targets: Float32


def draw(
    rng: np.random.Generator, source: Source, another: Callable[[], Source], settings: Settings, points: int
) -> Sample:
    """One random sample of ``source``; ``points`` is N, the tokens of each prompt: 2 means boxes and single clicks.

    another: gives a source at random, to paste objects of, and where this one shows nothing to learn. Raises InputError
    where none does.
    """
    for attempt in range(ATTEMPTS):
        image, labels = _view(rng, source if attempt < SAME_IMAGE else another(), settings)
        if rng.random() < settings.paste:
            _paste(rng, image, labels, another(), settings)
        if rng.random() < settings.flat:
            image = _paint(rng, image, labels)
        found, areas = np.unique(labels, return_counts=True)
        keep = (found > 0) & (areas >= (settings.size // settings.mask_size) ** 2)
        if keep.any():
            break
    else:
        raise InputError(
            f"{ATTEMPTS} views of the images show no region of a pixel of the low-resolution mask: give images with "
            "larger masks, or a larger --image-size"
        )
    boxes = int(rng.binomial(settings.prompts, settings.box if points == 2 else 0.5))
    chosen = _choose(rng, found[keep], areas[keep], settings.small, boxes)
    chosen += _choose(rng, found[keep], areas[keep], 0.0, settings.prompts - boxes)
    masks = {k: labels == k for k in set(chosen)}
    prompts = [_prompt(rng, masks[k], settings, points, number < boxes) for number, k in enumerate(chosen)]
    targets = {k: coverage(m, settings.mask_size) for k, m in masks.items()}
    return Sample(
        _change_colours(rng, image),
        np.stack([p[0] for p in prompts]),
        np.stack([p[1] for p in prompts]),
        np.stack([masks[k] for k in chosen]),
        np.stack([targets[k] for k in chosen]),
    )


def _choose(rng: np.random.Generator, found: UInt8, areas: NDArray[np.int64], small: float, count: int) -> list[int]:
    """``count`` labels of ``found``, whose areas in pixels are ``areas``."""
    if not small:  # every region about equally often, however large
        chosen: list[int] = np.resize(rng.permutation(found), count).tolist()
        return chosen
    weights = areas**-small
    drawn: list[int] = rng.choice(found, count, p=weights / weights.sum()).tolist()
    return drawn


def draw_shapes(rng: np.random.Generator, source: Source, settings: Settings) -> Sample:
    """A view with random boxes, the targets being the ellipses in them, whatever the image shows.

    What a box means is learned from these in minutes; from photographs alone it takes hours.
    """
    size, step = settings.size, settings.size // settings.mask_size
    image, _ = _view(rng, source, settings)
    # Even in their logarithm, or more of the small ones.
    share = rng.uniform(0, 1, (settings.prompts, 1)) ** (1 + 2 * settings.small)
    sides = 1.5 * step * (0.95 * size / (1.5 * step)) ** share
    sides = np.clip(sides * np.exp(rng.normal(0, 0.4, (settings.prompts, 2))), step, size)
    low = rng.uniform(0, 1, (settings.prompts, 2)) * (size - sides)
    # (P,2,S): squared distance from the middle along x and y, in half sides
    distance = (2 * (np.arange(size) + 0.5 - low[..., None]) / sides[..., None] - 1).astype(np.float32) ** 2
    masks = distance[:, 1, :, None] + distance[:, 0, None] <= 1
    targets = np.stack([coverage(mask, settings.mask_size) for mask in masks])
    corners = np.stack([low, low + sides], axis=1).astype(np.float32)
    labels = np.tile(np.array([LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT], np.float32), (settings.prompts, 1))
    return Sample(_change_colours(rng, image), corners, labels, masks, targets)


def _view(rng: np.random.Generator, source: Source, settings: Settings) -> tuple[UInt8, UInt8]:
    """A random window of a source and of one of its layers: image (S,S,3), labels (S,S); padding is label 0."""
    size, (width, height) = settings.size, source.image.size
    scale = np.full(2, size / max(width, height))
    fit = rng.random() < settings.fit
    if not fit:
        scale = scale * np.exp(rng.uniform(np.log(0.6), np.log(2.2))) * np.exp(rng.uniform(-0.12, 0.12, 2))
    box, paste, target = [0.0, 0.0, float(width), float(height)], [0, 0], [0, 0]
    for axis, length in enumerate((width, height)):
        scaled = max(1, round(length * scale[axis]))
        target[axis] = min(scaled, size)
        if scaled > size:
            box[axis] = rng.uniform(0, length - size / scale[axis])
            box[axis + 2] = min(box[axis] + size / scale[axis], float(length))
        elif not fit:
            paste[axis] = int(rng.integers(0, size - scaled + 1))
    window = (box[0], box[1], box[2], box[3])
    layer = source.layers[rng.integers(len(source.layers))] if source.layers else Image.new("L", source.image.size)
    region = np.s_[paste[1] : paste[1] + target[1], paste[0] : paste[0] + target[0]]
    image = np.empty((size, size, 3), np.uint8)
    image[:] = settings.padding
    image[region] = np.asarray(source.image.resize((target[0], target[1]), Image.Resampling.BILINEAR, box=window))
    labels = np.zeros((size, size), np.uint8)
    labels[region] = np.asarray(layer.resize((target[0], target[1]), Image.Resampling.NEAREST, box=window))
    if rng.random() < 0.5:
        return image[:, ::-1].copy(), labels[:, ::-1].copy()
    return image, labels


def _paste(rng: np.random.Generator, image: UInt8, labels: UInt8, source: Source, settings: Settings) -> None:
    """Copy up to three regions of another source over ``image`` and ``labels``, in place."""
    other, other_labels = _view(rng, source, settings)
    found, areas = np.unique(other_labels, return_counts=True)
    found = found[(found > 0) & (areas < settings.size**2 // 6)]
    free = np.setdiff1d(np.arange(1, MAX_LABEL + 1), labels)
    for label, new in zip(rng.permutation(found)[:3], free, strict=False):
        mask = other_labels == label
        image[mask] = other[mask]
        labels[mask] = new


def _paint(rng: np.random.Generator, image: UInt8, labels: UInt8) -> UInt8:
    """Paint every region in one colour, sometimes over a trace of the photograph.

    With few colours, different regions look the same and only the prompt tells them apart.
    """
    palette = rng.uniform(0, 255, (MAX_LABEL + 1, 3)).astype(np.float32)
    if rng.random() < 0.4:
        palette = palette[rng.integers(0, rng.integers(2, 7), MAX_LABEL + 1)]
    opacity = 1.0 if rng.random() < 0.4 else rng.uniform(0.4, 1.0)
    flat: Float32 = palette[labels] * np.float32(opacity) + image * np.float32(1 - opacity)
    if rng.random() < 0.5:
        flat += rng.normal(0, rng.uniform(1, 15), flat.shape).astype(np.float32)
    return _to_uint8(flat)


def _to_uint8(values: Float32) -> UInt8:
    clipped: UInt8 = np.clip(values, 0, 255).astype(np.uint8)
    return clipped


def _change_colours(rng: np.random.Generator, image: UInt8) -> UInt8:
    """Random brightness, contrast and channel mixing of the whole view, or nothing."""
    if rng.random() < 0.3:
        return image
    mix = np.eye(3) * rng.uniform(0.7, 1.3) + rng.normal(0, 0.08, (3, 3))
    if rng.random() < 0.1:
        mix = np.full((3, 3), 1 / 3)
    shifted = image.reshape(-1, 3).astype(np.float32) @ mix.astype(np.float32)
    shifted += rng.uniform(-25, 25, 3).astype(np.float32)
    return _to_uint8(shifted).reshape(image.shape)


def coverage(mask: NDArray[np.bool_], size: int) -> Float32:
    """Share of each low-resolution pixel that the mask (S,S) covers, (size,size) float32.

    A caller enlarges low-resolution masks and takes what is above a half. Of a mask of a few such pixels that leaves
    less than there was, of a smaller one nothing, so the shares of these are multiplied by what keeps the area.
    """
    step = mask.shape[0] // size
    covered: Float32 = mask.reshape(size, step, size, step).mean(axis=(1, 3), dtype=np.float32)
    area = float(covered.sum()) * step**2
    if not 0 < area < SMALL * step**2 or step == 1:
        return covered
    rows, columns = (np.flatnonzero(covered.any(axis=axis)) for axis in (1, 0))
    part = np.s_[max(rows[0] - 2, 0) : rows[-1] + 3, max(columns[0] - 2, 0) : columns[-1] + 3]
    near = covered[part]
    tried = [np.minimum(near * np.float32(factor), 1) for factor in FACTORS]
    wide = (near.shape[1] * step, near.shape[0] * step)
    areas = [
        np.count_nonzero(np.asarray(Image.fromarray(t).resize(wide, Image.Resampling.BILINEAR)) > 0.5) for t in tried
    ]
    covered[part] = tried[int(np.argmin(np.abs(np.array(areas) - area)))]
    return covered


def _prompt(
    rng: np.random.Generator, mask: NDArray[np.bool_], settings: Settings, points: int, boxed: bool
) -> tuple[Float32, Float32]:
    """point_coords (N,2) and point_labels (N,) float32 for one mask: a box, clicks, or a box and clicks."""
    box = tight_box(mask)
    if boxed:
        corners = (box if rng.random() < settings.exact else _jitter(rng, box, settings.size)).reshape(2, 2)
        tail = [(xy, label) for xy, label in zip(corners, (LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT), strict=True)]
    else:  # SAM adds one padding token to clicks, none to a box
        tail = [(np.zeros(2, np.float32), LABEL_PADDING)]
    clicks = [_click(rng, mask, box, foreground=i == 0 or rng.random() < 0.5) for i in range(points - len(tail))]
    coords, labels = zip(*clicks, *tail, strict=True)
    return np.array(coords, np.float32), np.array(labels, np.float32)


def _jitter(rng: np.random.Generator, box: Float32, size: int) -> Float32:
    """Each edge moved by some 8 % of the side, at most 4 % of the view."""
    noise = rng.normal(0, 0.08, 4) * np.tile(box[2:] - box[:2], 2)
    return np.clip(box + np.clip(noise, -0.04 * size, 0.04 * size), 0, size).astype(np.float32)


def _click(rng: np.random.Generator, mask: NDArray[np.bool_], box: Float32, foreground: bool) -> tuple[Float32, int]:
    """One click (x, y) and its label: on the mask (half of them near its middle), or beside it near its box."""
    x0, y0, x1, y1 = box.astype(int).tolist()
    if not foreground:
        margin = 4 + max(x1 - x0, y1 - y0) // 3
        x0, y0, x1, y1 = max(x0 - margin, 0), max(y0 - margin, 0), x1 + margin, y1 + margin
    ys, xs = np.nonzero(mask[y0:y1, x0:x1] == foreground)
    if len(ys) == 0:
        return _click(rng, mask, box, foreground=True)
    pixels = np.stack([xs + x0, ys + y0], axis=1)[rng.integers(len(ys), size=12)]
    if not foreground or rng.random() < 0.5:
        return pixels[0].astype(np.float32), LABEL_FOREGROUND if foreground else LABEL_BACKGROUND
    # The innermost of a few random pixels: the one with the most of the mask around it.
    reach = max(2, min(x1 - x0, y1 - y0) // 4)
    around = [mask[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1].sum() for x, y in pixels]
    return pixels[int(np.argmax(around))].astype(np.float32), LABEL_FOREGROUND
