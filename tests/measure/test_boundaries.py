"""Clicks deep in masks and DAVIS's boundary F, against other people's rules and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the eval extra")

from edgesam_deploy.measure.boundaries import TOLERANCE, boundary, boundary_f, innermost, tolerance_px
from edgesam_deploy.measure.truths import Mask

from ..made_up_datasets import disc, rectangle


def blobs(seed: int, hw: tuple[int, int] = (30, 40)) -> Mask:
    rng = np.random.default_rng(seed)
    found = np.zeros(hw, np.bool_)
    for _ in range(4):
        found |= disc(int(rng.integers(hw[1])), int(rng.integers(hw[0])), float(rng.uniform(2, 9)), hw)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_click_is_the_pixel_with_the_largest_distance_to_what_is_outside(seed: int) -> None:
    mask = blobs(seed)
    padded = np.pad(mask, 1)
    outside = np.argwhere(~padded)
    inside = np.argwhere(padded)  # in row order
    distances = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(axis=2)).min(axis=1)
    y, x = inside[distances.argmax()] - 1
    click = innermost(mask)
    assert (click.x, click.y) == (x, y)
    assert click.distance == pytest.approx(distances.max())


def test_ties_the_edge_of_the_image_and_pixels_clicked_before() -> None:
    full = np.ones((5, 9), np.bool_)
    assert (innermost(full).x, innermost(full).y, innermost(full).distance) == (2, 2, 3.0), "first in row order"
    assert (innermost(full, [(2, 2)]).x, innermost(full, [(2, 2), (3, 2)]).x) == (3, 4)
    assert innermost(rectangle(4, 3, 5, 4)) == innermost(rectangle(4, 3, 5, 4), [(9, 9)])
    assert innermost(rectangle(4, 3, 5, 4), [(4, 3)]).distance == 0.0
    assert innermost(np.zeros((4, 4), np.bool_)).distance == 0.0


def davis_f(answer: Mask, truth: Mask) -> float:
    """As davis-2016's ``db_eval_boundary``: boundaries dilated by a disc."""

    def outline(mask: Mask) -> Mask:
        right, below, both = (np.zeros_like(mask) for _ in range(3))
        right[:, :-1], below[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        found = (mask ^ right) | (mask ^ below) | (mask ^ both)
        found[-1], found[:, -1] = mask[-1] ^ right[-1], mask[:, -1] ^ below[:, -1]
        found[-1, -1] = False
        return found

    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    near = range(-radius, radius + 1)

    def dilated(mask: Mask) -> Mask:
        padded = np.pad(mask, radius)
        shifts = [(dy, dx) for dy in near for dx in near if dy**2 + dx**2 <= radius**2]
        return np.any(
            [
                padded[radius + dy : radius + dy + mask.shape[0], radius + dx : radius + dx + mask.shape[1]]
                for dy, dx in shifts
            ],
            axis=0,
        )

    a, b = outline(answer), outline(truth)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision, recall = (a & dilated(b)).sum() / a.sum(), (b & dilated(a)).sum() / b.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_boundary_f_is_daviss(seed: int) -> None:
    truth = blobs(seed, (120, 160)) | rectangle(30, 0, 90, 50, (120, 160))
    answer = np.roll(truth, seed, axis=1) | blobs(seed + 100, (120, 160))
    got = boundary_f(boundary(answer), boundary(truth))
    assert got == pytest.approx(davis_f(answer, truth), abs=1e-12)
    assert 0 < got < 1


def test_boundary_f_by_hand() -> None:
    square, shifted = rectangle(20, 20, 40, 40, (60, 80)), rectangle(21, 20, 41, 40, (60, 80))
    assert tolerance_px((60, 80)) == 1
    assert boundary_f(boundary(square), boundary(shifted)) == 1.0
    far = rectangle(60, 2, 70, 12, (60, 80))
    assert boundary_f(boundary(square), boundary(far)) == 0.0
    nothing, all_of_it = np.zeros((60, 80), np.bool_), np.ones((60, 80), np.bool_)
    assert boundary_f(boundary(nothing), boundary(all_of_it)) == 1.0, "neither has a boundary"
    assert boundary_f(boundary(square), boundary(nothing)) == boundary_f(boundary(nothing), boundary(square)) == 0.0
