"""EdgeSAM against upstream's own code, which is not needed to run this.

``data/edge_sam_outputs.npz`` holds what https://github.com/chongzhou96/EdgeSAM at commit
b53372c0f5fb25bc1fb76eb583f77348b00854b2 (with timm 0.4.12, as it asks) answered, in eval mode at 1024 pixels: every
prompt kind (``sam_parity``), the encoder with bilinear upscaling at 256 pixels, upstream's ONNX decoder
(``SamCoreMLModel``) for a click, a box and a padding point, and a photograph through its ``SamPredictor``. Tolerance:
2e-5 of the largest upstream value, in float32. Measured when the file was made: 0.0 (the same sums in the same
order); the rest is room for other BLAS libraries and vector widths. Mask IoU of the photograph: 0.99998 or more padded
as upstream does, 0.9964 as it is deployed (``sam_parity.FloatPadding``).
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
from edgesam_deploy.models import build_model, graph_modules
from edgesam_deploy.models.edge_sam import published_names
from edgesam_deploy.models.graphs import EncoderGraph
from edgesam_deploy.recipe import Recipe, load_recipe

from .deterministic_weights import deterministic_state, smooth_image
from .sam_parity import EMBEDDING_PART, MASK_PART, PROMPTS, Recorded, answer, like, photo_ious, recorded
from .upstream_error import error

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def upstream() -> Recorded:
    return recorded("edge_sam")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("edge_sam")


@pytest.fixture(scope="module")
def model(recipe: Recipe, upstream: Recorded) -> Sam:
    """Our network with weights that came under upstream's names: nothing missing, left over or of another shape."""
    built = build_model(recipe)
    built.load_state_dict(published_names(deterministic_state(like(upstream["state"]))), strict=True)
    return cast(Sam, built)


@pytest.fixture(scope="module")
def embeddings(model: Sam) -> Tensor:
    """(1,256,64,64)"""
    with torch.inference_mode():
        return cast(Tensor, model.image_encoder(smooth_image(1024)))


def test_names_that_are_ours_pass_unchanged(model: Sam) -> None:
    ours = model.state_dict()
    assert list(published_names(ours)) == list(ours)


def test_parameter_count(model: Sam) -> None:
    """Upstream says 9.6 M in all."""
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert counts == {"image_encoder": 5_517_552, "prompt_encoder": 6_220, "mask_decoder": 4_058_340}


def test_image_embeddings_agree(embeddings: Tensor, upstream: Recorded) -> None:
    assert tuple(embeddings.shape) == (1, 256, 64, 64)
    assert error(embeddings.numpy()[EMBEDDING_PART], upstream["image_embeddings"]) < TOLERANCE


def test_bilinear_embeddings_agree(model: Sam, recipe: Recipe, upstream: Recorded) -> None:
    """At 256 pixels, where these weights amplify rounding: other vector widths and thread counts gave up to 5.8e-5."""
    bilinear: Any = build_model(replace(recipe, options={**recipe.options, "upsample": "bilinear"}))
    bilinear.load_state_dict(model.state_dict(), strict=True)
    with torch.inference_mode():
        found, bicubic = (m.image_encoder(smooth_image(256)).numpy()[EMBEDDING_PART] for m in (bilinear, model))
    assert error(found, upstream["image_embeddings_bilinear"]) < 5e-4
    # The other way to upscale is told apart: a difference that is meant, and so none of ``error``.
    assert abs(bicubic - upstream["image_embeddings_bilinear"]).max() > 0.1


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(name: str, model: Sam, embeddings: Tensor, upstream: Recorded) -> None:
    low_res_masks, iou_predictions = answer(model, embeddings, name)
    assert error(low_res_masks.numpy()[MASK_PART], upstream[f"{name}.low_res_masks"]) < TOLERANCE
    assert error(iou_predictions, upstream[f"{name}.iou_predictions"]) < TOLERANCE


def test_exported_decoder_answers_as_upstreams_exported_decoder(
    model: Sam, recipe: Recipe, embeddings: Tensor, upstream: Recorded
) -> None:
    _, decoder = graph_modules(model, recipe)
    coords = torch.tensor([[[300.0, 500.0], [120.0, 200.0], [800.0, 930.0], [0.0, 0.0]]])
    labels = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    with torch.inference_mode():
        masks, iou = decoder(embeddings, coords, labels, torch.zeros(1, 1, 256, 256), torch.zeros(1))
    assert error(masks.numpy()[MASK_PART], upstream["onnx.low_res_masks"]) < TOLERANCE
    assert error(iou, upstream["onnx.iou_predictions"]) < TOLERANCE


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


@pytest.mark.parametrize(
    ("options", "geometry", "message"),
    [
        ({"upsample": "nearest"}, {}, "upsample must be one of"),
        ({"depths": [2, 2, 14]}, {}, "must each list 4 stages"),
        ({}, {"embedding_size": 32}, "stride 16"),
        ({}, {"image_size": 1040, "embedding_size": 65}, "multiple of 32"),
    ],
)
def test_what_the_network_cannot_be_is_refused(
    recipe: Recipe, options: dict[str, Any], geometry: dict[str, Any], message: str
) -> None:
    wrong = replace(recipe, options={**recipe.options, **options}, geometry=replace(recipe.geometry, **geometry))
    with pytest.raises(RecipeError, match=message):
        build_model(wrong)


def test_3x_is_the_same_network_with_other_weights(recipe: Recipe) -> None:
    other = load_recipe("edge_sam_3x")
    for same in ("architecture", "options", "geometry", "pixels"):
        assert getattr(other, same) == getattr(recipe, same)
    for different in ("url", "sha256"):
        assert getattr(other.checkpoint, different) != getattr(recipe.checkpoint, different)
