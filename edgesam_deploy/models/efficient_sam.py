"""EfficientSAM (Xiong et al., "EfficientSAM: Leveraged Masked Image Pretraining for Efficient Segment Anything", 2023,
https://github.com/yformer/EfficientSAM): a plain ViT encoder and a decoder of its own.

The decoder is SAM's in outline and differs in all that follows: GELU in every perceptron, a self-attention whose
residual carries the position and is there in the first block too, a group norm between the two upscalings, no mask
input, no vector for background points, and prompts that are always filled up to six points. Tensor names are
upstream's, so its files load strictly and without a key map.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from functools import partial
from typing import Any, cast

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import PatchEmbed
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.contract import LABEL_BOX_BOTTOM_RIGHT, LABEL_BOX_TOP_LEFT, LABEL_FOREGROUND, LABEL_PADDING
from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.graphs import with_fused_norms
from edgesam_deploy.models.sam import options
from edgesam_deploy.recipe import Recipe

STRIDE = 16
# Patches along one side of the picture that the encoder was pretrained on; position embeddings are kept at that size.
PRETRAINED_SIDE = 224 // STRIDE
CANDIDATES = 3
# A prompt is cut or filled up to this many points; a box is two (decoder_max_num_input_points).
MAX_POINTS = 6
# Both coordinates of a point that fills up.
PADDING_COORDINATE = -1.0


class EfficientSamEncoder(nn.Module):
    """image (B,3,S,S) normalised float32 -> image_embeddings (B,C,S/16,S/16) float32."""

    def __init__(self, embed_dim: int, depth: int, num_heads: int, channels: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed((STRIDE, STRIDE), (STRIDE, STRIDE), in_chans=3, embed_dim=embed_dim)
        # One more than the patches: of the class token, which pretraining had.
        self.pos_embed = nn.Parameter(torch.zeros(1, PRETRAINED_SIDE**2 + 1, embed_dim))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        side = (patches.shape[1], patches.shape[2])
        tokens = (patches + positions(self.pos_embed, side)).flatten(1, 2)
        tokens = self.blocks(tokens)
        return cast(Tensor, self.neck(tokens.unflatten(1, side).permute(0, 3, 1, 2)))


def positions(pos_embed: Tensor, hw: tuple[int, int]) -> Tensor:
    """(1,P*P+1,C), the class token's first -> (1,H,W,C), resized bicubically (``get_abs_pos``)."""
    grid = pos_embed[:, 1:].reshape(1, PRETRAINED_SIDE, PRETRAINED_SIDE, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=hw, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


class PromptEncoder(nn.Module):
    """Points in the model frame -> one vector each. A background point (label 0) is its position alone: upstream has no
    vector for it and was not trained with it.
    """

    def __init__(self, channels: int, side: int, prompt_size: int) -> None:
        super().__init__()
        self.side, self.prompt_size = side, float(prompt_size)
        self.pe_layer = PositionEmbeddingRandom(channels // 2)
        self.invalid_points = nn.Embedding(1, channels)
        self.point_embeddings = nn.Embedding(1, channels)
        self.bbox_top_left_embeddings = nn.Embedding(1, channels)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, channels)

    def get_dense_pe(self) -> Tensor:
        """(1,C,E,E): the position of every cell of the image embedding."""
        return cast(Tensor, self.pe_layer((self.side, self.side)).unsqueeze(0))

    def forward(self, coords: Tensor, labels: Tensor) -> Tensor:
        """(B,N,2), (B,N) -> (B,N,C). + 0.5 moves from pixel corners to pixel centres."""
        embedding = self.pe_layer._pe_encoding((coords + 0.5) / self.prompt_size)
        for value, vector in (
            (LABEL_PADDING, self.invalid_points),
            (LABEL_FOREGROUND, self.point_embeddings),
            (LABEL_BOX_TOP_LEFT, self.bbox_top_left_embeddings),
            (LABEL_BOX_BOTTOM_RIGHT, self.bbox_bottom_right_embeddings),
        ):
            embedding = embedding + vector.weight * (labels == value).unsqueeze(-1).to(embedding.dtype)
        return cast(Tensor, embedding)


class AttentionBlock(TwoWayAttentionBlock):  # type: ignore[misc]  # segment_anything is untyped
    """SAM's block with another self-attention: the position goes into the values and the residual as well, and the
    first block has a residual too.
    """

    def __init__(self, channels: int, num_heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__(channels, num_heads, mlp_dim, skip_first_layer_pe=first)
        self.mlp: nn.Module = perceptron(channels, mlp_dim, channels)

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        if not self.skip_first_layer_pe:
            queries = queries + query_pe
        queries = self.norm1(queries + self.self_attn(q=queries, k=queries, v=queries))
        read = self.cross_attn_token_to_image(q=queries + query_pe, k=keys + key_pe, v=keys)
        queries = self.norm2(queries + read)
        queries = self.norm3(queries + self.mlp(queries))
        written = self.cross_attn_image_to_token(q=keys + key_pe, k=queries + query_pe, v=queries)
        return queries, self.norm4(keys + written)


class MaskDecoder(nn.Module):
    """image_embeddings (B,C,E,E) or (1,C,E,E), image_pe (1,C,E,E), sparse prompts (B,N,C) -> the three candidates:
    low_res_masks (B,3,4E,4E) and iou_predictions (B,3).

    Mask 0 has its token, which the others attend to, and its perceptron, which upstream loads and asks for nothing in
    its published use: it is kept so that checkpoints load whole, and not run.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        transformer = TwoWayTransformer(depth=0, embedding_dim=channels, num_heads=8, mlp_dim=2048)
        transformer.layers.extend(AttentionBlock(channels, 8, 2048, first=i == 0) for i in range(2))
        self.transformer = transformer
        self.iou_token = nn.Embedding(1, channels)
        self.mask_tokens = nn.Embedding(1 + CANDIDATES, channels)
        self.final_output_upscaling_layers = nn.Sequential(
            nn.Sequential(nn.ConvTranspose2d(channels, 64, 2, stride=2), nn.GroupNorm(1, 64), nn.GELU()),
            nn.Sequential(nn.ConvTranspose2d(64, 32, 2, stride=2), nn.Identity(), nn.GELU()),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            perceptron(channels, channels, channels, 32) for _ in range(1 + CANDIDATES)
        )
        self.iou_prediction_head = perceptron(channels, 256, 256, 1 + CANDIDATES)

    def forward(self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        learned = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([learned.unsqueeze(0).expand(sparse.shape[0], -1, -1), sparse], dim=1)
        attended, keys = self.transformer(image_embeddings, image_pe, tokens)
        upscaled = self.final_output_upscaling_layers(keys.transpose(1, 2).unflatten(2, image_embeddings.shape[-2:]))
        # Token 0 is of the predicted IoU, token 1 of mask 0.
        weights = [mlp(attended[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps) if i]
        masks = (torch.stack(weights, dim=1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return masks, self.iou_prediction_head(attended[:, 0])[:, 1:]


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them, named as upstream's ``MLPBlock``."""
    hidden = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths[:-1])]
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*hidden), fc=nn.Linear(widths[-2], widths[-1])))


