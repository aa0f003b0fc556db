"""Prompts: what cannot be meant is refused, what can is encoded as segment-anything encodes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgesam_deploy.errors import PromptError
from edgesam_deploy.prompts import check_prompts, encode_prompts

HW = (60, 90)  # 60 high, 90 wide
NAN, INF = float("nan"), float("inf")

# name -> (point_coords, point_labels, box), what the message must say
REFUSED: dict[str, tuple[tuple[Any, Any, Any], str]] = {
    "nan-point": (([[NAN, 5]], [1], None), "point_coords must be finite numbers, got [[nan, 5.]]"),
    "infinite-point": (([[5, INF]], [1], None), "point_coords must be finite numbers"),
    "nan-label": (([[5, 5]], [NAN], None), "point_labels must be finite numbers"),
    "nan-box": ((None, None, [1, 2, NAN, 4]), "box must be finite numbers"),
    "infinite-box": ((None, None, [1, 2, INF, 4]), "box must be finite numbers"),
    "point-left": (([[-0.5, 5]], [1], None), "point (-0.5, 5) lies outside the image, which is 90 pixels wide and 60"),
    "point-above": (([[5, -1]], [1], None), "point (5, -1) lies outside"),
    "point-right": (([[90.5, 5]], [1], None), "point (90.5, 5) lies outside"),
    "point-below": (([[5, 61]], [1], None), "point (5, 61) lies outside"),
    "point-y-x": (([[5, 80]], [1], None), "coordinates are (x, y) from the top left"),
    "one-of-several-outside": (([[5, 5], [95, 5]], [1, 1], None), "point (95, 5) lies outside"),
    "box-outside": ((None, None, [1, 1, 91, 50]), "box corner (91, 50) lies outside"),
    "one-of-several-boxes-outside": ((None, None, [[1, 1, 9, 9], [1, -3, 9, 9]]), "box corner (1, -3) lies outside"),
    "box-x1-below-x0": ((None, None, [50, 5, 10, 40]), "x0 < x1 and y0 < y1, got 50,5,10,40"),
    "box-y1-below-y0": ((None, None, [5, 40, 10, 5]), "x0 < x1 and y0 < y1, got 5,40,10,5"),
    "box-without-area": ((None, None, [5, 5, 5, 9]), "x0 < x1 and y0 < y1, got 5,5,5,9"),
    "box-as-x-y-w-h": ((None, None, [50, 30, 20, 10]), "a box is x0,y0,x1,y1"),
    "points-without-labels": (([[5, 5]], None, None), "give both or neither"),
    "labels-without-points": ((None, [1], None), "give both or neither"),
    "fewer-labels": (([[5, 5], [6, 6]], [1], None), "points of shape (2, 2) and labels of shape (1,)"),
    "more-labels": (([[5, 5]], [1, 0], None), "every point needs one label"),
    "labels-of-another-batch": (([[[5, 5]], [[6, 6]]], [[1]], None), "every point needs one label"),
    "label-2": (([[5, 5]], [2], None), "point_labels must be 1 (foreground) or 0 (background), got [2.]"),
    "label-padding": (([[5, 5]], [-1], None), "must be 1 (foreground) or 0 (background), got [-1.]"),
    "label-half": (([[5, 5]], [0.5], None), "must be 1 (foreground) or 0 (background), got [0.5]"),
    "point-without-list": (([5, 5], [1], None), "point_coords must have shape (N,2) or (B,N,2) with N > 0, got (2,)"),
    "point-of-3": (([[5, 5, 1]], [1], None), "got (1, 3)"),
    "point-scalar": ((5, [1], None), "point_coords must have shape"),
    "points-of-rank-4": ((np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 1)), None), "got (1, 1, 1, 2)"),
    "no-points": ((np.zeros((0, 2)), np.zeros(0), None), "with N > 0, got (0, 2)"),
    "box-of-3": ((None, None, [1, 2, 3]), "box must have shape (4,) or (B,4) as x0,y0,x1,y1, got (3,)"),
    "box-of-rank-3": ((None, None, [[[1, 2, 3, 4]]]), "got (1, 1, 4)"),
    "box-scalar": ((None, None, 7), "box must have shape"),
    "no-boxes": ((None, None, np.zeros((0, 4))), "got (0, 4)"),
    "ragged-points": (([[5, 5], [6]], [1, 1], None), "point_coords must be an array of numbers, got [[5, 5], [6]]"),
    "text": (([["here", "there"]], [1], None), "point_coords must be an array of numbers"),
    "nothing": (([[None, 5]], [1], None), "point_coords must be finite numbers"),
    "objects-on-many-lines": (
        (np.array([["a", "b"]] * 50, dtype=object), [1] * 50, None),
        "must be an array of numbers",
    ),
    "two-points-three-boxes": (
        ([[[5, 5]], [[6, 6]]], [[1], [1]], [[1, 1, 9, 9]] * 3),
        "got 2 prompts with points and 3 boxes",
    ),
    "one-prompt-two-boxes": (([[5, 5]], [1], [[1, 1, 9, 9]] * 2), "got 1 prompts with points and 2 boxes"),
}


@pytest.mark.parametrize(("prompt", "says"), REFUSED.values(), ids=REFUSED)
def test_a_prompt_that_cannot_be_meant_is_one_line(prompt: tuple[Any, Any, Any], says: str) -> None:
    with pytest.raises(PromptError) as caught:
        check_prompts(*prompt, HW)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_refusal_of_many_points_is_short() -> None:
    with pytest.raises(PromptError) as caught:
        check_prompts(np.full((500, 2), NAN), np.ones(500), None, HW)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("corner", [(0, 0), (90, 0), (0, 60), (90, 60), (89.99, 0.01)], ids=str)
def test_the_border_of_the_image_belongs_to_it(corner: tuple[float, float]) -> None:
    """Coordinates are continuous: a box around the whole image ends at (width, height)."""
    prompts = check_prompts([corner], [1], [0, 0, 90, 60], HW)
    assert prompts.count == 1


POINT, POINTS = [[30, 20]], [[30.5, 20.25], [1, 59], [90, 0]]
BOX = [10, 5, 80, 55]
# name -> (point_coords, point_labels, box): shapes as a caller may give them, with and without a prompt axis
GOOD: dict[str, tuple[Any, Any, Any]] = {
    "click": (POINT, [1], None),
    "background-click": (POINT, [0], None),
    "clicks": (POINTS, [1, 0, 1], None),
    "box": (None, None, BOX),
    "box-around-everything": (None, None, [0, 0, 90, 60]),
    "click-and-box": (POINT, [1], BOX),
    "clicks-and-box": (POINTS, [1, 0, 0], BOX),
    "two-prompts-of-clicks": ([POINTS, POINTS[::-1]], [[1, 0, 1], [0, 0, 1]], None),
    "three-boxes": (None, None, [BOX, [0, 0, 4, 4], [50, 50, 60, 60]]),
    "two-prompts-of-click-and-box": ([POINT, [[2, 3]]], [[1], [0]], [BOX, [0, 0, 4, 4]]),
    "integer-arrays": (np.array([[30, 20]]), np.array([True]), np.array(BOX, dtype=np.int16)),
}


@pytest.mark.parametrize("prompt_size", [512, 1024])
@pytest.mark.parametrize("hw", [HW, (60, 2000), (683, 90)], ids=str)
@pytest.mark.parametrize("prompt", GOOD.values(), ids=GOOD)
def test_a_prompt_is_encoded_as_segment_anything_encodes_it(
    prompt: tuple[Any, Any, Any], hw: tuple[int, int], prompt_size: int
) -> None:
    """Its ResizeLongestSide and PromptEncoder are asked; ours must give the same tokens, padding point and all."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from segment_anything.modeling import PromptEncoder
    from segment_anything.utils.transforms import ResizeLongestSide

    torch.manual_seed(0)
    encoder = PromptEncoder(
        embed_dim=32, image_embedding_size=(4, 4), input_image_size=(prompt_size, prompt_size), mask_in_chans=4
    )
    coords, labels, box = prompt
    resize = ResizeLongestSide(prompt_size)
    points = boxes = None
    if coords is not None:
        # SamPredictor.predict's own steps, with the prompt axis that predict_torch wants.
        mapped = resize.apply_coords(np.array(coords, dtype=np.float64), hw).reshape(-1, np.shape(coords)[-2], 2)
        points = (torch.tensor(mapped).float(), torch.tensor(np.array(labels)).reshape(mapped.shape[:2]).float())
    if box is not None:
        boxes = torch.tensor(resize.apply_boxes(np.array(box, dtype=np.float64), hw)).float()
    theirs, _ = encoder(points, boxes, None)

    ours_coords, ours_labels = encode_prompts(check_prompts(coords, labels, box, hw), hw, prompt_size)
    assert ours_coords.dtype == ours_labels.dtype == np.float32
    assert ours_coords.shape == (*theirs.shape[:2], 2)
    assert ours_labels.shape == theirs.shape[:2]
    torch.testing.assert_close(tokens(encoder, ours_coords, ours_labels), theirs, rtol=1e-4, atol=1e-4)


