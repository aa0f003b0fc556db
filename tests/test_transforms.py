"""Resize and coordinate maths against segment-anything's own."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgesam_deploy.contract import STRETCH
from edgesam_deploy.transforms import coords_to_model, resized_hw, to_encoder_input

SIZES = [(1, 900), (900, 1), (480, 640), (1500, 2250), (853, 1280), (427, 640), (512, 512), (333, 500), (7, 7)]


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("side", [512, 1024])
def test_resized_size_and_coordinates_are_those_of_segment_anything(hw: tuple[int, int], side: int) -> None:
    transforms = pytest.importorskip("segment_anything.utils.transforms", reason="needs the export extra")
    theirs = transforms.ResizeLongestSide(side)
    assert resized_hw(hw, side) == theirs.get_preprocess_shape(*hw, side)
    coords = np.random.default_rng(0).random((5, 2)) * (hw[1], hw[0])
    np.testing.assert_allclose(coords_to_model(coords, hw, side), theirs.apply_coords(coords, hw), rtol=1e-6)


def test_the_known_rounding_case() -> None:
    """1500x2250 gives 683 rows with segment-anything's rounding, where truncation gives 682."""
    assert resized_hw((1500, 2250), 1024) == (683, 1024)


def test_a_side_never_vanishes() -> None:
    assert resized_hw((1, 5000), 512) == (1, 512)


def test_encoder_input_is_resized_and_padded_right_and_below() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    square = to_encoder_input(image, 128, (124, 116, 104))
    assert square.shape == (1, 3, 128, 128)
    assert square.dtype == np.uint8
    expected = np.asarray(Image.fromarray(image).resize((128, 85), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(square[0].transpose(1, 2, 0)[:85], expected)
    np.testing.assert_array_equal(square[0, :, 85:].reshape(3, -1).T, np.tile((124, 116, 104), (43 * 128, 1)))


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_a_stretched_image_fills_the_square(hw: tuple[int, int]) -> None:
    image = np.full((*hw, 3), 200, dtype=np.uint8)
    square = to_encoder_input(image, 64, (0, 0, 0), STRETCH)
    assert square.shape == (1, 3, 64, 64)
    assert (square == 200).all(), "nothing is padded"
    corner = coords_to_model(np.array([[hw[1], hw[0]]], dtype=float), hw, 1024, STRETCH)
    np.testing.assert_allclose(corner, [[1024, 1024]])
