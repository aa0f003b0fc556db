"""What is asked and what counts as the answer, on a model that answers what it is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the eval extra")

from edgesam_deploy.contract import Geometry, GraphContract, contracts
from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.protocol import agreement, answers, baselines, check_model, headline
from edgesam_deploy.measure.truths import Mask, Target
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Pixels

from ..made_up_datasets import rectangle

SIDE = 16
HW = (SIDE, SIDE)
SMALL = Geometry(image_size=SIDE, prompt_size=SIDE, embedding_size=4, embedding_channels=1, num_masks=4)


class Scripted:
    """A session that answers by a function, and keeps what it was fed."""

    def __init__(self, contract: GraphContract, answer: Callable[[Mapping[str, Any]], tuple[Any, ...]]) -> None:
        self.contract, self.answer = contract, answer
        self.fed: list[dict[str, Any]] = []

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def specs(self) -> GraphContract:
        return self.contract

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.fed.append(dict(feeds))
        return {spec.name: value for spec, value in zip(self.contract.outputs, self.answer(feeds), strict=True)}


def scripted(*calls: tuple[list[Mask], list[float]], geometry: Geometry = SMALL) -> tuple[Predictor, Scripted]:
    """A Predictor on an image of 16x16; its decoder gives, call by call, these masks and predicted IoUs to all."""
    left = list(calls)

    def answer(feeds: Mapping[str, Any]) -> tuple[Any, ...]:
        masks, scores = left.pop(0) if len(left) > 1 else left[0]
        count = len(feeds["point_coords"])
        logits = np.stack([np.where(m, 5.0, -5.0) for m in masks]).astype(np.float32)
        return np.stack([logits] * count), np.stack([np.array(scores, np.float32)] * count)

    graphs = contracts(geometry)
    decoder = Scripted(graphs["decoder"], answer)
    encoder = Scripted(graphs["encoder"], lambda feeds: (np.zeros((1, 1, 4, 4), np.float32),))
    predictor = Predictor(encoder, decoder, geometry, Pixels((124, 116, 104), (58, 57, 57)))
    predictor.set_image(np.zeros((*HW, 3), np.uint8))
    return predictor, decoder


def target(mask: Mask) -> Target:
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float64)
    return Target("1", mask, box, float(mask.sum()))


def square(left: int, top: int, right: int, bottom: int) -> Mask:
    return rectangle(left, top, right, bottom, HW)


TRUTH = square(4, 4, 12, 12)
MASKS = [square(4, 4, 12, 10), square(4, 4, 12, 11), square(0, 0, 3, 3), square(4, 4, 8, 12)]
SCORES = [0.5, 0.6, 0.9, 0.7]


def asked(predictor: Predictor, prompt: str, mask: Mask = TRUTH) -> dict[str, tuple[Mask, float | None]]:
    return {a.answer: (a.mask, a.predicted_iou) for a in answers(predictor, [target(mask)], prompt)}


def test_a_box_is_answered_by_mask_0_and_by_the_one_that_the_model_ranks_first() -> None:
    predictor, decoder = scripted((MASKS, SCORES))
    found = asked(predictor, "box")
    assert list(found) == ["single", "by predicted IoU"]
    assert np.array_equal(found["single"][0], MASKS[0])
    assert np.array_equal(found["by predicted IoU"][0], MASKS[2])
    assert [said for _, said in found.values()] == pytest.approx([0.5, 0.9])
    assert decoder.fed[0]["point_coords"].tolist() == [[[4, 4], [12, 12]]]
    assert decoder.fed[0]["point_labels"].tolist() == [[2, 3]]


@pytest.mark.parametrize(("rule", "index"), [("first", 0), ("best", 2), ("candidate", 2), ("stable", 0)])
def test_the_single_answer_follows_the_models_own_rule(rule: str, index: int) -> None:
    predictor, _ = scripted((MASKS, SCORES), geometry=replace(SMALL, single_mask=rule))
    assert np.array_equal(asked(predictor, "box")["single"][0], MASKS[index])
    box = target(TRUTH).box_xyxy
    assert np.array_equal(predictor.predict(box=box, multimask_output=False).masks[0], MASKS[index])


def test_a_click_is_answered_by_the_candidates() -> None:
    predictor, decoder = scripted((MASKS, SCORES))
    found = asked(predictor, "click")
    assert list(found) == ["best of 3", "by predicted IoU"]
    assert np.array_equal(found["best of 3"][0], MASKS[1]), "the closest to the truth of masks 1 to 3"
    assert np.array_equal(found["by predicted IoU"][0], MASKS[2])
    assert decoder.fed[0]["point_coords"][0].tolist() == [[7, 7], [0, 0]], "a click, and SAM's padding"
    assert decoder.fed[0]["point_labels"][0].tolist() == [1, -1]


def test_where_all_masks_are_candidates_all_are_looked_at() -> None:
    predictor, _ = scripted((MASKS[:3], SCORES[:3]), geometry=replace(SMALL, num_masks=3, single_mask="best"))
    assert list(asked(predictor, "click")) == ["best of 3", "by predicted IoU"]


CLICKED = (
    ([square(0, 0, 1, 1), square(4, 4, 12, 12) & ~square(8, 8, 12, 12), MASKS[2], MASKS[2]], [0.1, 0.8, 0.2, 0.3]),
    ([square(4, 4, 12, 15), MASKS[2], MASKS[2], MASKS[2]], [0.4, 0.9, 0.9, 0.9]),
    ([square(4, 4, 12, 11), MASKS[2], MASKS[2], MASKS[2]], [0.6, 0.9, 0.9, 0.9]),
    ([TRUTH, MASKS[2], MASKS[2], MASKS[2]], [0.7, 0.9, 0.9, 0.9]),
)


def test_later_clicks_go_where_the_answer_is_most_wrong() -> None:
    """Missed: foreground; added: background; the answer before goes in; right everywhere: no further click."""
    predictor, decoder = scripted(*CLICKED)
    found = asked(predictor, "clicks")
    assert [m.sum() for m, _ in found.values()] == [64 - 16, 56, 64], "after 1, 3 and 5 clicks"
    assert [said for _, said in found.values()] == pytest.approx([0.8, 0.6, 0.7])
    assert len(decoder.fed) == 4, "after the fourth answer nothing is wrong"
    assert decoder.fed[3]["point_coords"][0].tolist() == [[7, 7], [9, 9], [5, 13], [4, 11], [0, 0]]
    assert decoder.fed[3]["point_labels"][0].tolist() == [1, 1, 0, 1, -1]
    assert [float(f["has_mask_input"][0]) for f in decoder.fed] == [0, 1, 1, 1]
    assert np.array_equal(decoder.fed[1]["mask_input"][0, 0] > 0, CLICKED[0][0][1]), "the first answer's logits"
    assert np.array_equal(decoder.fed[2]["mask_input"][0, 0] > 0, CLICKED[1][0][0])


def test_targets_of_one_image_are_clicked_together_and_each_for_itself() -> None:
    other = square(2, 2, 14, 14)
    predictor, decoder = scripted(*CLICKED)
    found = list(answers(predictor, [target(TRUTH), target(other)], "clicks"))
    assert [a.answer for a in found] == [a for n in ("1 click", "3 clicks", "5 clicks") for a in (n, n)]
    assert [len(f["point_coords"]) for f in decoder.fed] == [2, 2, 2, 2, 1], "the first was found by the fourth click"
    labels = found[-1].prompts.point_labels
    assert labels is not None
    assert labels.shape == (1, 5)


def test_a_model_without_mask_input_is_clicked_without_it() -> None:
    predictor, decoder = scripted(*CLICKED, geometry=replace(SMALL, mask_input=False))
    assert list(asked(predictor, "clicks")) == ["1 click", "3 clicks", "5 clicks"]
    assert not any("mask_input" in feeds for feeds in decoder.fed)


@pytest.mark.parametrize(
    ("geometry", "prompt", "said"),
    [
        (replace(SMALL, max_points=4), "clicks", "at most 4 points of one prompt and 'clicks' has 5"),
        (replace(SMALL, max_points=1), "box", "at most 1 points"),
        (replace(SMALL, num_masks=1), "click", "one mask and no candidates"),
    ],
)
def test_what_a_model_cannot_do_is_refused(geometry: Geometry, prompt: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_model(geometry, ["box", prompt], "this model")


def test_baselines_by_hand() -> None:
    found = {a.answer: a for a in baselines([target(TRUTH)])}
    assert np.array_equal(found["filled box"].mask, TRUTH)
    assert found["inscribed ellipse"].mask.sum() == pytest.approx(math.pi / 4 * 64, abs=4)
    assert found["filled box"].predicted_iou is None
    fraction = replace(target(TRUTH), box_xyxy=np.array([3.6, 4.4, 11.4, 12.0]))
    assert np.array_equal(next(iter(baselines([fraction]))).mask, square(4, 4, 11, 12)), "pixels with their centre in"


def test_agreement_takes_the_teachers_answer_for_the_truth() -> None:
    student, _ = scripted((MASKS, SCORES))
    said = [0.2, 0.1, 0.3, 0.8]
    wanted = [square(4, 4, 12, 9), MASKS[3], MASKS[2], square(4, 4, 9, 12)]
    teacher, decoder = scripted((wanted, said))
    for prompt, index in (("box", 0), ("click", 3)):
        found = {a.answer: a for a in agreement(student, teacher, [target(TRUTH)], prompt)}
        assert all(np.array_equal(a.target.mask, wanted[index]) for a in found.values())
        assert found["same index"].target.area == wanted[index].sum()
        assert np.array_equal(found["same index"].mask, MASKS[index])
        assert np.array_equal(found["by predicted IoU"].mask, MASKS[2])
    assert decoder.fed[1]["point_coords"][0, 0].tolist() == [7, 7], "clicked in the true mask"
    other, _ = scripted((MASKS[:3], SCORES[:3]), geometry=replace(SMALL, num_masks=3, single_mask="best"))
    assert [a.answer for a in agreement(other, teacher, [target(TRUTH)], "box")] == ["by predicted IoU"]


def test_the_headline_of_every_prompt() -> None:
    assert [headline(p) for p in ("box", "click", "clicks")] == ["single", "by predicted IoU", "5 clicks"]