def tokens(encoder: Any, coords: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> Any:
    """What segment-anything makes of points by their labels: its box corners are points with the labels 2 and 3."""
    import torch

    label = torch.tensor(labels)
    embedded = encoder._embed_points(torch.tensor(coords), label, pad=False)
    for corner in (2, 3):
        embedded[label == corner] += encoder.point_embeddings[corner].weight
    return embedded


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ((POINT, [1], None), [[1, -1]]),
        ((POINTS, [1, 0, 1], None), [[1, 0, 1, -1]]),
        ((None, None, BOX), [[2, 3]]),
        ((POINT, [0], BOX), [[0, 2, 3]]),
        ((None, None, [BOX, BOX]), [[2, 3], [2, 3]]),
    ],
    ids=["click", "clicks", "box", "click-and-box", "boxes"],
)
def test_the_padding_point_comes_exactly_without_a_box(prompt: tuple[Any, Any, Any], labels: list[list[int]]) -> None:
    coords, encoded = encode_prompts(check_prompts(*prompt, HW), HW, 1024)
    np.testing.assert_array_equal(encoded, labels)
    np.testing.assert_array_equal(coords[encoded == -1], np.zeros((int((encoded == -1).sum()), 2)))


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ((POINTS, [1, 0, 1], None), [[1, 0, 1, -1]]),
        ((None, None, BOX), [[2, 3, -1]]),
        ((POINT, [0], BOX), [[0, 2, 3, -1]]),
    ],
    ids=["clicks", "box", "click-and-box"],
)
def test_sam_2s_padding_point_comes_with_a_box_too(prompt: tuple[Any, Any, Any], labels: list[list[int]]) -> None:
    coords, encoded = encode_prompts(check_prompts(*prompt, HW), HW, 1024, box_padding=True)
    np.testing.assert_array_equal(encoded, labels)
    np.testing.assert_array_equal(coords[0, -1], [0.0, 0.0])
    nothing, _ = encode_prompts(check_prompts(None, None, None, HW), HW, 1024, box_padding=True)
    assert nothing.shape == (1, 0, 2)


