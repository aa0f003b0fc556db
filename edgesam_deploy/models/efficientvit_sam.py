"""EfficientViT-SAM (Zhang et al. 2024, https://github.com/mit-han-lab/efficientvit): SAM behind EfficientViT.

The blocks are timm's, under the names that upstream gives their tensors; upstream's ``op_list`` level is left out
(``published_names``). Two constants of theirs are not upstream's and are set here: upstream divides by the attention's
sum plus 1e-15, and gives every LayerNorm and BatchNorm an eps of 1e-6, those of SAM's mask decoder too
(``sam_model_zoo.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from timm.layers import GELUTanh
from timm.models.efficientvit_mit import ConvBlock, ConvNormAct, FusedMBConv, LiteMLA, MBConv, ResidualBlock
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.recipe import Recipe

NORM_EPS = 1e-6
ATTENTION_EPS = 1e-15
HEAD_CHANNELS = 32
# The neck joins the maps of this many last stages.
TAPS = 3
NECK_CHANNELS = 256
# A stage that halves the map expands this many times more than the blocks that follow.
DOWNSAMPLING_EXPANSION = 4

# Kinds of blocks by upstream's names, with the number of their convolutions; and the one with attention.
_BLOCKS: dict[str, tuple[Any, int]] = {"res": (ConvBlock, 2), "fmb": (FusedMBConv, 2), "mb": (MBConv, 3)}
ATTENTION = "att"

# Any: timm wants a class here, and takes what makes one.
_Norm: Any = partial(nn.BatchNorm2d, eps=NORM_EPS)


class LinearAttention(nn.Module):
    """ReLU linear attention: qkv (B,3C,H,W), heads of q, k and v side by side -> (B,C,H,W).

    A module of its own, so that a recipe can name its nodes: the sum over all H*W positions leaves FP16, and so does
    ``ATTENTION_EPS`` at the other end, after which 0 / 0 is NaN. Upstream computes it in float32 whatever the rest is.
    """

    def forward(self, qkv: Tensor) -> Tensor:
        batch, _, height, width = qkv.shape
        heads = qkv.reshape(batch, -1, 3 * HEAD_CHANNELS, height * width)
        # As (B,heads,channels,positions) neither q nor v is transposed, unlike in timm's order of the same products.
        q, k, v = heads.chunk(3, dim=2)
        ones = torch.ones_like(v[:, :, :1])
        weighted = torch.cat([v, ones], dim=2) @ F.relu(k).transpose(2, 3)
        out = weighted @ F.relu(q)
        out = out[:, :, :-1] / (out[:, :, -1:] + ATTENTION_EPS)
        return out.reshape(batch, -1, height, width)


class MultiScaleAttention(LiteMLA):
    """timm's LiteMLA with its products in ``LinearAttention``: (B,C,H,W) -> (B,C,H,W).

    q, k and v are attended as they are and once more after a grouped convolution of side ``kernel``.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(
            channels, channels, dim=HEAD_CHANNELS, norm_layer=(None, _Norm), scales=(kernel,), eps=ATTENTION_EPS
        )
        self.attention = LinearAttention()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(aggregate(qkv) for aggregate in self.aggreg)], dim=1)
        return cast(Tensor, self.proj(self.attention(scales)))


