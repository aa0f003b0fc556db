"""SAM 2 and 2.1 (Ravi et al. 2024, https://github.com/facebookresearch/sam2) as image models: what
``SAM2ImagePredictor`` runs, without the memory that follows an object through a video.

timm has the Hiera backbone, segment-anything the prompt encoder and all of the mask decoder but this: two finer feature
maps are added while the masks are upscaled, one more token (is the object in the frame?) is attended to, and the
predicted IoU passes through a sigmoid. Tensor names: ``sam2_names``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.mask_decoder import MLP
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.contract import LABEL_BOX_BOTTOM_RIGHT, LABEL_BOX_TOP_LEFT, STRETCH, Geometry
from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.graphs import DecoderGraph, EncoderGraph
from edgesam_deploy.models.sam import options
from edgesam_deploy.models.sam2_names import published_names
from edgesam_deploy.recipe import Recipe

# Strides of the backbone's four feature maps; image_embeddings have the third.
STRIDES = (4, 8, 16, 32)
# SAM2ImagePredictor clamps the logits that it returns, and so those that come back as mask_input.
MASK_INPUT_LIMIT = 32.0


class Hiera(HieraDet):
    """image (B,3,S,S) normalised float32 -> features (B,C_i,S/4,S/4), S/8, S/16 and S/32, finest first."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(num_classes=0, **sizes)
        self.reset_classifier(0, reset_other=True)
        # Only in the copy that is exported: the position embedding at the size of the image.
        self.register_buffer("folded", None, persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:  # type: ignore[override]
        return cast("list[Tensor]", self.forward_intermediates(image, intermediates_only=True))

    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(x) if self.folded is None else x + self.folded

    def fold_positions(self, side: int) -> None:
        """Interpolate and tile the position embedding once, for patches (B,side,side,C), instead of for every image."""
        with torch.no_grad():
            self.folded = super()._pos_embed(torch.zeros(1, side, side, self.patch_embed.proj.out_channels))


class FpnNeck(nn.Module):
    """Four feature maps, finest first -> (B,C,·,·) at strides 4, 8 and 16; only the last takes from the next coarser.

    Of upstream's ``FpnNeck`` as all published models set it up (fpn_top_down_levels [2, 3], scalp 1, nearest).
    """

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        # Upstream counts from the coarsest.
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(width, channels, 1))) for width in reversed(widths)
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse, coarsest = (c(f) for c, f in zip(reversed(self.convs), features, strict=True))
        return fine, middle, coarse + F.interpolate(coarsest, scale_factor=2.0, mode="nearest")


