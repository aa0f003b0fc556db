"""MobileSAM (Zhang et al. 2023, https://github.com/ChaoningZhang/MobileSAM): SAM behind a TinyViT encoder.

Tensor names are upstream's, so ``mobile_sam.pt`` loads strictly and without a key map. TinySAM (Shu et al. 2023,
https://github.com/xinghaochen/TinySAM) is the same network with other weights. So is MobileSAMv2, whose decoder for
many boxes at once is published by itself under two other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.models.tiny_vit import MBConv, PatchEmbed, PatchMerging, Stage, TinyVitBlock
from edgesam_deploy.recipe import Recipe

# Classes of the head that upstream's checkpoint still carries.
IMAGENET_CLASSES = 1000

# Strides of the three mergings. TinyViT's third is 2; MobileSAM sets it to 1 to end at SAM's stride of 16.
MERGING_STRIDES = (2, 2, 1)
STRIDE = 16


class MobileSamEncoder(nn.Module):
    """image (B,3,S,S) normalised float32 -> image_embeddings (B,C,S/16,S/16) float32.

    ``norm_head`` and ``head`` are the classifier of TinyViT's pretraining. Upstream's checkpoint carries their
    tensors; they are kept so that it loads and saves whole, are never run, and are absent from exported graphs.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_sizes: Sequence[int],
        channels: int,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dims[0])
        self.layers = nn.Sequential()
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks: list[nn.Module] = [
                TinyVitBlock(dim, num_heads[i], window_sizes[i]) if i else MBConv(dim) for _ in range(depth)
            ]
            last = i == len(embed_dims) - 1
            self.layers.append(
                Stage(blocks, None if last else PatchMerging(dim, embed_dims[i + 1], MERGING_STRIDES[i]))
            )
        self.norm_head = nn.LayerNorm(embed_dims[-1])
        self.head = nn.Linear(embed_dims[-1], IMAGENET_CLASSES)
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dims[-1], channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.neck(self.layers(self.patch_embed(image))))


def build(recipe: Recipe) -> Sam:
    """Options, one entry per stage: embed_dims, depths, num_heads, window_sizes.

    The first stage is convolutional; its num_heads and window_sizes are written for the sake of alignment only.
    """
    geometry = recipe.geometry
    given = options(recipe, "embed_dims", "depths", "num_heads", "window_sizes")
    sizes = {key: tuple(value) for key, value in given.items()}
    stages = len(MERGING_STRIDES) + 1
    if any(len(values) != stages for values in sizes.values()):
        raise RecipeError(f"recipe {recipe.name}: each of {', '.join(sizes)} must list {stages} stages, got {sizes}")
    if geometry.image_size != STRIDE * geometry.embedding_size:
        raise RecipeError(
            f"recipe {recipe.name}: MobileSAM's encoder has stride {STRIDE}, so geometry.image_size must be "
            f"{STRIDE} * embedding_size = {STRIDE * geometry.embedding_size}, got {geometry.image_size}"
        )
    return assemble(MobileSamEncoder(**sizes, channels=geometry.embedding_channels), recipe)


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MobileSAMv2's ``Prompt_guided_Mask_Decoder.pt`` has ``PromtEncoder`` (so spelt) and ``MaskDecoder``."""
    renamed = {"PromtEncoder": "prompt_encoder", "MaskDecoder": "mask_decoder"}
    parts = ((*name.partition("."), tensor) for name, tensor in state.items())
    return {f"{renamed.get(head, head)}{dot}{rest}": tensor for head, dot, rest, tensor in parts}


ARCHITECTURE = Architecture(build, published_names)
