"""What is asked, what counts as the answer, and the numbers: against hand-made masks and other people's code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the eval extra")
coco_mask = pytest.importorskip("pycocotools.mask", reason="needs the eval extra")

from edgesam_deploy.bundle import shipped_bundle
from edgesam_deploy.contract import Geometry, GraphContract, contracts
from edgesam_deploy.errors import EdgeSAMError, ImageError, InputError, MissingExtraError
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.boundaries import TOLERANCE, boundary, boundary_f, innermost, tolerance_px
from edgesam_deploy.measure.datasets import open_dataset
from edgesam_deploy.measure.evaluate import EvalOptions, ImageResult, MaskRecord, PackedMask, evaluate
from edgesam_deploy.measure.protocol import agreement, answers, baselines, check_model, headline
from edgesam_deploy.measure.quality import bootstrap, calibrate, mean, summarize
from edgesam_deploy.measure.truths import Mask, Target
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Pixels
from edgesam_deploy.stages.evaluate import BundleModel

from .. import made_up_datasets as made
from ..made_up_datasets import disc, rectangle

SIDE = 16
HW = (SIDE, SIDE)
SMALL = Geometry(image_size=SIDE, prompt_size=SIDE, embedding_size=4, embedding_channels=1, num_masks=4)


# Distances


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


# The protocol, on a model that answers what it is told


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


# Summaries


def record(iou: float, **others: Any) -> MaskRecord:
    fields = {
        "dataset": "d", "image": "i", "group": "g", "target": "1", "area": 10.0, "size": "small", "source": None,
        "against": "truth", "prompt": "box", "answer": "single", "predicted_iou": None, "boundary_f": iou,
    }  # fmt: skip
    return MaskRecord(iou=iou, **{**fields, **others})


def test_a_summary_by_hand() -> None:
    records = [
        record(0.2, group="a", source="x"),
        record(0.5, group="a", size="large", source="y"),
        record(0.95, group="b", size="large", source="y", predicted_iou=0.9),
        record(0.1, answer="other"),
        record(0.3, against="teacher"),
    ]
    first, other, teacher = summarize([records[4], *records[:4]], lambda name: False)
    assert (first.answer, other.answer, teacher.against) == ("single", "other", "teacher"), "the truth first"
    assert first.miou == pytest.approx(1.65 / 3)
    assert (first.count, first.groups) == (3, 2)
    assert {k: (s.miou, s.count) for k, s in first.by_size.items()} == {"small": (0.2, 1), "large": (0.725, 2)}
    assert {k: s.count for k, s in first.by_source.items()} == {"x": 1, "y": 2}
    assert first.above == pytest.approx({"0.5": 2 / 3, "0.75": 1 / 3, "0.9": 1 / 3})
    assert first.calibration is not None
    assert first.calibration.count == 1
    assert other.calibration is None
    (by_sequence,) = summarize(records[:3], lambda name: True)
    assert by_sequence.miou == pytest.approx((0.35 + 0.95) / 2)


def test_calibration_by_hand() -> None:
    predicted = np.array([0.05, 0.72, 0.78, 1.0, 1.2, -0.1])
    measured = np.array([0.10, 0.50, 0.70, 0.9, 1.0, 0.0])
    found = calibrate(predicted, measured)
    assert found is not None
    assert [b.count for b in found.bins] == [2, 0, 0, 0, 0, 0, 0, 2, 0, 2]
    assert found.bins[7].predicted == pytest.approx(0.75)
    assert found.bins[7].measured == pytest.approx(0.6)
    assert (found.bins[7].low, found.bins[7].high) == (0.7, 0.8)
    assert found.bins[1].predicted is None
    expected = 2 / 6 * abs(-0.025 - 0.05) + 2 / 6 * 0.15 + 2 / 6 * abs(1.1 - 0.95)
    assert found.error == pytest.approx(expected)
    assert (found.predicted, found.measured) == pytest.approx((predicted.mean(), measured.mean()))


@pytest.mark.parametrize("by_group", [False, True])
def test_the_interval_is_that_of_resampled_groups(by_group: bool) -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    values = rng.uniform(0, 1, len(groups)) * 0.2 + rng.uniform(0, 0.8, 40)[groups]
    low, high = bootstrap(values, groups, by_group)
    assert low < mean(values, groups, by_group) < high
    means = []
    for _ in range(2000):  # the same by hand, with other numbers
        drawn = rng.integers(40, size=40)
        parts = [values[groups == g] for g in drawn]
        means.append(np.mean([p.mean() for p in parts]) if by_group else np.concatenate(parts).mean())
    assert (low, high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))), abs=0.015)
    assert bootstrap(values, groups, by_group) == (low, high), "seeded"
    assert bootstrap(np.array([0.5, 0.7]), np.zeros(2, np.int64), by_group) == pytest.approx((0.6, 0.6))


def test_the_headline_of_every_prompt() -> None:
    assert [headline(p) for p in ("box", "click", "clicks")] == ["single", "by predicted IoU", "5 clicks"]


# Whole evaluations of the shipped bundle


MODEL = BundleModel(shipped_bundle())


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"coco:{made.coco(tmp_path_factory.mktemp('coco'))}"


@pytest.fixture(scope="module")
def results(coco: str) -> list[ImageResult]:
    options = EvalOptions(("box", "click", "clicks"), baselines=True, threads=1)
    return list(evaluate(MODEL.open, [open_dataset(coco)], options, MODEL.open))


def test_ious_are_pycocotools(coco: str, results: list[ImageResult]) -> None:
    """Every box's two answers, through the public Predictor."""
    expected = []
    with MODEL.bundle.open(threads=1) as predictor:
        for image in open_dataset(coco).images:
            predictor.set_image(read_image(image.path))
            for target in image.targets(made.HW):
                single, others = (predictor.predict(box=target.box_xyxy, multimask_output=m) for m in (False, True))
                masks = np.concatenate([single.masks, others.masks])
                best = np.concatenate([single.iou_predictions, others.iou_predictions]).argmax()
                encoded = [
                    coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))
                    for m in (masks[0], masks[best], target.mask)
                ]
                expected += coco_mask.iou(encoded[:2], encoded[2:], [0])[:, 0].tolist()
    records = [r for result in results for r in result.records if r.against == "truth" and r.prompt == "box"]
    found = [r.iou for r in records if r.answer in ("single", "by predicted IoU")]
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(found) == 6
    assert 0 < min(found) < max(found) < 1


