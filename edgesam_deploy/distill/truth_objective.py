"""What a network is to get right of true masks: those that boxes and clicks mean, and how good its own answers are.

Mask token 0 answers boxes and several clicks, tokens 1-3 (the best one learns) a single click, as SAM's do (Kirillov et
al. 2023, arXiv:2304.02643, appendix A).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.contract import LABEL_FOREGROUND, LABEL_PADDING
from edgesam_deploy.distill.options import FinetuneOptions
from edgesam_deploy.distill.teacher import encoder_of
from edgesam_deploy.distill.windows import FINE, cut_embeddings, cut_masks
from edgesam_deploy.errors import InputError
from edgesam_deploy.recipe import Recipe


class Losses(NamedTuple):
    """total: scalar to minimise. iou: mean IoU of the answers (mask 0, or the best of the others for a click)."""

    total: Tensor
    iou: Tensor


class TruthObjective(nn.Module):
    """images (B,3,S,S) uint8, point_coords (B,P,N,2) in pixels of the view, point_labels (B,P,N), masks (B,P,S,S) bool,
    targets (B,P,m,m) in 0..1, windows (B,P,3) int64 as in ``windows.draw_windows`` and shapes (B,) bool, float32 where
    not said otherwise -> (loss, mean IoU).

    Raises InputError for a network whose decoder is not SAM's own.
    """

    metric = "iou"

    def __init__(self, model: nn.Module, recipe: Recipe, options: FinetuneOptions) -> None:
        super().__init__()
        decoder, geometry = getattr(model, "mask_decoder", None), recipe.geometry
        if type(decoder) is not MaskDecoder or geometry.prompt_size != geometry.image_size:
            raise InputError(
                f"'{recipe.name}' does not have SAM's own mask decoder with prompts in the frame of its input, which "
                "fine-tuning needs: choose reference, mobile_sam, sam_vit_* or a student"
            )
        self.sam = cast(Sam, model)
        self.encoder: Any = encoder_of(model, recipe)
        self.options = options

    def forward(
        self,
        images: Tensor,
        coords: Tensor,
        labels: Tensor,
        masks: Tensor,
        targets: Tensor,
        windows: Tensor,
        shapes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        image = torch.arange(len(images), device=images.device).repeat_interleave(coords.shape[1])
        coords, labels, masks, targets, windows = (t.flatten(0, 1) for t in (coords, labels, masks, targets, windows))
        with self._autocast(images):
            # Shapes have nothing to do with the image: the encoder must not learn from them.
            with torch.set_grad_enabled(not bool(shapes.any()) and torch.is_grad_enabled()):
                embeddings = self.encoder(images)
            resize(self.sam, images, embeddings)
            parts = []
            for side in sorted(set(windows[:, 0].tolist())):
                rows = (windows[:, 0] == side).nonzero()[:, 0]
                sparse, around = embed_prompts(self.sam, coords[rows], labels[rows]), windows[rows]
                low, scores = decode(self.sam, embeddings, sparse, image[rows], around)
                truth = cut_masks((masks if side <= FINE else targets)[rows], around, embeddings.shape[-1]).float()
                parts.append((len(rows), losses(low, scores, truth, labels[rows])))
        total, iou = (sum(n * found[i] for n, found in parts) / len(image) for i in range(2))
        return cast(Tensor, total), cast(Tensor, iou)

    def answer(self, images: Tensor, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """coords (B*P,N,2), labels (B*P,N) -> low_res_masks (B*P,M,m,m) float32, iou_predictions (B*P,M) float32."""
        with self._autocast(images):
            embeddings = self.encoder(images)
            resize(self.sam, images, embeddings)
            masks, scores = decode(self.sam, embeddings, embed_prompts(self.sam, coords, labels))
        return masks.float(), scores.float()

    def _autocast(self, images: Tensor) -> torch.autocast:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.amp)
        return torch.autocast(images.device.type, kind, enabled=kind is not None)


def resize(sam: Sam, images: Tensor, embeddings: Tensor) -> None:
    """Take prompts of (B,3,S,S) images, whose embeddings are (B,C,E,E). The weights do not depend on the size; only
    these do."""
    sam.prompt_encoder.input_image_size = (images.shape[-2], images.shape[-1])
    sam.prompt_encoder.image_embedding_size = (embeddings.shape[-2], embeddings.shape[-1])


def embed_prompts(sam: Sam, coords: Tensor, labels: Tensor) -> Tensor:
    """point_coords (B,N,2) in the frame of the prompt encoder, point_labels (B,N) -> sparse embeddings (B,N,C).

    segment-anything's encoder takes boxes and points apart; this takes the labels of the exported decoder.
    """
    encoder = sam.prompt_encoder
    with _float32(coords):
        embedded: Tensor = encoder.pe_layer.forward_with_coords(coords + 0.5, encoder.input_image_size)
    embedded = embedded * (labels != LABEL_PADDING).unsqueeze(-1)
    for label, table in enumerate([encoder.not_a_point_embed, *encoder.point_embeddings], start=LABEL_PADDING):
        embedded = embedded + (labels == label).unsqueeze(-1) * table.weight
    return embedded


def decode(
    sam: Sam, embeddings: Tensor, sparse: Tensor, image: Tensor | None = None, windows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """image_embeddings (I,C,E,E), sparse (n,N,C) -> low_res_masks (n,M,4w,4w), iou_predictions (n,M).

    segment-anything's ``predict_masks`` for several images at once. image: (n,) number of each prompt's; by default
    every image has the same number of prompts. windows: (n,3), the part that is decoded, all of one side w; by default
    the whole, w = E.
    """
    decoder, count, cells = sam.mask_decoder, len(sparse), embeddings.shape[-1]
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(count, -1, -1), sparse], dim=1)
    source = embeddings + sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).to(embeddings.dtype)
    with _float32(source):
        position = sam.prompt_encoder.get_dense_pe().to(source.dtype)
    if image is None:
        image = torch.arange(len(embeddings), device=source.device).repeat_interleave(count // len(embeddings))
    if windows is None:
        windows = image.new_tensor([[cells, 0, 0]]).expand(count, 3)
    source, position = (
        cut_embeddings(each, which, windows) for each, which in ((source, image), (position, torch.zeros_like(image)))
    )
    hidden, source = decoder.transformer(source, position, tokens)
    weights = torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=2)
    return upscale(decoder.output_upscaling, source, weights), decoder.iou_prediction_head(hidden[:, 0])


def _float32(like: Tensor) -> torch.autocast:
    """No autocast: bfloat16 keeps eight bits of a coordinate, which is two pixels of 512."""
    return torch.autocast(like.device.type, enabled=False)


def upscale(layers: nn.Sequential, source: Tensor, weights: Tensor) -> Tensor:
    """source (B,E*E,C), mask weights (B,C/8,M) -> masks (B,M,4E,4E).

    The two transposed convolutions do not overlap, so each is a matrix product per pixel; with the channels last that
    is faster on a CPU, and LayerNorm is one fused call.
    """
    norm, activation = layers[1], layers[2]
    batch, area, masks, x = *source.shape[:2], weights.shape[2], source
    for convolution in (layers[0], layers[3]):
        if not isinstance(convolution, nn.ConvTranspose2d) or convolution.bias is None:
            raise TypeError(f"expected segment-anything's upscaling, found {convolution}")
        kernel = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
        x = F.linear(x, kernel, convolution.bias.repeat(4)).reshape(batch, -1, convolution.out_channels)
        if convolution is layers[0]:
            x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
        x = activation(x)
    side = math.isqrt(area)
    logits = (x @ weights).reshape(batch, side, side, 2, 2, 2, 2, masks)
    # (row, column) of the embedding, then of the two sub-pixel steps.
    return logits.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(batch, masks, 4 * side, 4 * side)


def enlarge(masks: Tensor, size: int) -> Tensor:
    """low_res_masks (n,M,m,m) -> (n,M,size,size), as a caller enlarges them."""
    if masks.shape[-1] == size:
        return masks
    return F.interpolate(masks, (size, size), mode="bilinear", align_corners=False)


def losses(masks: Tensor, scores: Tensor, targets: Tensor, labels: Tensor) -> Losses:
    """masks (B,M,m,m) logits, scores (B,M), targets (B,H,H) in 0..1, H = m or a multiple, then the masks are enlarged;
    point_labels (B,N)."""
    step = targets.shape[-1] // masks.shape[-1]
    masks, target = enlarge(masks.float(), targets.shape[-1]), targets.unsqueeze(1)
    pixels = F.binary_cross_entropy_with_logits(masks, target.expand_as(masks), reduction="none")
    probability = masks.sigmoid()
    overlap = 2 * (probability * target).sum((2, 3))
    dice = 1 - (overlap + step**2) / (probability.sum((2, 3)) + target.sum((2, 3)) + step**2)
    mask_loss = 2 * (pixels * pixel_weights(targets, step).unsqueeze(1)).sum((2, 3)) + dice
    with torch.no_grad():
        predicted, truth = masks > 0, target > 0.5
        iou = (predicted & truth).sum((2, 3)) / (predicted | truth).sum((2, 3)).clamp_min(1)
    single, (best, index) = mask_loss[:, 0], mask_loss[:, 1:].min(1)
    is_click = ((labels >= 0).sum(1) == 1) & (labels == LABEL_FOREGROUND).any(1)
    # The other answer learns too, at a quarter: it must be usable when a caller asks for it.
    chosen = torch.where(is_click, best + 0.25 * single, single + 0.25 * best)
    answer = torch.where(is_click, iou[:, 1:].gather(1, index[:, None]).squeeze(1), iou[:, 0])
    return Losses(chosen.mean() + F.mse_loss(scores.float(), iou), answer.mean())


def pixel_weights(targets: Tensor, step: int) -> Tensor:
    """Weights (B,H,W) of the cross-entropy, sum 1: 0.7 on the object's widened box, 0.3 on the rest of the view. step:
    pixels that it is wider on each side, beside a quarter of its own.

    Plain averaging would give a small object a thousandth of the loss.
    """
    near = torch.ones_like(targets)
    for axis in (1, 2):
        line = (targets > 0).any(3 - axis).float()
        length = line.shape[1]
        low, high = line.argmax(1), length - 1 - line.flip(1).argmax(1)
        margin, index = step + (high - low) // 4, torch.arange(length, device=targets.device)
        inside = (index >= (low - margin)[:, None]) & (index <= (high + margin)[:, None])
        near = near * inside.unsqueeze(3 - axis)
    far = 1 - near
    near_sum, far_sum = (part.sum((1, 2), keepdim=True).clamp_min(1) for part in (near, far))
    return 0.7 * near / near_sum + 0.3 * far / far_sum
