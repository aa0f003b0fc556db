"""What is asked about one true mask, and which of the model's masks is the answer.

    box      the true box: "single", mask 0 where the model has one (its own rule elsewhere,
             ``Predictor.single_index``), and "by predicted IoU", of all masks the one that the model ranks first
             (NanoSAM's rule, nanosam/tools/eval_coco.py)
    click    a foreground click at the pixel farthest from the border: "best of 3", the candidate closest to the truth
             (an oracle's choice), and "by predicted IoU", the candidate that the model ranks first
    clicks   that click, and four more: each at the pixel farthest from the border of the larger error, missed parts
             foreground and others background (RITM's rule: Sofiiuk et al., ICIP 2022). The first answer is the
             candidate by predicted IoU, later ones the single mask; the answer before goes in as mask_input where the
             model takes one. "1 click", "3 clicks", "5 clicks"

With a teacher, its answer to the same box (its single mask) or click (its candidate by predicted IoU) takes the place
of the true mask, and the model's mask of the same index, and the one that it ranks first itself, are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgesam_deploy.contract import LABEL_BACKGROUND, LABEL_FOREGROUND, Geometry
from edgesam_deploy.errors import InputError
from edgesam_deploy.masks import MASK_THRESHOLD, mask_iou
from edgesam_deploy.measure.boundaries import innermost
from edgesam_deploy.measure.truths import Mask, Target
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import Prompts, check_prompts

BOX, CLICK, CLICKS = PROMPTS = ("box", "click", "clicks")
SINGLE, BY_PREDICTED, SAME_INDEX = "single", "by predicted IoU", "same index"
FILLED_BOX, ELLIPSE = BASELINES = ("filled box", "inscribed ellipse")
ROUNDS = (1, 3, 5)
# Prompts in one call of the decoder: what engines take by default (``compile --max-prompts``).
CHUNK = 16

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
Points = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One mask (H,W) that is compared with its target. prompts: what was asked, of this target alone.

    predicted_iou: the model's own estimate; None for what no model said.
    """

    target: Target
    prompt: str
    answer: str
    mask: Mask
    predicted_iou: float | None
    prompts: Prompts


def headline(prompt: str) -> str:
    """The answer that stands for a prompt where one number is asked for: what an application would get."""
    return {BOX: SINGLE, CLICK: BY_PREDICTED, CLICKS: _round(ROUNDS[-1])}[prompt]


def check_model(geometry: Geometry, prompts: Sequence[str], model: str) -> None:
    """Raise InputError for a prompt that the model cannot take, or whose answers it does not give."""
    most = {BOX: 2, CLICK: 1, CLICKS: ROUNDS[-1]}
    candidates = geometry.num_masks - geometry.first_candidate
    for prompt in prompts:
        if geometry.max_points is not None and geometry.max_points < most[prompt]:
            raise InputError(
                f"{model} takes at most {geometry.max_points} points of one prompt and '{prompt}' has {most[prompt]}: "
                "leave it out of --prompts"
            )
        if prompt != BOX and candidates < 1:
            raise InputError(f"{model} gives one mask and no candidates, which '{prompt}' chooses from: ask box alone")


def answers(predictor: Predictor, targets: Sequence[Target], prompt: str) -> Iterator[Answer]:
    """The model's answers on the current image, target by target; at most ``CHUNK`` targets."""
    return {BOX: _box, CLICK: _click, CLICKS: _clicks}[prompt](predictor, targets)


def baselines(targets: Sequence[Target]) -> Iterator[Answer]:
    """What a program without a model would answer to the true boxes."""
    for target in targets:
        for name in BASELINES:
            mask = fill(target.box_xyxy, _hw(target), ellipse=name == ELLIPSE)
            yield Answer(target, BOX, name, mask, None, _boxes([target]))


def agreement(predictor: Predictor, teacher: Predictor, targets: Sequence[Target], prompt: str) -> Iterator[Answer]:
    """The model's answers with the teacher's in place of the true masks; their areas are in pixels."""
    asked = _boxes(targets) if prompt == BOX else _centre_clicks(targets)
    wanted, teacher_scores = teacher.decode(asked)
    low_res, scores = predictor.decode(asked)
    index = _ranked(teacher, teacher_scores) if prompt == CLICK else teacher.single_index(wanted, teacher_scores)
    own = _ranked(predictor, scores) if prompt == CLICK else scores.argmax(axis=1)
    chosen = {SAME_INDEX: index, BY_PREDICTED: own} if _same_masks(predictor, teacher) else {BY_PREDICTED: own}
    for i, target in enumerate(targets):
        truth = _upscale(teacher, wanted[i, index[i]], target)
        learnt = replace(target, mask=truth, area=float(np.count_nonzero(truth)))
        for name, which in chosen.items():
            mask = _upscale(predictor, low_res[i, which[i]], target)
            yield Answer(learnt, prompt, name, mask, float(scores[i, which[i]]), _one(asked, i))


def fill(box_xyxy: npt.NDArray[np.floating], hw: tuple[int, ...], ellipse: bool) -> Mask:
    """The pixels of an image (H,W) whose centres are in a box, or in the ellipse in it."""
    x0, y0, x1, y1 = box_xyxy.tolist()
    # Distances of the pixel centres from the middle of the box, in half sides.
    y = np.abs((2 * np.arange(hw[0]) + 1 - y0 - y1) / (y1 - y0))[:, None]
    x = np.abs((2 * np.arange(hw[1]) + 1 - x0 - x1) / (x1 - x0))[None]
    filled: Mask = y**2 + x**2 <= 1 if ellipse else np.maximum(y, x) <= 1
    return filled