def test_records_say_what_they_are_of(results: list[ImageResult]) -> None:
    assert [r.image for r in results] == ["images/1.jpg", "images/2.jpg"]
    first = results[0].records[0]
    assert (first.dataset.split(":")[0], first.group, first.target, first.source) == ("coco", "1", "11", "polygons")
    assert first.size == "medium"
    kinds = {(r.against, r.prompt, r.answer) for r in results[0].records}
    assert len(kinds) == 2 + 2 + 3 + 2 + 4
    agreed = [r for r in results[0].records if r.against == "teacher"]
    assert {r.iou for r in agreed if r.answer == "same index"} == {1.0}, "it is its own teacher"
    worst = results[0].worst
    assert worst is not None
    boxes = [r.iou for r in results[0].records if (r.against, r.prompt, r.answer) == ("truth", "box", "single")]
    assert worst.record.iou == min(boxes)


def test_as_many_processes_as_one_likes_give_the_same(coco: str, results: list[ImageResult]) -> None:
    options = EvalOptions(("box", "click", "clicks"), baselines=True, workers=2, threads=2)
    found = list(evaluate(MODEL.open, [open_dataset(coco)], options, MODEL.open))
    assert [r.records for r in found] == [r.records for r in results]
    assert [(r.image, r.path, r.hw) for r in found] == [(r.image, r.path, r.hw) for r in results]
    pairs = [(a.worst, b.worst) for a, b in zip(found, results, strict=True)]
    assert all(a and b and (a.record, a.truth, a.answer) == (b.record, b.truth, b.answer) for a, b in pairs)


def test_what_goes_wrong_in_a_process_is_raised_here(tmp_path: Path) -> None:
    folder = made.masks(tmp_path)
    (folder / "b.jpg").write_bytes(b"no photograph")
    with pytest.raises(ImageError, match=r"b\.jpg is not a readable image"):
        list(evaluate(MODEL.open, [open_dataset(f"masks:{folder}")], EvalOptions(("box",), workers=2)))


@contextmanager
def without_backend(threads: int | None) -> Iterator[Predictor]:
    raise MissingExtraError("openvino", "openvino", "run something else")
    yield


def test_an_error_survives_the_way_between_processes() -> None:
    import pickle

    with pytest.raises(MissingExtraError) as raised, without_backend(1):
        pass
    sent = pickle.loads(pickle.dumps(raised.value))
    assert str(sent) == str(raised.value)
    assert (sent.module, sent.extra) == ("openvino", "openvino")


def test_datasets_of_one_name_are_refused(coco: str) -> None:
    with pytest.raises(InputError, match="two datasets are called coco:"):
        list(evaluate(MODEL.open, [open_dataset(coco)] * 2, EvalOptions()))


@pytest.mark.parametrize("prompts", [(), ("box", "box"), ("scribble",)])
def test_prompts_are_some_of_three(prompts: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="prompts must be some of box, click, clicks, each once"):
        EvalOptions(prompts)


def test_a_packed_mask_is_the_mask() -> None:
    mask = blobs(3, (31, 45))
    assert np.array_equal(PackedMask.pack(mask).unpack(), mask)


def test_a_process_that_dies_is_told_of(tmp_path: Path) -> None:
    dataset = open_dataset(f"masks:{made.masks(tmp_path)}")
    with pytest.raises(EdgeSAMError, match="a worker process ended before its work was done"):
        list(evaluate(die, [dataset], EvalOptions(("box",), workers=2)))


def die(threads: int | None) -> Any:
    import os

    os._exit(9)