class EfficientVitBlock(nn.Module):
    """Attention, then an inverted bottleneck, each with a residual: (B,C,H,W) -> (B,C,H,W)."""

    def __init__(self, channels: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.context_module = ResidualBlock(MultiScaleAttention(channels, kernel), nn.Identity())
        self.local_module = ResidualBlock(_local_block("mb", channels, channels, 1, expansion, True), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.local_module(self.context_module(x)))


class Backbone(nn.Module):
    """image (B,3,S,S) -> the maps of the last ``TAPS`` stages, finest first; stage i has stride 2^(i+1)."""

    def __init__(self, stages: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [image]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[-TAPS:]


class Neck(nn.Module):
    """Maps of ``widths`` channels, coarsest first -> (B,C,E,E): brought to side E, added up and refined."""

    def __init__(self, widths: Sequence[int], depth: int, expansion: int, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.input_ops = nn.ModuleList(
            nn.Sequential(ConvNormAct(width, NECK_CHANNELS, 1, norm_layer=_Norm, act_layer=None)) for width in widths
        )
        self.middle = nn.Sequential(
            *(
                ResidualBlock(_local_block("fmb", NECK_CHANNELS, NECK_CHANNELS, 1, expansion, False), nn.Identity())
                for _ in range(depth)
            )
        )
        last = ConvNormAct(NECK_CHANNELS, channels, 1, bias=True, norm_layer=None, act_layer=None)
        self.output_ops = nn.ModuleList([nn.Sequential(last)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        coarse, middle, fine = (self._resize(project(x)) for project, x in zip(self.input_ops, maps, strict=True))
        return cast(Tensor, self.output_ops[0](self.middle(coarse + (middle + fine))))

    def _resize(self, x: Tensor) -> Tensor:
        size = (self.side, self.side)
        return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bicubic", align_corners=False)


class EfficientVitSamEncoder(nn.Module):
    """image (B,3,S,S) normalised float32 -> image_embeddings (B,C,E,E) float32."""

    def __init__(self, backbone: Backbone, neck: Neck, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.norm = LayerNorm2d(channels, eps=NORM_EPS)

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.neck(self.backbone(image)[::-1])))


def build(recipe: Recipe) -> Sam:
    """Options, one entry per stage: widths, depths, blocks ("res", "fmb", "mb" or "att"), expansions, fewer_norms;
    and attention_kernel, neck_depth, neck_expansion: the arguments in upstream's ``sam.py`` and ``backbone.py``.
    """
    per_stage = ("widths", "depths", "blocks", "expansions", "fewer_norms")
    given = options(recipe, *per_stage, "attention_kernel", "neck_depth", "neck_expansion")
    lengths = {name: len(given[name]) for name in per_stage}
    if len(set(lengths.values())) != 1 or lengths["widths"] <= TAPS:
        raise RecipeError(
            f"recipe {recipe.name}: {', '.join(per_stage)} must have one entry per stage, {TAPS + 1} stages at least, "
            f"got {lengths}"
        )
    if unknown := sorted(set(given["blocks"]) - {*_BLOCKS, ATTENTION}):
        raise RecipeError(
            f"recipe {recipe.name}: blocks must be of {', '.join([*_BLOCKS, ATTENTION])}, got {unknown[0]!r}"
        )
    geometry, widths = recipe.geometry, given["widths"]
    stages = [_stage(given, index, previous) for index, previous in zip(range(len(widths)), [3, *widths], strict=False)]
    neck = Neck(
        widths[: -TAPS - 1 : -1],
        given["neck_depth"],
        given["neck_expansion"],
        geometry.embedding_channels,
        geometry.embedding_size,
    )
    sam = assemble(EfficientVitSamEncoder(Backbone(stages), neck, geometry.embedding_channels), recipe)
    for module in sam.mask_decoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = NORM_EPS
    return sam


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's state dict under our names: its sequences keep their entries in an ``op_list``."""
    return {name.replace(".op_list.", "."): tensor for name, tensor in state.items()}


def _stage(given: Mapping[str, Any], index: int, previous: int) -> list[nn.Module]:
    """The blocks of one stage; the first halves the map and has no residual."""
    width, kind = given["widths"][index], given["blocks"][index]
    expansion, fewer_norms = given["expansions"][index], given["fewer_norms"][index]
    first: nn.Module = ConvNormAct(previous, width, 3, stride=2, norm_layer=_Norm, act_layer=GELUTanh)
    if index:
        wider = expansion * DOWNSAMPLING_EXPANSION
        # A residual without a shortcut only keeps upstream's tensor names.
        first = ResidualBlock(
            _local_block("fmb" if kind == "fmb" else "mb", previous, width, 2, wider, fewer_norms), None
        )
    if kind == ATTENTION:
        rest = [EfficientVitBlock(width, expansion, given["attention_kernel"]) for _ in range(given["depths"][index])]
        return [first, *rest]
    return [
        first,
        *(
            ResidualBlock(_local_block(kind, width, width, 1, expansion, fewer_norms), nn.Identity())
            for _ in range(given["depths"][index])
        ),
    ]


def _local_block(kind: str, channels: int, out: int, stride: int, expansion: int, fewer_norms: bool) -> nn.Module:
    """A convolutional block. fewer_norms: biases take the place of all norms but the last."""
    block, convolutions = _BLOCKS[kind]
    before = convolutions - 1
    built: nn.Module = block(
        channels,
        out,
        stride=stride,
        expand_ratio=expansion,
        use_bias=(fewer_norms,) * before + (False,),
        norm_layer=(None if fewer_norms else _Norm,) * before + (_Norm,),
        act_layer=(GELUTanh,) * before + (None,),
    )
    return built


ARCHITECTURE = Architecture(build=build, published_names=published_names)
