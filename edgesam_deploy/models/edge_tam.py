"""EdgeTAM (Zhou et al. 2025, https://github.com/facebookresearch/EdgeTAM) as an image model: SAM 2 behind a RepViT."""

from __future__ import annotations

from typing import Any, cast

import timm
from torch import Tensor, nn

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import options
from edgesam_deploy.models.sam2 import STRIDES, Sam2, Sam2DecoderGraph, Sam2EncoderGraph, Sam2ReferenceDecoder, assemble
from edgesam_deploy.models.sam2_names import published_names
from edgesam_deploy.recipe import Recipe


class TimmTrunk(nn.Module):
    """image (B,3,S,S) normalised float32 -> a timm model's features at strides 4, 8, 16 and 32, finest first."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        # Any: torch types every attribute of a Module as Tensor | Module.
        body: Any = timm.create_model(backbone, pretrained=False, features_only=True, out_indices=(0, 1, 2, 3))
        reductions = tuple(body.feature_info.reduction())
        if reductions != STRIDES:
            raise RecipeError(f"backbone {backbone} must give features at strides {STRIDES}, gives {reductions}")
        self.body = body
        self.widths: list[int] = body.feature_info.channels()

    def forward(self, image: Tensor) -> list[Tensor]:
        return cast("list[Tensor]", self.body(image))


def build(recipe: Recipe) -> Sam2:
    trunk = TimmTrunk(options(recipe, "backbone")["backbone"])
    return assemble(trunk, trunk.widths, recipe)


ARCHITECTURE = Architecture(
    build,
    published_names=published_names,
    encoder_graph=Sam2EncoderGraph,
    decoder_graph=Sam2DecoderGraph,
    reference_decoder=Sam2ReferenceDecoder,
)
