"""RepViT (Wang et al. 2023, https://github.com/THU-MIG/RepViT) as an image encoder: timm's blocks under a SAM neck.

EdgeSAM and RepViT-SAM both copied RepViT's first code, a flat list ``features`` of blocks; timm sorts the same blocks
into stages. ``timm_names`` turns the names of one into those of the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from segment_anything.modeling.common import LayerNorm2d
from timm.models.repvit import RepVit
from torch import Tensor, nn

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.recipe import Recipe

# Stride at the end of the third stage, which is that of SAM's embedding.
STRIDE = 16

STAGES = 4

_FEATURE = re.compile(r"image_encoder\.features\.(\d+)\.(.+)")

# The parts of an upstream block, and timm's names for them.
_STEM = {"0.": "conv1.", "2.": "conv2."}
_BLOCK = {
    "token_mixer.0.": "token_mixer.",
    "token_mixer.1.": "se.",
    "channel_mixer.m.0.": "channel_mixer.conv1.",
    "channel_mixer.m.2.": "channel_mixer.conv2.",
}
_DOWNSAMPLE = {
    "token_mixer.0.": "spatial_downsample.",
    "token_mixer.2.": "channel_downsample.",
    "channel_mixer.m.0.": "ffn.conv1.",
    "channel_mixer.m.2.": "ffn.conv2.",
}


class RepVitTrunk(nn.Module):
    """image (B,3,S,S) normalised float32 -> the four stages' features, at strides 4, 8, 16 and 32 (or 16).

    embed_dims, depths: channels and blocks per stage, as timm and the paper count them: the block without
    squeeze-and-excitation that ends each stage but the last is not counted. Here it runs in the stage that it ends, as
    upstream has it; timm runs it in the next. legacy: the first RepViT (M1 to M3), in which the 1x1 branch has a
    BatchNorm of its own and the sum has none. last_stride: of the fourth stage, 1 or 2.
    """

    def __init__(self, embed_dims: Sequence[int], depths: Sequence[int], legacy: bool, last_stride: int) -> None:
        super().__init__()
        # Any: torch types every attribute of a Module as Tensor | Module.
        built: Any = RepVit(embed_dim=tuple(embed_dims), depth=tuple(depths), num_classes=0, legacy=legacy)
        self.stem: nn.Module = built.stem
        self.stages: nn.Sequential = built.stages
        for stage, following in zip(built.stages, built.stages[1:], strict=False):
            stage.blocks.append(following.downsample.pre_block)
            following.downsample.pre_block = nn.Identity()
        built.stages[-1].downsample.spatial_downsample.c.stride = (last_stride, last_stride)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(image)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return tuple(features)


def neck(channels: int, embedding_channels: int) -> nn.Sequential:
    """SAM's neck (``ImageEncoderViT.neck``): (B,channels,E,E) -> (B,C,E,E)."""
    return nn.Sequential(
        nn.Conv2d(channels, embedding_channels, 1, bias=False),
        LayerNorm2d(embedding_channels),
        nn.Conv2d(embedding_channels, embedding_channels, 3, padding=1, bias=False),
        LayerNorm2d(embedding_channels),
    )


def check_sizes(recipe: Recipe, embed_dims: Sequence[int], depths: Sequence[int], multiple: int) -> None:
    """Raise RecipeError unless the options list four stages and image_size is 16 E and a multiple of ``multiple``."""
    geometry = recipe.geometry
    if len(embed_dims) != STAGES or len(depths) != STAGES:
        raise RecipeError(
            f"recipe {recipe.name}: embed_dims and depths must each list {STAGES} stages, "
            f"got {list(embed_dims)} and {list(depths)}"
        )
    if geometry.image_size != STRIDE * geometry.embedding_size or geometry.image_size % multiple:
        raise RecipeError(
            f"recipe {recipe.name}: the encoder has stride {STRIDE}, so geometry.image_size must be {STRIDE} * "
            f"embedding_size = {STRIDE * geometry.embedding_size} and a multiple of {multiple}, "
            f"got {geometry.image_size}"
        )


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's ``image_encoder.features.<i>.*`` as ``image_encoder.trunk.*``; every other name as it is.

    Where a stage begins is read from the names: only a downsampling block has a ``token_mixer.2``.
    """
    found = {name: match for name in state if (match := _FEATURE.fullmatch(name))}
    begins = {int(m[1]) for m in found.values() if m[2].startswith("token_mixer.2.")}
    homes: dict[int, tuple[str, Mapping[str, str]]] = {}
    stage = block = 0
    for index in sorted({int(m[1]) for m in found.values()}):
        if index == 0:
            homes[index] = ("stem.", _STEM)
        elif index in begins:
            stage, block = stage + 1, 0
            homes[index] = (f"stages.{stage}.downsample.", _DOWNSAMPLE)
        else:
            homes[index] = (f"stages.{stage}.blocks.{block}.", _BLOCK)
            block += 1
    return {_timm_name(name, found.get(name), homes): tensor for name, tensor in state.items()}


def _timm_name(name: str, match: re.Match[str] | None, homes: Mapping[int, tuple[str, Mapping[str, str]]]) -> str:
    if match is None:
        return name
    home, parts = homes[int(match[1])]
    for theirs, ours in parts.items():
        if match[2].startswith(theirs):
            return f"image_encoder.trunk.{home}{ours}{match[2][len(theirs) :]}"
    return name