class EfficientSam(nn.Module):
    """The container, whose children carry upstream's names."""

    def __init__(self, image_encoder: nn.Module, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder


class EfficientSamReference(nn.Module):
    """The decoder contract on the network's own modules; prompts are filled up as in upstream's ``predict_masks``."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image_embeddings: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        missing = MAX_POINTS - point_coords.shape[1]
        coords = F.pad(_padding_outside(point_coords, point_labels), (0, 0, 0, missing), value=PADDING_COORDINATE)
        labels = F.pad(point_labels, (0, missing), value=float(LABEL_PADDING))
        sparse = self.model.prompt_encoder(coords, labels)
        tiled = image_embeddings.expand(len(sparse), -1, -1, -1)
        masks, iou = self.model.mask_decoder(tiled, self.model.prompt_encoder.get_dense_pe(), sparse)
        return masks, iou


class EfficientSamDecoderGraph(nn.Module):
    """The same for export: filled up by a constant, the batch made by broadcasting."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        # Any: torch types every attribute of a Module as Tensor | Module.
        prompt_encoder: Any = model.prompt_encoder
        self.prompt_encoder: Any = with_fused_norms(prompt_encoder)
        self.mask_decoder: Any = with_fused_norms(cast(nn.Module, model.mask_decoder))
        self.register_buffer("image_pe", prompt_encoder.get_dense_pe().detach().clone())
        coords, labels = torch.full((1, 1, 2), PADDING_COORDINATE), torch.full((1, 1), float(LABEL_PADDING))
        self.register_buffer("padding", prompt_encoder(coords, labels).detach().clone())

    def forward(self, image_embeddings: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        given = self.prompt_encoder(_padding_outside(point_coords, point_labels), point_labels)
        padding = cast(Tensor, self.padding).expand(given.shape[0], MAX_POINTS, -1)
        sparse = torch.cat([given, padding], dim=1)[:, :MAX_POINTS]
        masks, iou = self.mask_decoder(image_embeddings, self.image_pe, sparse)
        return masks, iou


def _padding_outside(coords: Tensor, labels: Tensor) -> Tensor:
    """The contract's padding points are at (0, 0), upstream's at (-1, -1), and it counts where they are."""
    return torch.where((labels == LABEL_PADDING).unsqueeze(-1), PADDING_COORDINATE, coords)


def build(recipe: Recipe) -> EfficientSam:
    """Options: embed_dim, depth, num_heads of the encoder (``build_efficient_sam.py``)."""
    given, geometry = options(recipe, "embed_dim", "depth", "num_heads"), recipe.geometry
    if geometry.image_size != STRIDE * geometry.embedding_size:
        raise RecipeError(
            f"recipe {recipe.name}: EfficientSAM's encoder has a stride of {STRIDE}, so image_size must be "
            f"{STRIDE} * embedding_size = {STRIDE * geometry.embedding_size}, got {geometry.image_size}"
        )
    needed = {"mask_input": False, "num_masks": CANDIDATES, "max_points": MAX_POINTS}
    if any(getattr(geometry, name) != value for name, value in needed.items()):
        raise RecipeError(
            f"recipe {recipe.name}: EfficientSAM takes no mask as a prompt, at most {MAX_POINTS} points, and gives "
            f"{CANDIDATES} candidates: geometry needs mask_input = false, max_points = {MAX_POINTS} and num_masks = "
            f"{CANDIDATES}"
        )
    channels = geometry.embedding_channels
    return EfficientSam(
        EfficientSamEncoder(given["embed_dim"], given["depth"], given["num_heads"], channels),
        PromptEncoder(channels, geometry.embedding_size, geometry.prompt_size),
        MaskDecoder(channels),
    )


ARCHITECTURE = Architecture(build, decoder_graph=EfficientSamDecoderGraph, reference_decoder=EfficientSamReference)