def test_without_points_and_boxes_there_are_no_tokens() -> None:
    """A mask input alone: segment-anything then has no sparse embedding."""
    coords, labels = encode_prompts(check_prompts(None, None, None, HW), HW, 1024)
    assert coords.shape == (1, 0, 2)
    assert labels.shape == (1, 0)


@pytest.mark.parametrize(
    ("prompt", "batched", "count"),
    [
        ((POINT, [1], None), False, 1),
        ((None, None, BOX), False, 1),
        (([POINT], [[1]], None), True, 1),
        ((None, None, [BOX]), True, 1),
        (([POINT], [[1]], BOX), True, 1),
        ((None, None, [BOX] * 3), True, 3),
    ],
    ids=["click", "box", "batch-of-a-click", "batch-of-a-box", "batch-of-a-click-and-one-box", "three-boxes"],
)
def test_who_gives_a_prompt_axis_gets_one(prompt: tuple[Any, Any, Any], batched: bool, count: int) -> None:
    prompts = check_prompts(*prompt, HW)
    assert (prompts.batched, prompts.count) == (batched, count)


def test_what_the_caller_gave_is_not_changed() -> None:
    coords, box = np.array(POINTS, dtype=np.float64), np.array(BOX, dtype=np.float64)
    prompts = check_prompts(coords, [1, 1, 1], box, HW)
    encode_prompts(prompts, HW, 1024)
    np.testing.assert_array_equal(coords, POINTS)
    np.testing.assert_array_equal(box, BOX)
