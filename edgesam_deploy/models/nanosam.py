"""NanoSAM (NVIDIA 2023, https://github.com/NVIDIA-AI-IOT/nanosam): MobileSAM behind a distilled ResNet.

Published is the image encoder alone, as ONNX; the prompt encoder and the mask decoder are MobileSAM's, unchanged.
Names are those of upstream's own network, so what its training saves loads too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import timm
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.recipe import Recipe

# Of the features; the neck doubles the size once.
STRIDE = 32

# A convolution of the backbone as the ONNX exporter leaves it: with a bias, its batch normalisation folded in.
_FOLDED = re.compile(r"(image_encoder\.backbone\.(?:.+\.)?)(conv\d|downsample\.0)\.bias")
BATCH_NORM_EPS = 1e-5


class NanoSamEncoder(nn.Module):
    """image (1,3,S,S) normalised float32 -> image_embeddings (1,C,S/16,S/16) float32.

    pos_embedding: (1,C,S/16,S/16), a learned value per position, added last.
    """

    def __init__(self, backbone: str, channels: int, side: int) -> None:
        super().__init__()
        # Any: torch types every attribute of a Module as Tensor | Module.
        features: Any = timm.create_model(backbone, pretrained=False, features_only=True)
        if features.feature_info.reduction()[-1] != STRIDE:
            raise RecipeError(
                f"backbone {backbone} must end at stride {STRIDE}, ends at {features.feature_info.reduction()[-1]}"
            )
        self.backbone = features
        layers: list[nn.Module] = []
        for width in (features.feature_info.channels()[-1], channels, channels):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.GELU()]
        layers += [nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1), nn.GELU()]
        self.up_1 = nn.Sequential(*layers)
        self.proj = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )
        self.pos_embedding = nn.Parameter(1e-5 * torch.randn(1, channels, side, side))

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.proj(self.up_1(self.backbone(image)[-1]))) + self.pos_embedding


def build(recipe: Recipe) -> Sam:
    """Options: backbone, the name of a timm model whose features end at stride 32 ("resnet18")."""
    backbone, geometry = str(options(recipe, "backbone")["backbone"]), recipe.geometry
    if geometry.image_size * 2 != STRIDE * geometry.embedding_size:
        raise RecipeError(
            f"recipe {recipe.name}: NanoSAM's encoder has stride {STRIDE // 2}, so geometry.image_size must be "
            f"{STRIDE // 2} * embedding_size = {STRIDE // 2 * geometry.embedding_size}, got {geometry.image_size}"
        )
    encoder = NanoSamEncoder(backbone, geometry.embedding_channels, geometry.embedding_size)
    return assemble(encoder, recipe)


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of upstream's training as it is; one read from its ONNX, with batch normalisations put back.

    Where the exporter folded one into the convolution before it, a normalisation that only adds the bias takes its
    place: mean 0, variance 1 (less the epsilon that is added to it), weight 1.
    """
    ours = dict(state)
    for name, bias in state.items():
        match = _FOLDED.fullmatch(name)
        if match is None:
            continue
        norm = "downsample.1" if match[2] == "downsample.0" else match[2].replace("conv", "bn")
        del ours[name]
        ones = torch.ones_like(bias)
        parts = {"weight": ones, "bias": bias, "running_mean": 0 * ones, "running_var": ones - BATCH_NORM_EPS}
        ours |= {f"{match[1]}{norm}.{part}": values for part, values in parts.items()}
        ours[f"{match[1]}{norm}.num_batches_tracked"] = torch.tensor(0)
    return ours


ARCHITECTURE = Architecture(build, published_names)
