"""MobileSAM against upstream's own code, which is not needed to run this.

``data/mobile_sam_outputs.npz`` holds what https://github.com/ChaoningZhang/MobileSAM at commit
34bbbfdface3c18e5221aa7de6032d7220c6c6a1 answered, in eval mode, with the weights and inputs of
``deterministic_weights.py``: the names and shapes of its state dict, a strided part of the image embeddings and of the
four low-resolution masks of each prompt, and the IoU predictions. Tolerance: 2e-5 of the largest upstream value, in
float32. Measured when the file was made: 1.1e-6; the rest is room for other BLAS libraries and vector widths. Small
mistakes are larger: LayerNorm with eps 1e-6 instead of 1e-5 gives 6e-5, GELU by tanh 7e-4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models import build_model
from edgesam_deploy.models.mobile_sam import MobileSamEncoder
from edgesam_deploy.models.tiny_vit import Attention, offset_index
from edgesam_deploy.recipe import load_recipe

from .deterministic_weights import deterministic_state, smooth_image
from .upstream_error import error

DATA = Path(__file__).parent / "data" / "mobile_sam_outputs.npz"
EMBEDDING_PART = np.s_[:, ::8, ::3, ::3]
MASK_PART = np.s_[:, :, ::7, ::7]
TOLERANCE = 2e-5

# name: (point_coords (1,N,2) and point_labels (1,N), or None; box_xyxy (1,4), or None; with a mask input?)
PROMPTS: dict[str, tuple[tuple[Tensor, Tensor] | None, Tensor | None, bool]] = {
    "point": ((torch.tensor([[[300.0, 500.0]]]), torch.tensor([[1]])), None, False),
    "points": ((torch.tensor([[[300.0, 500.0], [900.5, 40.25]]]), torch.tensor([[1, 0]])), None, False),
    "box": (None, torch.tensor([[120.0, 200.0, 800.0, 930.0]]), False),
    "points_box_mask": (
        (torch.tensor([[[300.0, 500.0], [900.5, 40.25]]]), torch.tensor([[1, 0]])),
        torch.tensor([[120.0, 200.0, 800.0, 930.0]]),
        True,
    ),
    "mask": (None, None, True),
}


@pytest.fixture(scope="module")
def upstream() -> dict[str, npt.NDArray[Any]]:
    with np.load(DATA) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Sam:
    built = build_model(load_recipe("mobile_sam"))
    path = tmp_path_factory.mktemp("mobile_sam") / "mobile_sam.pt"
    torch.save(deterministic_state(built.state_dict()), path)
    built.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return built


@pytest.fixture(scope="module")
def embeddings(model: Sam) -> Tensor:
    """(1,256,64,64)"""
    with torch.inference_mode():
        return cast(Tensor, model.image_encoder(smooth_image(1024)))


def answer(model: Sam, embeddings: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """low_res_masks (1,4,256,256) and iou_predictions (1,4): the single mask, then the three of multimask_output."""
    points, box, with_mask = PROMPTS[name]
    mask_input = 4.0 * smooth_image(256)[:, :1] if with_mask else None
    with torch.inference_mode():
        sparse, dense = model.prompt_encoder(points=points, boxes=box, masks=mask_input)
        single, multi = (
            model.mask_decoder(
                image_embeddings=embeddings,
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )
            for multimask in (False, True)
        )
    return torch.cat([single[0], multi[0]], dim=1), torch.cat([single[1], multi[1]], dim=1)


def test_names_and_shapes_are_upstreams(model: Sam, upstream: dict[str, npt.NDArray[Any]]) -> None:
    ours = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in model.state_dict().items()]
    assert sorted(ours) == sorted(upstream["state"].tolist())


def test_parameter_count(model: Sam) -> None:
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert counts == {"image_encoder": 6_065_532, "prompt_encoder": 6_220, "mask_decoder": 4_058_340}


def test_image_embeddings_agree(embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]) -> None:
    assert tuple(embeddings.shape) == (1, 256, 64, 64)
    assert error(embeddings.numpy()[EMBEDDING_PART], upstream["image_embeddings"]) < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(name: str, model: Sam, embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]) -> None:
    low_res_masks, iou_predictions = answer(model, embeddings, name)
    assert error(low_res_masks.numpy()[MASK_PART], upstream[f"{name}.low_res_masks"]) < TOLERANCE
    assert error(iou_predictions, upstream[f"{name}.iou_predictions"]) < TOLERANCE


def test_offset_index_is_symmetric_and_complete() -> None:
    index = offset_index(3)
    assert index[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert index[4].tolist() == [4, 3, 4, 1, 0, 1, 4, 3, 4]
    assert torch.equal(index, index.T)


def test_attention_bias_follows_weights_loaded_in_eval_mode() -> None:
    attention = Attention(channels=8, num_heads=2, window=3).eval()
    x = smooth_image(9).reshape(3, 9, 9)[..., :8].contiguous()
    attention.load_state_dict(deterministic_state(attention.state_dict()), strict=True)
    with torch.inference_mode():
        loaded_in_eval = attention(x)
        assert torch.equal(loaded_in_eval, attention.train()(x))
    assert attention.attention_biases.detach().abs().max() > 0.1


def test_training_reaches_attention_biases_and_not_the_classifier() -> None:
    encoder = MobileSamEncoder([8, 16, 16, 32], [1, 1, 1, 1], [1, 2, 2, 4], [7, 7, 14, 7], channels=8).train()
    out = encoder(smooth_image(64))
    assert tuple(out.shape) == (1, 8, 4, 4)
    out.square().sum().backward()
    without = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert without == {"norm_head.weight", "norm_head.bias", "head.weight", "head.bias"}


def test_geometry_of_another_stride_is_refused() -> None:
    recipe = load_recipe("mobile_sam")
    with pytest.raises(RecipeError, match="stride 16"):
        build_model(replace(recipe, geometry=replace(recipe.geometry, embedding_size=32)))


def test_stage_lists_of_another_length_are_refused() -> None:
    recipe = load_recipe("mobile_sam")
    with pytest.raises(RecipeError, match="must list 4 stages"):
        build_model(replace(recipe, options={**recipe.options, "depths": [2, 2, 6]}))
