"""RepViT-SAM against upstream's own code, which is not needed to run this.

``data/repvit_sam_outputs.npz`` holds what https://github.com/THU-MIG/RepViT, folder sam, at commit
298f42075eda5d2e6102559fad260c970769d34e (with timm 0.5.4, as it asks) answered, in eval mode: every prompt kind
(``sam_parity``) and a photograph through its ``SamPredictor``. At 512 pixels, since one image takes 20 s at the
published 1024; the embeddings of the smooth image at 1024 were compared once, by hand, with the same result.
Tolerance: 2e-5 of the largest upstream value, in float32. Measured when the file was made: 0.0 (the same sums in the
same order); the rest is room for other BLAS libraries and vector widths. Mask IoU of the photograph: 1.0 padded as
upstream does, 0.9978 as it is deployed (``sam_parity.FloatPadding``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models import build_model
from edgesam_deploy.models.graphs import EncoderGraph
from edgesam_deploy.models.repvit import timm_names
from edgesam_deploy.recipe import Recipe, load_recipe

from .deterministic_weights import deterministic_state, smooth_image
from .sam_parity import EMBEDDING_PART, MASK_PART, PROMPTS, Recorded, answer, like, photo_ious, recorded
from .upstream_error import error

TOLERANCE = 2e-5
SIZE = 512


@pytest.fixture(scope="module")
def upstream() -> Recorded:
    return recorded("repvit_sam")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    published = load_recipe("repvit_sam")
    return replace(
        published,
        geometry=replace(published.geometry, image_size=SIZE, prompt_size=SIZE, embedding_size=SIZE // 16),
    )


@pytest.fixture(scope="module")
def model(recipe: Recipe, upstream: Recorded) -> Sam:
    """Our network with weights that came under upstream's names: nothing missing, left over or of another shape."""
    built = build_model(recipe)
    built.load_state_dict(timm_names(deterministic_state(like(upstream["state"]))), strict=True)
    return cast(Sam, built)


@pytest.fixture(scope="module")
def embeddings(model: Sam) -> Tensor:
    """(1,256,32,32)"""
    with torch.inference_mode():
        return cast(Tensor, model.image_encoder(smooth_image(SIZE)))


def test_names_that_are_ours_pass_unchanged(model: Sam) -> None:
    ours = model.state_dict()
    assert list(timm_names(ours)) == list(ours)


def test_names_that_nobody_knows_pass_for_the_strict_load_to_refuse() -> None:
    strange = {"image_encoder.features.3.classifier.weight": torch.zeros(1), "rpn_head.weight": torch.zeros(1)}
    assert timm_names(strange) == strange


def test_parameter_count(model: Sam) -> None:
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert counts == {"image_encoder": 23_158_920, "prompt_encoder": 6_220, "mask_decoder": 4_058_340}


def test_image_embeddings_agree(embeddings: Tensor, upstream: Recorded) -> None:
    assert tuple(embeddings.shape) == (1, 256, 32, 32)
    assert error(embeddings.numpy()[EMBEDDING_PART], upstream["image_embeddings"]) < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(name: str, model: Sam, embeddings: Tensor, upstream: Recorded) -> None:
    low_res_masks, iou_predictions = answer(model, embeddings, name)
    assert error(low_res_masks.numpy()[MASK_PART], upstream[f"{name}.low_res_masks"]) < TOLERANCE
    assert error(iou_predictions, upstream[f"{name}.iou_predictions"]) < TOLERANCE


@pytest.mark.parametrize(("float_padding", "at_least"), [(True, 0.999), (False, 0.99)])
def test_photo_agrees(float_padding: bool, at_least: float, model: Sam, recipe: Recipe, upstream: Recorded) -> None:
    found = photo_ious(model, recipe, upstream, float_padding)
    assert min(found["photo.point"] + found["photo.box"]) >= at_least


@pytest.fixture
def float64() -> Iterator[None]:
    """PyTorch's default, which new modules get, is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_exported_encoder_has_its_branches_merged_and_computes_the_same(
    model: Sam, recipe: Recipe, float64: None
) -> None:
    """In float64, so that a difference could only be one of the sums: a 1x1 kernel off its centre, a BatchNorm left."""
    exact = copy.deepcopy(model).double()
    encoder: Any = EncoderGraph(exact, recipe)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in exact.modules())
    with torch.inference_mode():
        merged, unmerged = (m.image_encoder(smooth_image(128).double()) for m in (encoder, exact))
    assert error(merged, unmerged.numpy()) < 1e-10


def test_geometry_of_another_stride_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="stride 16"):
        build_model(replace(recipe, geometry=replace(recipe.geometry, embedding_size=16)))
