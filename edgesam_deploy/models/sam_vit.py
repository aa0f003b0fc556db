"""Segment Anything's own ViT encoders (Kirillov et al. 2023), through segment-anything."""

from __future__ import annotations

from functools import partial

from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.recipe import Recipe


def build(recipe: Recipe) -> Sam:
    """Options: embed_dim, depth, num_heads, global_attn_indexes (``build_sam.py`` of segment-anything)."""
    given, geometry = options(recipe, "embed_dim", "depth", "num_heads", "global_attn_indexes"), recipe.geometry
    encoder = ImageEncoderViT(
        img_size=geometry.image_size,
        patch_size=geometry.image_size // geometry.embedding_size,
        embed_dim=given["embed_dim"],
        depth=given["depth"],
        num_heads=given["num_heads"],
        mlp_ratio=4,
        out_chans=geometry.embedding_channels,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tuple(given["global_attn_indexes"]),
    )
    return assemble(encoder, recipe)


ARCHITECTURE = Architecture(build)
