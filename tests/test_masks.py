"""Mask upscaling against PyTorch, mask IoU and COCO's encoding against pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgesam_deploy.contract import STRETCH
from edgesam_deploy.masks import decode_segmentation, mask_iou, rle_counts, stability_scores, upscale_logits
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


def rough(hw: tuple[int, int], grain: int, share: float, seed: int = 0) -> npt.NDArray[np.bool_]:
    """A random mask of squares with sides of ``grain`` pixels."""
    coarse = np.random.default_rng(seed).random((-(-hw[0] // grain), -(-hw[1] // grain))) < share
    return coarse.repeat(grain, 0).repeat(grain, 1)[: hw[0], : hw[1]]


def encoded(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    coco = pytest.importorskip("pycocotools.mask", reason="needs the dev extra")
    return dict(coco.encode(np.asfortranarray(mask.astype(np.uint8))))


@pytest.mark.parametrize("hw", [(1, 1), (1, 900), (37, 1), (61, 45), (480, 640), (1500, 2250)], ids=str)
@pytest.mark.parametrize(("grain", "share"), [(1, 0.5), (1, 0.02), (16, 0.5), (1000, 0.5), (1, 0.0), (1, 1.0)])
def test_runs_of_compressed_rle_are_pycocotools(hw: tuple[int, int], grain: int, share: float) -> None:
    """Those of the mask, counted, and what pycocotools compresses to the same string."""
    coco = pytest.importorskip("pycocotools.mask", reason="needs the dev extra")
    mask = rough(hw, grain, share)
    compressed = encoded(mask)
    runs = rle_counts(compressed["counts"])
    flat = np.concatenate([[False], mask.ravel(order="F")])  # the first run is of background, if of no pixel
    edges = np.flatnonzero(np.diff(flat))
    np.testing.assert_array_equal(runs, np.diff([0, *edges, mask.size]))
    counted = {"size": [*hw], "counts": runs.tolist()}
    assert coco.frPyObjects(counted, *hw)["counts"] == compressed["counts"]
    text = {"size": [*hw], "counts": compressed["counts"].decode()}
    for segmentation in (compressed, text, counted):
        np.testing.assert_array_equal(decode_segmentation(segmentation, *hw), mask)


def test_runs_need_not_be_written_as_pycocotools_does() -> None:
    """Runs of no pixel, by hand: 2, 0, 3 and 1, whose difference to the 0 two before is 1."""
    np.testing.assert_array_equal(rle_counts("2031"), [2, 0, 3, 1])
    decoded = decode_segmentation({"size": [2, 3], "counts": "2031"}, 2, 3)
    np.testing.assert_array_equal(decoded.ravel(order="F"), [False] * 5 + [True])


@pytest.mark.parametrize("grain", [1, 8])
def test_a_cut_rle_is_refused_wherever_it_is_cut(grain: int) -> None:
    whole = encoded(rough((60, 50), grain, 0.4))["counts"]
    runs = rle_counts(whole).tolist()
    for size, cuts in (
        ([60, 50], [whole[:end] for end in range(len(whole))] + [runs[:end] for end in range(len(runs))]),
        ([60, 51], [whole, runs]),
        ([59, 50], [whole, runs]),
    ):
        for counts in cuts:
            with pytest.raises(ValueError, match=r"RLE (that is cut|with runs)"):
                decode_segmentation({"size": size, "counts": counts}, 60, 50)


# What pycocotools reads as something else, crashes on, or refuses with exceptions of many kinds -> what is said.
UNREADABLE: dict[str, tuple[Any, str]] = {
    "runs of few pixels": ({"size": [40, 40], "counts": [0, 3]}, "RLE with runs of 3 pixels for 1600 of its size"),
    "runs below zero": ({"size": [40, 40], "counts": [1603, -3]}, "not whole numbers from 0 on"),
    "broken runs": ({"size": [40, 40], "counts": [0.0, 1600.0]}, "not whole numbers from 0 on"),
    "words": ({"size": [40, 40], "counts": ["1600"]}, "not whole numbers from 0 on"),
    "a sum that wraps": ({"size": [40, 40], "counts": [2**62] * 4 + [1600]}, f"RLE with runs of {2**64 + 1600} pixels"),
    "past 64 bits": ({"size": [40, 40], "counts": [2**70]}, "not whole numbers from 0 on"),
    "a difference below zero": ({"size": [2, 3], "counts": "6110I"}, "not whole numbers from 0 on"),
    "no characters": ({"size": [40, 40], "counts": ""}, "compressed RLE that is cut"),
    "other characters": ({"size": [40, 40], "counts": "m8 i0"}, "has characters other than"),
    "beyond ASCII": ({"size": [40, 40], "counts": "m8é0"}, "has characters other than"),
    "a long number": ({"size": [40, 40], "counts": "o" * 12 + "0"}, "a number of 13 characters, expected 7 at most"),
    "size below zero": ({"size": [-40, -40], "counts": [0, 1600]}, "pycocotools cannot read it"),
    "one number as size": ({"size": [1600], "counts": [0, 1600]}, "expected height and width as the size of an RLE"),
    "no polygon": ([], "no polygon of at least 3 points"),
    "an empty polygon": ([[]], "no polygon of at least 3 points"),
    "a point": ([[1, 2]], "no polygon of at least 3 points"),
    "a box": ([[1, 2, 30, 4]], "no polygon of at least 3 points"),
    "an odd number": ([[1, 2, 30, 4, 5, 20, 7]], "a polygon that is not x1, y1, x2, y2"),
    "pairs": ([[[1, 2], [30, 4], [5, 20], [1, 9], [2, 8], [3, 7]]], "a polygon that is not x1, y1, x2, y2"),
    "nan": ([[1, 2, 30, float("nan"), 5, 20]], "coordinates that are not finite, or beyond 100000 pixels"),
    "null": ([[1, 2, 30, None, 5, 20]], "coordinates that are not finite"),
    "far away": ([[1, 2, 30, 4, 5, 20], [1, 2, -1e9, 4, 5, 20]], "coordinates that are not finite, or beyond"),
}  # fmt: skip


@pytest.mark.parametrize(("segmentation", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_mask_is_refused_in_one_line(segmentation: Any, said: str) -> None:
    pytest.importorskip("pycocotools.mask", reason="needs the dev extra")
    with pytest.raises(ValueError, match=said) as raised:
        decode_segmentation(segmentation, 40, 40)
    assert "\n" not in str(raised.value)
