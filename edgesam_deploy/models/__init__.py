"""Torch side: build a recipe's model, its exported modules and its reference.

Most builders return ``segment_anything.modeling.Sam``, the container whose state dict keys
(``image_encoder.* prompt_encoder.* mask_decoder.*``) most published checkpoints of the family share.
"""

from __future__ import annotations

from torch import nn

from edgesam_deploy.contract import contracts
from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models import (
    edge_sam,
    edge_tam,
    efficient_sam,
    efficientvit_sam,
    mobile_sam,
    nanosam,
    repvit_sam,
    sam2,
    sam_vit,
    slim_sam,
    timm_fpn,
)
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.session import PyTorchSession
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Recipe

ARCHITECTURES: dict[str, Architecture] = {
    "edge_sam": edge_sam.ARCHITECTURE,
    "edge_tam": edge_tam.ARCHITECTURE,
    "efficient_sam": efficient_sam.ARCHITECTURE,
    "efficientvit_sam": efficientvit_sam.ARCHITECTURE,
    "mobile_sam": mobile_sam.ARCHITECTURE,
    "nanosam": nanosam.ARCHITECTURE,
    "repvit_sam": repvit_sam.ARCHITECTURE,
    "sam2": sam2.ARCHITECTURE,
    "sam_vit": sam_vit.ARCHITECTURE,
    "slim_sam": slim_sam.ARCHITECTURE,
    "timm_fpn": timm_fpn.ARCHITECTURE,
}


def architecture(recipe: Recipe) -> Architecture:
    """The recipe's network family. Raises RecipeError for one that this version does not know."""
    try:
        return ARCHITECTURES[recipe.architecture]
    except KeyError:
        raise RecipeError(
            f"recipe {recipe.name}: unknown architecture '{recipe.architecture}', expected one of "
            f"{sorted(ARCHITECTURES)}"
        ) from None


def build_model(recipe: Recipe) -> nn.Module:
    """The recipe's network in eval mode with initial (not trained) weights, float32 on the CPU."""
    builder = architecture(recipe).build
    try:
        return builder(recipe).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"recipe {recipe.name}: [model] does not describe a '{recipe.architecture}': {reason}"
        ) from error


def graph_modules(model: nn.Module, recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """The two modules that are exported, in eval mode."""
    family = architecture(recipe)
    return family.encoder_graph(model, recipe).eval(), family.decoder_graph(model, recipe).eval()


def reference_predictor(model: nn.Module, recipe: Recipe) -> Predictor:
    """A Predictor that runs the network's own modules, unchanged, in float32.

    Not the rearranged modules that are exported: what those changed must show when the two are compared.
    """
    graphs, family = contracts(recipe.geometry), architecture(recipe)
    return Predictor(
        PyTorchSession(family.reference_encoder(model, recipe), graphs["encoder"]),
        PyTorchSession(family.reference_decoder(model, recipe), graphs["decoder"]),
        recipe.geometry,
        recipe.pixels,
    )
