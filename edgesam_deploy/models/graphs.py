"""The two modules that are exported: SAM's parts rearranged so that the graph is one TensorRT accepts.

Numerically they are segment-anything's ``ImageEncoder`` behind ``Sam.preprocess`` and its ``PromptEncoder`` plus
``MaskDecoder``; what differs is only how the same sums are written (no ``repeat_interleave``, no original size, one
fused LayerNormalization per norm).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.contract import LABEL_PADDING, LONGEST_SIDE
from edgesam_deploy.recipe import Recipe


class FusedLayerNorm2d(nn.Module):
    """SAM's channels-first LayerNorm2d as transpose, LayerNormalization, transpose.

    (B,C,H,W) -> (B,C,H,W). Written out as mean, power and division it overflows in FP16; ONNX has one node for it.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class EncoderGraph(nn.Module):
    """image (1,3,S,S) uint8 RGB -> what image_encoder gives, float32; the normalisation is part of the graph.

    image_encoder: (1,3,S,S) normalised float32 -> image_embeddings, or that and the finer maps of the contract.
    Branches that are parallel only for training's sake (RepVGG, RepViT) are merged.

    SAM pads with 0 after normalising. uint8 padding can only be the rounded mean, up to 0.008 off, which moves masks
    of padded pictures (mask IoU 0.994 to 0.999). So that value is read as the mean itself: padding is exactly 0, and a
    real pixel of that value moves by less than half a grey level.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        encoder = with_fused_norms(cast(nn.Module, model.image_encoder))
        # Any: torch types every attribute of a Module as Tensor | Module.
        self.image_encoder: Any = reparameterize_model(encoder, inplace=True)
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (recipe.pixels.mean, recipe.pixels.std))
        self.padded = recipe.geometry.resize == LONGEST_SIDE
        self.register_buffer("scale", 1.0 / std)
        self.register_buffer("shift", -mean / std)
        self.register_buffer("padding", mean.round())

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        pixels = image.to(torch.float32)
        normalised = pixels * cast(Tensor, self.scale) + cast(Tensor, self.shift)
        if self.padded:
            normalised = torch.where(pixels == cast(Tensor, self.padding), 0.0, normalised)
        return cast("Tensor | tuple[Tensor, ...]", self.image_encoder(normalised))


class DecoderGraph(nn.Module):
    """SAM's prompt encoder and mask decoder; inputs, outputs and frames as in ``contract.decoder_contract``.

    Without the two mask inputs it is the contract's variant "points".
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        prompt_encoder: Any = with_fused_norms(cast(nn.Module, model.prompt_encoder))
        self.prompt_encoder: Any = prompt_encoder
        self.mask_decoder: Any = with_fused_norms(cast(nn.Module, model.mask_decoder))
        self.prompt_size = float(recipe.geometry.prompt_size)
        self.register_buffer("image_pe", prompt_encoder.get_dense_pe().detach().clone())

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor | None = None,
        has_mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        sparse = self._embed_points(point_coords, point_labels)
        dense = self._embed_mask(mask_input, has_mask_input)
        return self._predict_masks(image_embeddings + dense, sparse)

    def _embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """(B,N,2), (B,N) -> (B,N,C): Fourier features of the position plus a learned vector per label."""
        encoder = self.prompt_encoder
        # + 0.5 moves from pixel corners to pixel centres (PromptEncoder._embed_points).
        features = encoder.pe_layer._pe_encoding((coords + 0.5) / self.prompt_size)
        label = labels.unsqueeze(-1)
        is_padding = (label == LABEL_PADDING).to(features.dtype)
        embedding = features * (1.0 - is_padding) + encoder.not_a_point_embed.weight * is_padding
        for value, vector in enumerate(encoder.point_embeddings):
            embedding = embedding + vector.weight * (label == value).to(features.dtype)
        return cast(Tensor, embedding)

    def _embed_mask(self, mask_input: Tensor | None, has_mask_input: Tensor | None) -> Tensor:
        """(B,1,4E,4E), (1,) -> (B,C,E,E); without a mask, one learned vector everywhere."""
        encoder = self.prompt_encoder
        absent = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        if mask_input is None or has_mask_input is None:
            return cast(Tensor, absent)
        given = encoder.mask_downscaling(mask_input)
        return cast(Tensor, has_mask_input * given + (1.0 - has_mask_input) * absent)

    def _predict_masks(self, source: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """``MaskDecoder.predict_masks`` with the batch made by broadcasting instead of ``repeat_interleave``."""
        decoder = self.mask_decoder
        learned = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([learned.unsqueeze(0).expand(sparse.shape[0], -1, -1), sparse], dim=1)
        attended, keys = decoder.transformer(source, self.image_pe, tokens)
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, source.shape[-2:]))
        weights = torch.stack(
            [mlp(attended[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
        )
        masks = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return masks, decoder.iou_prediction_head(attended[:, 0])


def with_fused_norms(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in which every LayerNorm2d is a FusedLayerNorm2d with the same weights."""
    copied = copy.deepcopy(module)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LayerNorm2d):
                setattr(parent, name, FusedLayerNorm2d(child))
    return copied
