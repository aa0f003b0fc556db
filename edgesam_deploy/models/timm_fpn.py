"""A timm backbone and a dense two-level-up, one-level-down neck: the encoder of all students.

Features at strides 8, 16 and 32 are brought to the embedding's channels and fused at stride 16 by regular
3x3 convolutions, which is where INT8 pays most.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.models.widths import resize
from edgesam_deploy.recipe import Recipe

STRIDES = (8, 16, 32)


class TimmFpnEncoder(nn.Module):
    """image (B,3,S,S) normalised float32 -> image_embeddings (B,C,S/16,S/16) float32."""

    def __init__(self, backbone: str, channels: int) -> None:
        super().__init__()
        # Any: torch types every attribute of a Module as Tensor | Module.
        features: Any = timm.create_model(backbone, pretrained=False, features_only=True)
        reductions, channels_of = features.feature_info.reduction(), features.feature_info.channels()
        if missing := set(STRIDES) - set(reductions):
            raise RecipeError(
                f"backbone {backbone} must give features at strides {', '.join(map(str, STRIDES))}, gives none at "
                f"{', '.join(map(str, sorted(missing)))}"
            )
        self.backbone = features
        # Which of its feature maps differs between backbones: some give one at stride 2, some begin at 4.
        self.taken = [reductions.index(stride) for stride in STRIDES]
        self.lateral = nn.ModuleList(nn.Conv2d(channels_of[i], channels, 1) for i in self.taken)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.fuse = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        features = self.backbone(image)
        stride8, stride16, stride32 = (
            lateral(features[i]) for lateral, i in zip(self.lateral, self.taken, strict=True)
        )
        up = F.interpolate(stride32, size=stride16.shape[-2:], mode="bilinear", align_corners=False)
        fused: Tensor = self.fuse(torch.add(self.down(stride8) + stride16, up))
        return fused


def build(recipe: Recipe) -> Sam:
    """Options: backbone, the name of a timm model with features at strides 8, 16, 32; widths, where it was pruned."""
    given = options(recipe, "backbone", optional=("widths",))
    encoder = TimmFpnEncoder(str(given["backbone"]), recipe.geometry.embedding_channels)
    resize(encoder, given.get("widths", {}))
    return assemble(encoder, recipe)


ARCHITECTURE = Architecture(build)
