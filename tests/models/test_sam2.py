"""SAM 2.1 and EdgeTAM in image mode against upstream's own code, which is not needed to run this.

``data/sam2_outputs.npz`` and ``data/edge_tam_outputs.npz`` hold what https://github.com/facebookresearch/sam2 at commit
2b90b9f5ceec907a1c18123530e92e794ad901a4 (``sam2.1_hiera_*.yaml``) and https://github.com/facebookresearch/EdgeTAM at
commit 9cc44bfe9e16cc374242917b91283c718410ea87 (``edgetam.yaml``) answered at image_size 256, in eval mode, with the
weights and inputs of ``deterministic_weights.py``: names and shapes of the state dicts, a strided part of what
``SAM2ImagePredictor.set_image`` keeps, all four masks of every prompt as its ``_predict`` embeds it, which of them
``predict`` gives as the single answer, and a photograph through ``predict``. Besides, what ``Sam2Model`` and
``EdgeTamModel`` of transformers 5.24.0 answered with weights of their own names.

Tolerance: 2e-5 of the largest upstream value, in float32. Measured when the files were made: embeddings 0.0, merged for
export 7e-7, masks 1.0e-6. Compared once, by hand, with the same result: all five models whole, T and EdgeTAM at 1024.
Leaving out the padding point beside a box gives 1e-1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from edgesam_deploy.errors import CheckpointError, RecipeError
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.models import build_model, graph_modules, reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.models.sam2 import MASK_INPUT_LIMIT, Sam2, Sam2ReferenceDecoder
from edgesam_deploy.models.sam2_names import published_names
from edgesam_deploy.prompts import check_prompts, encode_prompts
from edgesam_deploy.recipe import Recipe, load_recipe

from .deterministic_weights import deterministic_state, smooth_image
from .sam_parity import EMBEDDING_PART, PHOTO, PROMPTS, Recorded, like, recorded
from .upstream_error import error

TOLERANCE = 2e-5
SIZE = 256
MASK_PART = np.s_[:, :, ::3, ::3]
FEATURES = ("image_embeddings", "high_res_feats_0", "high_res_feats_1")
# recipe -> its recorded outputs
MODELS = {"sam2.1_hiera_tiny": "sam2", "edge_tam": "edge_tam"}
STATES = {
    "sam2.1_hiera_tiny": ("sam2", "state"),
    "sam2.1_hiera_small": ("sam2", "state.small"),
    "sam2.1_hiera_base_plus": ("sam2", "state.base_plus"),
    "sam2.1_hiera_large": ("sam2", "state.large"),
    "edge_tam": ("edge_tam", "state"),
}
# RepViT's blocks add branches: with weights of order 1 their sum grows to 1e7 over 20 blocks.
BRANCHES = re.compile(r"(token_mixer\.conv1?|channel_mixer\.conv2|ffn\.conv2)\.bn\.weight$")


def weights(names: npt.NDArray[Any]) -> dict[str, Tensor]:
    """Deterministic tensors under the recorded (upstream's) names."""
    return {n: 0.3 * v if BRANCHES.search(n) else v for n, v in deterministic_state(like(names)).items()}


@cache
def upstream(family: str) -> Recorded:
    return recorded(family)


def small(name: str) -> Recipe:
    """A recipe's network for images of 256 pixels."""
    recipe = load_recipe(name)
    geometry = replace(recipe.geometry, image_size=SIZE, prompt_size=SIZE, embedding_size=SIZE // 16)
    return replace(recipe, geometry=geometry)


@cache
def model(name: str, prefix: str = "") -> Sam2:
    """Loaded as a published file is: strictly, under upstream's names, video memory and all."""
    built = build_model(small(name))
    state = weights(upstream(MODELS[name])[f"{prefix}state"])
    again = "shared_image_embedding.positional_embedding"
    if again in state:  # one matrix, published twice
        state[again] = state["prompt_encoder.shared_embedding.positional_embedding"].clone()
    built.load_state_dict(published_names(state), strict=True)
    return cast(Sam2, built.eval())


@cache
def features(name: str, prefix: str = "") -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return cast("tuple[Tensor, ...]", model(name, prefix).image_encoder(smooth_image(SIZE)))


def feeds(name: str, prompt: str, found: tuple[Tensor, ...]) -> list[Tensor]:
    """The decoder's inputs for a prompt of ``PROMPTS``, encoded by the runtime."""
    coords, labels, box, with_mask = PROMPTS[prompt]
    scale, frame = SIZE / 1024, small(name).geometry
    prompts = check_prompts(
        None if coords is None else np.multiply(coords, scale),
        labels,
        None if box is None else np.multiply(box, scale),
        (SIZE, SIZE),
    )
    encoded = encode_prompts(prompts, (SIZE, SIZE), frame.prompt_size, frame.resize, frame.box_padding)
    mask = (
        4.0 * smooth_image(frame.mask_size)[:, :1] if with_mask else torch.zeros(1, 1, frame.mask_size, frame.mask_size)
    )
    return [*found, *map(torch.from_numpy, encoded), mask, torch.tensor([float(with_mask)])]


@pytest.mark.parametrize("name", STATES)
def test_names_and_shapes_are_upstreams(name: str) -> None:
    with torch.device("meta"):
        built = build_model(load_recipe(name))
    family, key = STATES[name]
    theirs = published_names(like(upstream(family)[key]))
    assert {n: (t.shape, t.dtype) for n, t in built.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_features_agree_as_built_and_as_exported(name: str) -> None:
    encoder = graph_modules(model(name), small(name))[0].image_encoder
    with torch.inference_mode():
        merged = cast(nn.Module, encoder)(smooth_image(SIZE))
    for key, ours, exported in zip(FEATURES, features(name), merged, strict=True):
        assert error(ours.numpy()[EMBEDDING_PART], upstream(MODELS[name])[key]) < TOLERANCE, key
        assert error(exported.numpy()[EMBEDDING_PART], upstream(MODELS[name])[key]) < TOLERANCE, key


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_answers_agree_as_built_and_as_exported(name: str, prompt: str) -> None:
    expected, recipe = upstream(MODELS[name]), small(name)
    arguments = feeds(name, prompt, features(name))
    for module in (Sam2ReferenceDecoder(model(name), recipe), graph_modules(model(name), recipe)[1]):
        with torch.inference_mode():
            low_res_masks, iou_predictions = module(*arguments)
        assert error(low_res_masks.numpy()[MASK_PART], expected[f"{prompt}.low_res_masks"]) < TOLERANCE
        assert error(iou_predictions, expected[f"{prompt}.iou_predictions"]) < TOLERANCE
        predictor = reference_predictor(model(name), recipe)
        single, _ = predictor._choose(low_res_masks.numpy(), iou_predictions.numpy(), multimask_output=False)
        np.testing.assert_array_equal(single[0, 0], low_res_masks[0, int(expected[f"{prompt}.single"][0])])


@pytest.mark.parametrize("variant", ["base_plus", "large"])
def test_features_of_the_wider_backbones_agree(variant: str) -> None:
    """Widths, heads, windows and position embedding of B+ and L, with few blocks."""
    expected = upstream("sam2")
    recipe = small(f"sam2.1_hiera_{variant}")
    fewer = {**recipe.options, "stages": [1, 1, 2, 1], "global_att_blocks": [3]}
    encoder = cast(nn.Module, build_model(replace(recipe, options=fewer)).image_encoder)
    state = published_names(weights(expected[f"cut.{variant}.state"]))
    encoder.load_state_dict({n.removeprefix("image_encoder."): t for n, t in state.items()}, strict=True)
    with torch.inference_mode():
        found = encoder(smooth_image(SIZE))
    for key, ours in zip(FEATURES, found, strict=True):
        assert error(ours.numpy()[EMBEDDING_PART], expected[f"cut.{variant}.{key}"]) < TOLERANCE, key


@pytest.mark.parametrize("name", MODELS)
def test_weights_published_for_transformers_agree(name: str) -> None:
    """Its own names, its own matrix of labels, and its own code's answers."""
    expected, prefix = upstream(MODELS[name]), "transformers."
    for key, ours in zip(FEATURES, features(name, prefix), strict=True):
        assert error(ours.numpy()[EMBEDDING_PART], expected[prefix + key]) < TOLERANCE, key
    decoder = Sam2ReferenceDecoder(model(name, prefix), small(name))
    for prompt in ("points", "points_box_mask"):
        with torch.inference_mode():
            masks, iou = decoder(*feeds(name, prompt, features(name, prefix)))
        assert error(masks[:, 1:].numpy()[MASK_PART], expected[f"{prefix}{prompt}.low_res_masks"]) < TOLERANCE
        assert error(iou[:, 1:], expected[f"{prefix}{prompt}.iou_predictions"]) < TOLERANCE


def ious(found: Mapping[str, Any], expected: Recorded) -> list[float]:
    return [
        mask_iou(ours, np.unpackbits(theirs, axis=-1).astype(bool)[:, : ours.shape[1]])
        for key, masks in found.items()
        for ours, theirs in zip(masks, expected[key], strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_photo_agrees(name: str) -> None:
    """Where the picture has the encoder's size, exactly. Elsewhere upstream resizes in floating point, which a uint8
    input cannot carry: pixels are up to 1 grey level away, and masks as noisy as those of random weights follow.
    """
    expected, photo = upstream(MODELS[name]), np.asarray(Image.open(PHOTO).convert("RGB"))
    predictor = reference_predictor(model(name), small(name))
    predictor.set_image(np.ascontiguousarray(photo[100:356, 200:456]))
    multi, single = (predictor.predict(box=[40, 30, 200, 220], multimask_output=m) for m in (True, False))
    assert min(ious({"crop.masks": np.concatenate([multi.masks, single.masks])}, expected)) >= 0.999
    found = np.concatenate([multi.iou_predictions, single.iou_predictions])
    assert error(found, expected["crop.iou_predictions"]) < TOLERANCE

    height, width = photo.shape[:2]
    resized = predictor.preprocess(photo)["image"]
    exact = nn.functional.interpolate(
        torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float(), (SIZE, SIZE), mode="bilinear", antialias=True
    )
    assert float((torch.from_numpy(resized) - exact).abs().max()) < 1.01
    predictor.set_image(photo)
    box = predictor.predict(box=[width * 0.2, height * 0.25, width * 0.75, height * 0.9])
    point = predictor.predict([[width * 0.45, height * 0.55]], [1])
    assert min(ious({"photo.box": box.masks[1:2], "photo.point": point.masks[2:3]}, expected)) >= 0.99


def test_names_that_are_ours_and_unknown_ones_pass() -> None:
    ours = model("edge_tam").state_dict()
    assert list(published_names(ours)) == list(ours)
    strange = {"memory_attention2.weight": torch.zeros(1), "no_obj_ptr.weight": torch.zeros(1)}
    assert published_names(strange) == strange


def test_what_video_alone_needs_is_left_out_and_nothing_else_may_be_missing(tmp_path: Path) -> None:
    state = weights(upstream("edge_tam")["state"])
    torch.save({"model": state}, tmp_path / "edgetam.pt")
    loaded = load_model(small("edge_tam"), tmp_path / "edgetam.pt").state_dict()
    torch.testing.assert_close(loaded["image_encoder.no_mem_embed"], state["no_mem_embed"], rtol=0, atol=0)
    del state["no_mem_embed"]
    torch.save({"model": state}, tmp_path / "edgetam.pt")
    with pytest.raises(CheckpointError, match="1 missing"):
        load_model(small("edge_tam"), tmp_path / "edgetam.pt")


def test_two_different_copies_of_a_shared_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="are one matrix in SAM 2, here they differ"):
        published_names(weights(upstream("edge_tam")["transformers.state"]))


def test_a_mask_prompt_counts_as_upstream_would_have_returned_it() -> None:
    """``SAM2ImagePredictor.predict`` clamps the logits that it hands out."""
    recipe = small("edge_tam")
    *front, mask, has = feeds("edge_tam", "mask", features("edge_tam"))
    loud = 20.0 * mask
    assert loud.abs().max() > MASK_INPUT_LIMIT
    for module in (Sam2ReferenceDecoder(model("edge_tam"), recipe), graph_modules(model("edge_tam"), recipe)[1]):
        with torch.inference_mode():
            expected, _ = module(*front, loud.clamp(-32.0, 32.0), has)
            found, _ = module(*front, loud, has)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sam2.1_hiera_tiny", {"embedding_size": 32}, "needs geometry.image_size = 512, got 1024"),
        ("sam2.1_hiera_tiny", {"high_res_channels": ()}, r"needs geometry.high_res_channels = \(32, 64\)"),
        ("edge_tam", {"resize": "longest_side"}, "needs geometry.resize = stretch"),
        ("edge_tam", {"box_padding": False}, "needs geometry.box_padding = True"),
    ],
)
def test_another_geometry_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"), pytest.raises(RecipeError, match=message):
        build_model(replace(recipe, geometry=replace(recipe.geometry, **change)))


def test_a_backbone_of_other_strides_is_refused() -> None:
    with torch.device("meta"), pytest.raises(RecipeError, match="must give features at strides"):
        build_model(replace(load_recipe("edge_tam"), options={"backbone": "mobilenetv4_conv_small"}))
