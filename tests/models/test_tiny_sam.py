"""TinySAM against upstream's own code, which is not needed to run this.

``data/tiny_sam_outputs.npz`` holds what https://github.com/xinghaochen/TinySAM at commit
11589bc1d98c16cff046c31d5ad4cd90a30f0897 answered, in eval mode, with the weights and inputs of
``deterministic_weights.py`` and ``parity.py``: names and shapes of its state dict, a strided part of the image
embeddings and of the four low-resolution masks of each prompt, the IoU predictions, and two masks of a photograph by
its predictor. Tolerance: 2e-5 of the largest upstream value, in float32. Measured when the file was made: 2.3e-6;
photograph: mask IoU 0.99997 and more.
"""

from __future__ import annotations

from typing import Any, cast

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from edgesam_deploy.models import architecture, build_model
from edgesam_deploy.recipe import Recipe, load_recipe

from .deterministic_weights import deterministic_state, smooth_image
from .parity import PROMPTS, answer, empty_state, listing, outputs, photo_iou
from .upstream_error import error

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def upstream() -> dict[str, npt.NDArray[Any]]:
    return outputs("tiny_sam")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny_sam")


@pytest.fixture(scope="module")
def model(recipe: Recipe, upstream: dict[str, npt.NDArray[Any]]) -> Any:
    built = build_model(recipe)
    published = deterministic_state(empty_state(upstream["state"]))
    built.load_state_dict(architecture(recipe).published_names(published), strict=True)
    return built


@pytest.fixture(scope="module")
def embeddings(model: Any) -> Tensor:
    """(1,256,64,64)"""
    with torch.inference_mode():
        return cast(Tensor, model.image_encoder(smooth_image(1024)))


def test_names_and_shapes_are_upstreams(model: Any, upstream: dict[str, npt.NDArray[Any]]) -> None:
    assert sorted(listing(model.state_dict())) == sorted(upstream["state"].tolist())


def test_image_embeddings_agree(embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]) -> None:
    assert error(embeddings[:, ::8, ::3, ::3], upstream["image_embeddings"]) < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(name: str, model: Any, embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]) -> None:
    low_res_masks, iou_predictions = answer(model, embeddings, name)
    assert error(low_res_masks[:, :, ::7, ::7], upstream[f"{name}.low_res_masks"]) < TOLERANCE
    assert error(iou_predictions, upstream[f"{name}.iou_predictions"]) < TOLERANCE


def test_masks_of_a_photograph_are_those_of_upstreams_predictor(
    model: Any, recipe: Recipe, upstream: dict[str, npt.NDArray[Any]]
) -> None:
    """The single answer to a box too: upstream's evaluation takes the candidate of the highest predicted IoU."""
    found = photo_iou(model, recipe, {"point": upstream["dog.point"], "box": upstream["dog.box"]})
    assert min(found.values()) >= 0.999, found
