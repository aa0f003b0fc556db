"""Prompts in the loop: what is asked, where the next click goes, and that nothing but the student learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.contract import LABEL_BOX_TOP_LEFT, LABEL_FOREGROUND, LABEL_PADDING
from edgesam_deploy.distill.objectives import TeacherObjective, embedding_loss
from edgesam_deploy.distill.options import DistillOptions
from edgesam_deploy.distill.prompt_loop import PromptLoop, Prompts, _box, _refine, mask_loss
from edgesam_deploy.models import build_model, reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.recipe import Recipe, load_recipe

OPTIONS = DistillOptions(rounds=3, prompts=4, decoder_learns=True)


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return load_recipe(tiny_recipe)


@pytest.fixture
def teacher(recipe: Recipe, checkpoint: Path) -> Any:
    return load_model(recipe, checkpoint)


@pytest.fixture
def embedding(teacher: Any, recipe: Recipe) -> Any:
    rng = np.random.default_rng(3)
    predictor = reference_predictor(teacher, recipe)
    predictor.set_image(np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((20, 20, 1))).astype(np.uint8))
    return torch.from_numpy(predictor.get_image_embedding())


DRAW = torch.tensor([[80, 120, 11]])


def test_a_student_that_is_the_teacher_has_nothing_to_learn(teacher: Any, recipe: Recipe, embedding: Any) -> None:
    """Its masks are the targets: the loss is that of confident logits, and far from a student's with other weights."""
    torch.manual_seed(0)
    other = build_model(recipe)
    same = PromptLoop(teacher, recipe, teacher, recipe, OPTIONS)(embedding, embedding, DRAW)
    strange = PromptLoop(other, recipe, teacher, recipe, OPTIONS)(embedding, embedding, DRAW)
    assert same.item() < 0.5 * strange.item()
    again = PromptLoop(teacher, recipe, teacher, recipe, OPTIONS)(embedding, embedding, DRAW)
    assert again.item() == same.item()
    assert PromptLoop(teacher, recipe, teacher, recipe, OPTIONS)(
        embedding, embedding, torch.tensor([[80, 120, 12]])
    ).item() != same.item()  # fmt: skip


def test_only_the_student_learns(teacher: Any, recipe: Recipe, embedding: Any) -> None:
    torch.manual_seed(0)
    student = build_model(recipe)
    given = embedding.clone().requires_grad_()
    loop = PromptLoop(student, recipe, teacher, recipe, OPTIONS)
    loop(given, embedding, DRAW).backward()
    assert given.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in loop.teacher.parameters())
    learnt = {n for n, p in student.mask_decoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"mask_tokens.weight", "iou_prediction_head.layers.0.weight", "output_upscaling.0.weight"} <= learnt


def test_masks_are_those_of_the_predictor(teacher: Any, recipe: Recipe, embedding: Any) -> None:
    """A click of the loop, in pixels of the mask, is the same click of the image."""
    rng = np.random.default_rng(3)
    image = np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    predictor = reference_predictor(teacher, recipe)
    predictor.set_image(image)
    low_res, scores = predictor.decode(check_prompts([[(60, 40)]], [[LABEL_FOREGROUND]], None, (80, 120)))
    h, w = 21, recipe.geometry.mask_size
    click = np.zeros((1, 2, 2), np.float32)
    # (x, y) in the model frame, of 128 by round(128 * 80 / 120) pixels, four for one of the mask.
    click[0, 0] = (60 * 128 / 120 / 4, 40 * 85 / 80 / 4)
    loop = PromptLoop(teacher, recipe, teacher, recipe, OPTIONS)
    asked = Prompts(click, np.array([[LABEL_FOREGROUND, LABEL_PADDING]], np.float32))
    masks, said, index = loop._teach(embedding, asked, (h, w))
    best = 1 + scores[0, 1:].argmax()
    assert index.item() == best
    assert said.item() == pytest.approx(scores[0, best], abs=1e-4)
    assert (masks[0].numpy() == (low_res[0, best, :h, :w] > 0)).mean() > 0.999


def test_the_next_click_is_where_they_disagree() -> None:
    found, wanted = np.zeros((2, 8, 10), bool), np.zeros((2, 8, 10), bool)
    wanted[0, 2, 3] = True  # missed
    found[1, 5, 7] = True  # wrong
    coords = np.full((2, 2, 2), 4, np.float32)
    labels = np.array([[LABEL_FOREGROUND, LABEL_PADDING]] * 2, np.float32)
    first = Prompts(coords, labels)
    assert first.ambiguous
    more = _refine(first, found, wanted, np.random.default_rng(0))
    assert not more.ambiguous
    assert more.coords[:, 0].tolist() == [[3.5, 2.5], [7.5, 5.5]]
    assert more.labels[:, 0].tolist() == [1, 0]
    assert np.array_equal(more.coords[:, 1:], coords)
    assert np.array_equal(more.labels[:, 1:], labels)
    agreed = _refine(first, wanted, wanted, np.random.default_rng(0))
    assert agreed.coords[0, 0].tolist() == [3.5, 2.5]
    assert agreed.labels[:, 0].tolist() == [1, 0]


def test_boxes_are_near_the_masks_and_inside_the_picture() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:30] = True
    boxes = np.stack([_box(mask, (20, 30), rng).ravel() for _ in range(200)])
    assert np.abs(np.median(boxes, axis=0) - [10, 5, 30, 15]).max() < 0.6
    assert (boxes[:, [2, 3]] <= [30, 20]).all()
    empty = np.stack([_box(np.zeros((20, 30), bool), (20, 30), rng) for _ in range(50)])
    assert (empty >= 0).all()
    assert (empty <= [30, 20]).all()
    loop_labels = Prompts(empty, np.array([[LABEL_BOX_TOP_LEFT, 3]] * 50, np.float32))
    assert not loop_labels.ambiguous


def test_mask_loss_by_hand() -> None:
    logits, masks = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[True, False]]])
    # Cross-entropy ln 2; dice 1 - (2 * 0.5 + 1) / (1 + 1 + 1).
    assert mask_loss(logits, masks).item() == pytest.approx(np.log(2) + 1 / 3)


def test_the_embedding_counts_beside_masks(teacher: Any, recipe: Recipe, embedding: Any) -> None:
    torch.manual_seed(0)
    student = build_model(recipe).eval()
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    values = {}
    for weight in (0.0, 2.0):
        options = DistillOptions(rounds=1, prompts=2, embedding_weight=weight)
        loss, cosine = TeacherObjective(student, recipe, teacher, recipe, options)(images, embedding, DRAW)
        values[weight] = loss.item()
        assert -1 <= cosine.item() <= 1
    found = TeacherObjective(student, recipe, teacher, recipe, DistillOptions()).encoder(images)
    assert values[2.0] - values[0.0] == pytest.approx(2 * embedding_loss("huber", found, embedding).item(), rel=1e-4)
