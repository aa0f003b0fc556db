"""Mask upscaling against PyTorch, mask IoU against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest

from edgesam_deploy.contract import STRETCH
from edgesam_deploy.masks import mask_iou, stability_scores, upscale_logits
from edgesam_deploy.transforms import resized_hw

SIZES = [(1, 900), (480, 640), (1500, 2250), (427, 640), (512, 512), (100, 37), (128, 128)]


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize(("side", "image_size"), [(128, 512), (32, 128), (256, 512)])
def test_upscaling_is_segment_anythings(hw: tuple[int, int], side: int, image_size: int) -> None:
    """``Sam.postprocess_masks``: two bilinear steps, by torch in float64 (in float32 its coordinates round)."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    logits = np.random.default_rng(0).normal(size=(2, side, side)).astype(np.float32) * 10
    height, width = resized_hw(hw, image_size)
    square = torch.nn.functional.interpolate(
        torch.from_numpy(logits).double()[None], (image_size, image_size), mode="bilinear", align_corners=False
    )
    expected = torch.nn.functional.interpolate(square[..., :height, :width], hw, mode="bilinear", align_corners=False)[
        0
    ].numpy()
    got = upscale_logits(logits, hw, image_size)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_a_stretched_image_takes_one_step(hw: tuple[int, int]) -> None:
    """``SAM2Transforms.postprocess_masks``, by torch in float64."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    logits = np.random.default_rng(0).normal(size=(1, 2, 64, 64)).astype(np.float32) * 10
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits).double(), hw, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(upscale_logits(logits, hw, 1024, STRETCH), expected.numpy(), atol=2e-4)


def test_stability_is_the_share_of_pixels_sure_to_be_inside() -> None:
    """By hand: 2 pixels above +0.05, 2 more above -0.05; and a mask with none."""
    logits = np.array([[[1.0, 0.06], [0.04, -0.04]], [[-1.0, -1.0], [-1.0, -0.06]]], dtype=np.float32)
    np.testing.assert_array_equal(stability_scores(logits), [0.5, 1.0])


def test_mask_iou_is_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="needs the dev extra")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 40, 60)) < rng.random((2, 1, 1))
        encoded = [coco.encode(np.asfortranarray(m.astype(np.uint8))) for m in (a, b)]
        expected = coco.iou(encoded[:1], encoded[1:], [0])[0, 0]
        assert mask_iou(a, b) == pytest.approx(expected, abs=1e-12)


def test_empty_masks() -> None:
    empty, full = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    assert mask_iou(empty, empty) == 1.0
    assert mask_iou(empty, full) == 0.0
    with pytest.raises(ValueError, match="differ in shape"):
        mask_iou(empty, np.zeros((4, 5), dtype=bool))