class Sam2ImageEncoder(nn.Module):
    """image (1,3,S,S) normalised float32 -> image_embeddings (1,C,E,E), high_res_feats_0 (1,C/8,4E,4E) and
    high_res_feats_1 (1,C/4,2E,2E).

    conv_s0, conv_s1: upstream's mask decoder owns them and its image encoder runs them, once per image.
    no_mem_embed: what stands for the memory where there is none (directly_add_no_mem_embed).
    """

    def __init__(self, trunk: nn.Module, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.neck = FpnNeck(widths, channels)
        self.conv_s0 = nn.Conv2d(channels, channels // 8, 1)
        self.conv_s1 = nn.Conv2d(channels, channels // 4, 1)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, channels))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = self.neck(self.trunk(image))
        return coarse + self.no_mem_embed.reshape(1, -1, 1, 1), self.conv_s0(fine), self.conv_s1(middle)


class Sam2PromptEncoder(PromptEncoder):  # type: ignore[misc]
    """SAM's, with the corners of a box among the points, as labels 2 and 3."""

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        embedded: Tensor = super()._embed_points(points, labels, pad)
        for label in (LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT):
            embedded[:, : labels.shape[1]][labels == label] += self.point_embeddings[label].weight
        return embedded


class Sam2MaskDecoder(MaskDecoder):  # type: ignore[misc]
    """SAM's, with the three additions of the module's docstring."""

    def __init__(self, geometry: Geometry) -> None:
        channels = geometry.embedding_channels
        transformer = TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=2048, num_heads=8)
        super().__init__(
            transformer_dim=channels, transformer=transformer, num_multimask_outputs=geometry.num_masks - 1
        )
        self.iou_prediction_head = MLP(channels, 256, geometry.num_masks, 3, sigmoid_output=True)
        self.obj_score_token = nn.Embedding(1, channels)

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        finer: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(1,C,E,E), (1,C,E,E), (B,N,C), (B,C,E,E), high_res_feats_0 and _1 -> (B,M,4E,4E), (B,M)."""
        learned = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        batch = len(sparse)
        tokens = torch.cat([learned.unsqueeze(0).expand(batch, -1, -1), sparse], dim=1)
        source = image_embeddings.repeat_interleave(batch, dim=0) + dense
        attended, keys = self.transformer(source, image_pe.repeat_interleave(batch, dim=0), tokens)
        upscaled = self.upscale(keys.transpose(1, 2).reshape(source.shape), finer)
        weights = [mlp(attended[:, 2 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.einsum("bmc,bchw->bmhw", torch.stack(weights, dim=1), upscaled)
        return masks, self.iou_prediction_head(attended[:, 1])

    def upscale(self, embedding: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """(B,C,E,E) -> (B,C/8,4E,4E), adding the finer maps before the norm and before the last activation."""
        first, norm, activation, second, last_activation = self.output_upscaling
        upscaled = activation(norm(first(embedding) + finer[1]))
        return cast(Tensor, last_activation(second(upscaled) + finer[0]))


class Sam2(nn.Module):
    """The three parts around any image encoder of this family's outputs."""

    def __init__(self, image_encoder: Sam2ImageEncoder, geometry: Geometry) -> None:
        super().__init__()
        side, frame = geometry.embedding_size, geometry.prompt_size
        self.image_encoder = image_encoder
        self.prompt_encoder = Sam2PromptEncoder(geometry.embedding_channels, (side, side), (frame, frame), 16)
        self.mask_decoder = Sam2MaskDecoder(geometry)


class MergedEncoder(nn.Module):
    """``Sam2ImageEncoder`` with everything worked out beforehand that does not depend on the image.

    On the two fine levels no nonlinearity stands between the neck's 1x1 convolution and conv_s0 or conv_s1: one
    convolution from the backbone to the few channels that the decoder takes does both, and the widest tensors of the
    encoder (C channels at stride 4) are never made. no_mem_embed is a bias.
    """

    def __init__(self, encoder: Sam2ImageEncoder, geometry: Geometry) -> None:
        super().__init__()
        self.trunk: Any = encoder.trunk
        if isinstance(self.trunk, Hiera):
            self.trunk.fold_positions(geometry.image_size // STRIDES[0])
        # Any: torch types every attribute of a Module as Tensor | Module.
        coarsest, coarse, middle, fine = (cast(Any, conv)[0] for conv in encoder.neck.convs)
        self.fine, self.middle = product(fine, encoder.conv_s0), product(middle, encoder.conv_s1)
        self.coarse, self.coarsest = coarse, coarsest
        with torch.no_grad():
            self.coarse.bias += encoder.no_mem_embed.flatten()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse, coarsest = self.trunk(image)
        top = F.interpolate(self.coarsest(coarsest), scale_factor=2.0, mode="nearest")
        return self.coarse(coarse) + top, self.fine(fine), self.middle(middle)


def product(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """The 1x1 convolution that does what ``first``, then ``second`` do."""
    merged = nn.Conv2d(first.in_channels, second.out_channels, 1)
    a, b = first.weight.double().flatten(1), second.weight.double().flatten(1)
    with torch.no_grad():
        merged.weight.copy_((b @ a)[:, :, None, None])
        merged.bias.copy_(b @ cast(Tensor, first.bias).double() + cast(Tensor, second.bias))  # type: ignore[union-attr]
    return merged


class Sam2EncoderGraph(EncoderGraph):
    """As ``EncoderGraph``, of the merged encoder."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self.image_encoder: Any = MergedEncoder(self.image_encoder, recipe.geometry)


class Sam2DecoderGraph(DecoderGraph):
    """The contract's variant "high-res"."""

    def forward(  # type: ignore[override]
        self,
        image_embeddings: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        decoder = self.mask_decoder
        sparse = self._embed_points(point_coords, point_labels)
        dense = self._embed_mask(mask_input.clamp(-MASK_INPUT_LIMIT, MASK_INPUT_LIMIT), has_mask_input)
        learned = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([learned.unsqueeze(0).expand(sparse.shape[0], -1, -1), sparse], dim=1)
        source = image_embeddings + dense
        attended, keys = decoder.transformer(source, self.image_pe, tokens)
        embedding = keys.transpose(1, 2).unflatten(2, source.shape[-2:])
        upscaled = decoder.upscale(embedding, (high_res_feats_0, high_res_feats_1))
        weights = [mlp(attended[:, 2 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        masks = (torch.stack(weights, dim=1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return masks, decoder.iou_prediction_head(attended[:, 1])


class Sam2ReferenceDecoder(nn.Module):
    """The decoder contract on the modules as the checkpoint has them."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        image_embeddings: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        prompt_encoder, mask_decoder = self.model.prompt_encoder, self.model.mask_decoder
        sparse = prompt_encoder._embed_points(point_coords, point_labels, pad=False)
        if bool(has_mask_input.any()):
            dense = prompt_encoder._embed_masks(mask_input.clamp(-MASK_INPUT_LIMIT, MASK_INPUT_LIMIT))
        else:
            absent = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            dense = absent.expand(len(sparse), -1, *prompt_encoder.image_embedding_size)
        finer = (high_res_feats_0, high_res_feats_1)
        masks, iou = mask_decoder.predict_masks(image_embeddings, prompt_encoder.get_dense_pe(), sparse, dense, finer)
        return masks, iou


def assemble(trunk: nn.Module, widths: Sequence[int], recipe: Recipe) -> Sam2:
    """``trunk`` ((1,3,S,S) -> four feature maps of ``widths`` channels, finest first) in front of SAM 2's heads."""
    geometry = recipe.geometry
    channels, side = geometry.embedding_channels, geometry.embedding_size
    wanted = {
        "image_size": STRIDES[2] * side,
        "resize": STRETCH,
        "high_res_channels": (channels // 8, channels // 4),
        "box_padding": True,
    }
    for name, value in wanted.items():
        if getattr(geometry, name) != value:
            raise RecipeError(
                f"recipe {recipe.name}: architecture '{recipe.architecture}' needs geometry.{name} = {value}, "
                f"got {getattr(geometry, name)}"
            )
    return Sam2(Sam2ImageEncoder(trunk, widths, channels), geometry)


def build(recipe: Recipe) -> Sam2:
    """The options have the names of upstream's YAML files."""
    given = options(
        recipe,
        "embed_dim",
        "num_heads",
        "stages",
        "global_att_blocks",
        "window_pos_embed_bkg_spatial_size",
        "window_spec",
    )
    given["global_pos_size"] = given.pop("window_pos_embed_bkg_spatial_size")
    trunk = Hiera(**given)
    return assemble(trunk, [info["num_chs"] for info in trunk.feature_info], recipe)


ARCHITECTURE = Architecture(
    build,
    published_names=published_names,
    encoder_graph=Sam2EncoderGraph,
    decoder_graph=Sam2DecoderGraph,
    reference_decoder=Sam2ReferenceDecoder,
)
