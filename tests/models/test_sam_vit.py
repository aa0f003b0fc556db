"""Segment Anything's own ViT, against segment-anything's own construction."""

from __future__ import annotations

from dataclasses import replace

import segment_anything
import torch
from segment_anything.build_sam import _build_sam

from edgesam_deploy.models import build_model
from edgesam_deploy.recipe import load_recipe

from .deterministic_weights import deterministic_state, smooth_image


def test_vit_b_has_the_state_dict_of_the_registry() -> None:
    with torch.device("meta"):
        ours = build_model(load_recipe("sam_vit_b")).state_dict()
        theirs = segment_anything.sam_model_registry["vit_b"]().state_dict()
    assert [(n, t.shape, t.dtype) for n, t in ours.items()] == [(n, t.shape, t.dtype) for n, t in theirs.items()]


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
