"""SlimSAM against upstream's own code, which is not needed to run this.

``data/slim_sam_outputs.npz`` holds what https://github.com/czg1225/SlimSAM at commit
b612c1bb8cbeeeacac3cc4153a61cf5830658bc5 answered, in eval mode, with the weights and inputs of
``deterministic_weights.py`` and ``parity.py``, for both uniformly pruned models: names and shapes of their state dicts
and what each tensor is called in Hugging Face's files (by ``convert_sam_to_hf.py`` of transformers at
09cb93d8890401636f6abd80b763671e755aa025; the names are those of ``SamModel`` of transformers 5.24.0); at 256 pixels,
since attention takes gigabytes at 1024, a part of the image embeddings and of the four low-resolution masks of each
prompt, the IoU predictions, and two masks of a photograph by upstream's predictor. Tolerance: 2e-5 of the largest
upstream value, in float32. Measured when the file was made: 1.2e-6, and 6.3e-7 for the image embeddings of the 77 %
model at 1024 pixels; photograph: mask IoU 0.9994 and more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from edgesam_deploy.models import architecture, build_model
from edgesam_deploy.models.transformers_names import segment_anything_names
from edgesam_deploy.recipe import Recipe, load_recipe

from .deterministic_weights import deterministic_state, smooth_image
from .parity import PROMPTS, answer, empty_state, listing, outputs, photo_iou
from .upstream_error import error

TOLERANCE = 2e-5
SIZE = 256


@pytest.fixture(scope="module")
def upstream() -> dict[str, npt.NDArray[Any]]:
    return outputs("slim_sam")


def small(name: str) -> Recipe:
    """The recipe at 256 pixels: every layer as published, fewer positions."""
    recipe = load_recipe(f"slim_sam_{name}")
    sizes = {"image_size": SIZE, "prompt_size": SIZE, "embedding_size": SIZE // 16}
    return replace(recipe, geometry=replace(recipe.geometry, **sizes))


def load(recipe: Recipe, upstream: dict[str, npt.NDArray[Any]]) -> Any:
    """The network with upstream's weights, from a state dict under Hugging Face's names."""
    built = build_model(recipe)
    theirs = [line.split()[0] for line in upstream[f"{recipe.name[-2:]}.state"].tolist()]
    # Of the tensors that depend on the size, ours have the one that is wanted.
    like = {name: built.state_dict()[name] for name in theirs}
    renamed = dict(zip(theirs, upstream["transformers"].tolist(), strict=True))
    published = {renamed[name]: tensor for name, tensor in deterministic_state(like).items()}
    # Saved twice by transformers, whose two modules share it.
    published["shared_image_embedding.positional_embedding"] = published[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    built.load_state_dict(architecture(recipe).published_names(published), strict=True)
    return built


@pytest.fixture(scope="module", params=["50", "77"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return small(str(request.param))


@pytest.fixture(scope="module")
def model(recipe: Recipe, upstream: dict[str, npt.NDArray[Any]]) -> Any:
    return load(recipe, upstream)


@pytest.fixture(scope="module")
def embeddings(model: Any) -> Tensor:
    """(1,256,16,16)"""
    with torch.inference_mode():
        return cast(Tensor, model.image_encoder(smooth_image(SIZE)))


@pytest.mark.parametrize("name", ["50", "77"])
def test_names_and_shapes_are_upstreams(name: str, upstream: dict[str, npt.NDArray[Any]]) -> None:
    with torch.device("meta"):
        state = build_model(load_recipe(f"slim_sam_{name}")).state_dict()
    assert listing(state) == upstream[f"{name}.state"].tolist()


def test_names_that_are_ours_pass_unchanged(upstream: dict[str, npt.NDArray[Any]]) -> None:
    state = empty_state(upstream["77.state"])
    assert segment_anything_names(state) == state


def test_image_embeddings_agree(recipe: Recipe, embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]) -> None:
    assert error(embeddings[:, ::8], upstream[f"{recipe.name[-2:]}.image_embeddings"]) < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(
    name: str, recipe: Recipe, model: Any, embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]
) -> None:
    low_res_masks, iou_predictions = answer(model, embeddings, name)
    recorded = f"{recipe.name[-2:]}.{name}"
    assert error(low_res_masks[:, :, ::3, ::3], upstream[f"{recorded}.low_res_masks"]) < TOLERANCE
    assert error(iou_predictions, upstream[f"{recorded}.iou_predictions"]) < TOLERANCE


def test_masks_of_a_photograph_are_those_of_upstreams_predictor(
    recipe: Recipe, model: Any, upstream: dict[str, npt.NDArray[Any]]
) -> None:
    recorded = {name: upstream[f"{recipe.name[-2:]}.dog.{name}"] for name in ("point", "box")}
    found = photo_iou(model, recipe, recorded)
    assert min(found.values()) >= 0.999, found
