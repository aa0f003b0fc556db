"""EdgeSAM (Zhou et al. 2023, https://github.com/chongzhou96/EdgeSAM): SAM behind RepViT-M1, its last two stages fused.

Prompt encoder, mask decoder, pixels and prompts are SAM's: points (one padding point is added where there is no box),
boxes, both, and masks. Upstream's ``num_multimask_outputs`` of 1, 3 and 4 are mask 0, masks 1 to 3 and all of
``low_res_masks``. Its own ONNX decoder takes points only (a box as two points) and upscales bilinearly in the encoder,
because CoreML has no bicubic; the trained network and its Python predictor are bicubic. EdgeSAM did not distil the IoU
head, so ``iou_predictions`` say less than SAM's; upstream's exports offer the stability score at offset 1 instead,
which is a function of ``low_res_masks`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.repvit import RepVitTrunk, check_sizes, neck, timm_names
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.recipe import Recipe

UPSAMPLINGS = ("bicubic", "bilinear")


class EdgeSamEncoder(nn.Module):
    """image (B,3,S,S) normalised float32 -> image_embeddings (B,C,S/16,S/16) float32.

    The features at stride 32 are upscaled by 2 (``upsample``: bicubic or bilinear) and added to those at stride 16.
    """

    def __init__(self, embed_dims: Sequence[int], depths: Sequence[int], upsample: str, channels: int) -> None:
        super().__init__()
        self.upsample = upsample
        self.trunk = RepVitTrunk(embed_dims, depths, legacy=True, last_stride=2)
        self.fuse_stage2 = nn.Conv2d(embed_dims[2], channels, 1, bias=False)
        self.fuse_stage3 = nn.Conv2d(embed_dims[3], channels, 1, bias=False)
        self.neck = neck(channels, channels)

    def forward(self, image: Tensor) -> Tensor:
        *_, stride16, stride32 = self.trunk(image)
        up = F.interpolate(self.fuse_stage3(stride32), scale_factor=2, mode=self.upsample, align_corners=False)
        embeddings: Tensor = self.neck(self.fuse_stage2(stride16) + up)
        return embeddings


def build(recipe: Recipe) -> Sam:
    """Options: embed_dims and depths, one entry per stage (``repvit.RepVitTrunk``); upsample, bicubic or bilinear."""
    given = options(recipe, "embed_dims", "depths", "upsample")
    check_sizes(recipe, given["embed_dims"], given["depths"], multiple=32)
    if given["upsample"] not in UPSAMPLINGS:
        raise RecipeError(f"recipe {recipe.name}: upsample must be one of {UPSAMPLINGS}, got {given['upsample']!r}")
    return assemble(EdgeSamEncoder(**given, channels=recipe.geometry.embedding_channels), recipe)


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of ``edge_sam.pth`` and ``edge_sam_3x.pth`` -> ours."""
    theirs, ours = "image_encoder.fuse_stage3.op_list.0.", "image_encoder.fuse_stage3."
    return {name.replace(theirs, ours): tensor for name, tensor in timm_names(state).items()}


ARCHITECTURE = Architecture(build, published_names)
