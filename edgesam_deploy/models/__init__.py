"""Torch side: build a recipe's model and load its checkpoint.

Every builder returns ``segment_anything.modeling.Sam``, the container whose state dict keys
(``image_encoder.* prompt_encoder.* mask_decoder.*``) all published checkpoints of the family share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models import mobile_sam, sam_vit, timm_fpn
from edgesam_deploy.recipe import Recipe

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

BUILDERS: dict[str, Callable[[Recipe], Sam]] = {
    "mobile_sam": mobile_sam.build,
    "sam_vit": sam_vit.build,
    "timm_fpn": timm_fpn.build,
}


def build_model(recipe: Recipe) -> Sam:
    """The recipe's network in eval mode with initial (not trained) weights, float32 on the CPU."""
    try:
        builder = BUILDERS[recipe.architecture]
    except KeyError:
        raise RecipeError(
            f"recipe {recipe.name}: unknown architecture '{recipe.architecture}', expected one of {sorted(BUILDERS)}"
        ) from None
    try:
        return builder(recipe).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"recipe {recipe.name}: [model] does not describe a '{recipe.architecture}': {reason}"
        ) from error
