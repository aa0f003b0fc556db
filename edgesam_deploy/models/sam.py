"""SAM's container, prompt encoder and mask decoder, unchanged, around any image encoder."""

from __future__ import annotations

from typing import Any

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.recipe import Recipe


def options(recipe: Recipe, *names: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries of a recipe's [model] table. Raises RecipeError unless they are ``names`` and any of ``optional``."""
    found, known = set(recipe.options), (*names, *optional)
    for what, wrong in (("lacks", set(names) - found), ("does not know", found - set(known))):
        if wrong:
            raise RecipeError(
                f"recipe {recipe.name}: architecture '{recipe.architecture}' {what} {', '.join(sorted(wrong))}; "
                f"[model] takes {', '.join(known)}"
            )
    return dict(recipe.options)


def assemble(image_encoder: nn.Module, recipe: Recipe) -> Sam:
    """Put ``image_encoder`` in front of SAM's prompt encoder and mask decoder.

    image_encoder: (1, 3, S, S) normalised float32 -> (1, C, E, E) float32. The numbers of the decoder are those
    of segment-anything's ``build_sam.py``; they are the same in every published checkpoint of the family.
    """
    geometry = recipe.geometry
    channels, side = geometry.embedding_channels, geometry.embedding_size
    # SamPredictor reads the input size from the encoder.
    image_encoder.img_size = geometry.image_size  # type: ignore[assignment]
    return Sam(
        image_encoder=image_encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(side, side),
            input_image_size=(geometry.prompt_size, geometry.prompt_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=geometry.num_masks - 1,
            transformer=TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=2048, num_heads=8),
            transformer_dim=channels,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=list(recipe.pixels.mean),
        pixel_std=list(recipe.pixels.std),
    )
