"""Segment Anything's own ViT encoders (Kirillov et al. 2023), through segment-anything.

Tensor names are upstream's; those of Hugging Face's copies (facebook/sam-vit-base and its like) load as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.models.transformers_names import segment_anything_names
from edgesam_deploy.recipe import Recipe

# Hidden width of a block's perceptron over its embedding.
MLP_RATIO = 4


def build(recipe: Recipe) -> Sam:
    """Options: embed_dim, depth, num_heads, global_attn_indexes (``build_sam.py`` of segment-anything)."""
    given = options(recipe, "embed_dim", "depth", "num_heads", "global_attn_indexes")
    return assemble(vit_encoder(recipe, mlp_dim=MLP_RATIO * given["embed_dim"], **given), recipe)


def vit_encoder(
    recipe: Recipe, embed_dim: int, mlp_dim: int, depth: int, num_heads: int, global_attn_indexes: Sequence[int]
) -> ImageEncoderViT:
    """image (1,3,S,S) normalised float32 -> image_embeddings (1,C,E,E); mlp_dim: hidden width of the perceptrons."""
    geometry = recipe.geometry
    return ImageEncoderViT(
        img_size=geometry.image_size,
        patch_size=geometry.image_size // geometry.embedding_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        # It takes a ratio and cuts off what the product has behind the point.
        mlp_ratio=(mlp_dim + 0.5) / embed_dim,
        out_chans=geometry.embedding_channels,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tuple(global_attn_indexes),
    )


ARCHITECTURE = Architecture(build, segment_anything_names)
