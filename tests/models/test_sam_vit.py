"""Segment Anything's own ViT, against segment-anything's own construction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import segment_anything
import torch
from segment_anything.build_sam import _build_sam

from edgesam_deploy.models import build_model
from edgesam_deploy.recipe import load_recipe

from .deterministic_weights import deterministic_state, smooth_image


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_state_dict_is_the_registrys(name: str) -> None:
    with torch.device("meta"):
        ours = build_model(load_recipe(f"sam_{name}")).state_dict()
        theirs = segment_anything.sam_model_registry[name]().state_dict()
    assert [(n, t.shape, t.dtype) for n, t in ours.items()] == [(n, t.shape, t.dtype) for n, t in theirs.items()]


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_encoder_is_built_as_the_registry_builds_it(name: str) -> None:
    """What no tensor's shape shows: heads, windows and which layers attend to the whole image."""
    with torch.device("meta"):
        ours = build_model(load_recipe(f"sam_{name}")).image_encoder
        theirs = segment_anything.sam_model_registry[name]().image_encoder
    assert repr(ours) == repr(theirs)
    attributes = ("num_heads", "scale", "use_rel_pos")
    for mine, other in zip(ours.blocks, theirs.blocks, strict=True):
        assert mine.window_size == other.window_size
        assert [getattr(mine.attn, a) for a in attributes] == [getattr(other.attn, a) for a in attributes]


def test_a_small_vit_computes_what_segment_anything_builds() -> None:
    recipe = load_recipe("sam_vit_b")
    options = {"embed_dim": 16, "depth": 2, "num_heads": 1, "global_attn_indexes": [1]}
    ours = build_model(replace(recipe, options=options))
    theirs = _build_sam(encoder_embed_dim=16, encoder_depth=2, encoder_num_heads=1, encoder_global_attn_indexes=[1])
    state = deterministic_state(theirs.state_dict())
    for model in (ours, theirs):
        model.load_state_dict(state, strict=True)
    image = smooth_image(1024)
    with torch.inference_mode():
        assert torch.equal(ours.image_encoder(image), theirs.image_encoder(image))
        assert torch.equal(ours.preprocess(128.0 + 50.0 * image), theirs.preprocess(128.0 + 50.0 * image))