def _box(predictor: Predictor, targets: Sequence[Target]) -> Iterator[Answer]:
    asked = _boxes(targets)
    low_res, scores = predictor.decode(asked)
    chosen = {SINGLE: predictor.single_index(low_res, scores), BY_PREDICTED: scores.argmax(axis=1)}
    for i, target in enumerate(targets):
        # Upscaling is what takes the time: often both rules choose the same mask.
        masks = {k: _upscale(predictor, low_res[i, k], target) for k in {int(index[i]) for index in chosen.values()}}
        for name, index in chosen.items():
            yield Answer(target, BOX, name, masks[int(index[i])], float(scores[i, index[i]]), _one(asked, i))


def _click(predictor: Predictor, targets: Sequence[Target]) -> Iterator[Answer]:
    asked = _centre_clicks(targets)
    low_res, scores = predictor.decode(asked)
    first, ranked = predictor.geometry.first_candidate, _ranked(predictor, scores)
    for i, target in enumerate(targets):
        masks = [_upscale(predictor, logits, target) for logits in low_res[i, first:]]
        best = int(np.argmax([mask_iou(mask, target.mask) for mask in masks]))
        for name, index in ((f"best of {len(masks)}", best), (BY_PREDICTED, int(ranked[i]) - first)):
            yield Answer(target, CLICK, name, masks[index], float(scores[i, first + index]), _one(asked, i))


def _clicks(predictor: Predictor, targets: Sequence[Target]) -> Iterator[Answer]:
    """All targets are clicked together; one that the model has found to the pixel is left as it is."""
    count, hw = len(targets), _hw(targets[0])
    points: list[Points] = [[] for _ in targets]
    labels: list[list[int]] = [[] for _ in targets]
    masks = [np.zeros(hw, dtype=np.bool_) for _ in targets]
    side = predictor.geometry.mask_size
    low_res, scores = np.zeros((count, 1, side, side), np.float32), np.zeros(count, np.float32)
    for number in range(1, ROUNDS[-1] + 1):
        active = [i for i in range(count) if _add_click(targets[i].mask, masks[i], points[i], labels[i])]
        if active:
            asked = check_prompts([points[i] for i in active], [labels[i] for i in active], None, hw)
            before = low_res[active] if number > 1 and predictor.geometry.mask_input else None
            found, said = predictor.decode(asked, before)
            index = _ranked(predictor, said) if number == 1 else predictor.single_index(found, said)
            for row, i in enumerate(active):
                low_res[i, 0], scores[i] = found[row, index[row]], said[row, index[row]]
                masks[i] = _upscale(predictor, low_res[i, 0], targets[i])
        if number in ROUNDS:
            for i, target in enumerate(targets):
                asked = check_prompts([points[i]], [labels[i]], None, hw)
                yield Answer(target, CLICKS, _round(number), masks[i], float(scores[i]), asked)


def _add_click(truth: Mask, answer: Mask, points: Points, labels: list[int]) -> bool:
    """Put the next click behind the others; False where the answer is right everywhere but where it was clicked."""
    missed, wrong = innermost(truth & ~answer, points), innermost(answer & ~truth, points)
    label = LABEL_FOREGROUND if missed.distance > wrong.distance else LABEL_BACKGROUND
    click = missed if label == LABEL_FOREGROUND else wrong
    if click.distance:
        points.append((click.x, click.y))
        labels.append(label)
    return click.distance > 0


def _ranked(predictor: Predictor, scores: Floats) -> Indices:
    """(B,) of the M masks the candidate with the highest of the predicted IoUs (B,M)."""
    first = predictor.geometry.first_candidate
    ranked: Indices = first + scores[:, first:].argmax(axis=1)
    return ranked


def _same_masks(predictor: Predictor, teacher: Predictor) -> bool:
    """Whether an index means the same to both."""
    a, b = predictor.geometry, teacher.geometry
    return (a.num_masks, a.single_mask) == (b.num_masks, b.single_mask)


def _boxes(targets: Sequence[Target]) -> Prompts:
    return check_prompts(None, None, np.stack([t.box_xyxy for t in targets]), _hw(targets[0]))


def _centre_clicks(targets: Sequence[Target]) -> Prompts:
    clicks = [innermost(t.mask) for t in targets]
    return check_prompts([[(c.x, c.y)] for c in clicks], [[LABEL_FOREGROUND]] * len(clicks), None, _hw(targets[0]))


def _one(asked: Prompts, i: int) -> Prompts:
    coords, labels, boxes = (
        None if p is None else p[i : i + 1] for p in (asked.point_coords, asked.point_labels, asked.boxes)
    )
    return Prompts(coords, labels, boxes, batched=True)


def _upscale(predictor: Predictor, logits: Floats, target: Target) -> Mask:
    """Low-resolution logits (4E,4E) to the mask (H,W)."""
    mask: Mask = predictor.postprocess(logits[None, None], _hw(target))[0, 0] > MASK_THRESHOLD
    return mask


def _hw(target: Target) -> tuple[int, int]:
    return target.mask.shape[0], target.mask.shape[1]


def _round(clicks: int) -> str:
    return f"{clicks} click{'s' if clicks > 1 else ''}"
