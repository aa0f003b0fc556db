"""RepViT-SAM (Wang et al. 2023, https://github.com/THU-MIG/RepViT, folder sam): SAM behind a RepViT-M2.3 encoder.

Everything but the encoder is SAM's. The last stage of RepViT keeps the stride of 16 at which SAM's embedding ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from segment_anything.modeling import Sam
from torch import Tensor, nn

from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.repvit import STRIDE, RepVitTrunk, check_sizes, neck, timm_names
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.recipe import Recipe


class RepVitSamEncoder(nn.Module):
    """image (B,3,S,S) normalised float32 -> image_embeddings (B,C,S/16,S/16) float32."""

    def __init__(self, embed_dims: Sequence[int], depths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.trunk = RepVitTrunk(embed_dims, depths, legacy=False, last_stride=1)
        self.neck = neck(embed_dims[-1], channels)

    def forward(self, image: Tensor) -> Tensor:
        embeddings: Tensor = self.neck(self.trunk(image)[-1])
        return embeddings


def build(recipe: Recipe) -> Sam:
    """Options: embed_dims and depths, one entry per stage (``repvit.RepVitTrunk``)."""
    given = options(recipe, "embed_dims", "depths")
    check_sizes(recipe, given["embed_dims"], given["depths"], multiple=STRIDE)
    return assemble(RepVitSamEncoder(**given, channels=recipe.geometry.embedding_channels), recipe)


ARCHITECTURE = Architecture(build, timm_names)
