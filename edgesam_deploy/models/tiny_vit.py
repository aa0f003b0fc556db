"""TinyViT's building blocks, under the tensor names of its published checkpoints.

Written from the papers and the structure of the checkpoints: TinyViT (Wu et al., "TinyViT: Fast Pretraining
Distillation for Small Vision Transformers", ECCV 2022, https://github.com/microsoft/Cream/tree/main/TinyViT) and its
use as an image encoder in MobileSAM (Zhang et al. 2023, https://github.com/ChaoningZhang/MobileSAM).

Every block keeps feature maps as (B,C,H,W) float32, so no block has to be told its resolution; tokens exist only
between a window's partition and its reverse. Sizes are read from static shapes, nothing depends on data.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Sequential):
    """Convolution ``c`` without bias, then batch normalisation ``bn``: (B,C,H,W) -> (B,out,H/stride,W/stride)."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(c=conv, bn=nn.BatchNorm2d(out)))


class PatchEmbed(nn.Module):
    """image (B,3,S,S) -> (B,C,S/4,S/4) by two convolutions of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            ConvNorm(3, channels // 2, 3, stride=2), nn.GELU(), ConvNorm(channels // 2, channels, 3, stride=2)
        )

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.seq(image))


class MBConv(nn.Module):
    """Inverted bottleneck with a residual: (B,C,H,W) -> (B,C,H,W)."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = channels * expansion
        self.conv1 = ConvNorm(channels, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        return cast(Tensor, self.act(x + y))


class PatchMerging(nn.Module):
    """(B,C,H,W) -> (B,out,H/stride,W/stride), between two stages."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, out)
        self.conv2 = ConvNorm(out, out, 3, stride=stride, groups=out)
        self.conv3 = ConvNorm(out, out)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv3(self.act(self.conv2(self.act(self.conv1(x))))))


class Attention(nn.Module):
    """Multi-head attention inside windows of side w: (windows, w*w, C) -> (windows, w*w, C).

    attention_biases: (heads, w*w), one learned value per head and per offset (|dy|, |dx|), at |dy| * w + |dx|.
    The (heads, w*w, w*w) table that the logits need is gathered from it at each step in training. In eval mode it is
    a constant: gathered by ``eval()`` and again by ``load_state_dict``, so it is never older than the weights.
    """

    def __init__(self, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        self.register_buffer("bias_index", offset_index(window), persistent=False)
        self.register_buffer("bias_table", self._gather_bias().detach(), persistent=False)
        self.register_load_state_dict_post_hook(_refresh_bias)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Attention:
        super().train(mode)
        if not mode:
            self.bias_table = self._gather_bias().detach()
        return self

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens, channels = x.shape
        qkv = self.qkv(self.norm(x)).view(windows, tokens, self.num_heads, -1).transpose(1, 2)
        # Per head: q, k and v side by side, each (windows, heads, tokens, C/heads).
        q, k, v = qkv.chunk(3, dim=-1)
        bias = self._gather_bias() if self.training else self.bias_table
        logits = (q * self.scale) @ k.transpose(-2, -1) + bias
        y = logits.softmax(dim=-1) @ v
        return cast(Tensor, self.proj(y.transpose(1, 2).reshape(windows, tokens, channels)))

    def _gather_bias(self) -> Tensor:
        return self.attention_biases[:, cast(Tensor, self.bias_index)]


def offset_index(window: int) -> Tensor:
    """(w*w, w*w) int64: where the bias of two positions of a window stands in ``attention_biases``."""
    rows = torch.arange(window).repeat_interleave(window)
    columns = torch.arange(window).repeat(window)
    return (rows[:, None] - rows[None]).abs() * window + (columns[:, None] - columns[None]).abs()


def _refresh_bias(module: nn.Module, incompatible_keys: Any) -> None:
    """Runs after ``load_state_dict``, which fills attention_biases of a module that may be in eval mode already."""
    module.train(module.training)


class Mlp(nn.Module):
    """Pre-norm perceptron on the last axis: (..., C) -> (..., C)."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels * expansion)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(channels * expansion, channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(self.act(self.fc1(self.norm(x)))))


class TinyVitBlock(nn.Module):
    """Window attention, a depthwise convolution and a perceptron: (B,C,H,W) -> (B,C,H,W)."""

    def __init__(self, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(channels, num_heads, window)
        self.mlp = Mlp(channels)
        self.local_conv = ConvNorm(channels, channels, 3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_conv(x + self._attend(x))
        return x + cast(Tensor, self.mlp(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def _attend(self, x: Tensor) -> Tensor:
        """Attention in windows of side w; the map is padded with zeros, which are attended like any other token."""
        batch, channels, height, width = x.shape
        w = self.window
        x = F.pad(x, (0, -width % w, 0, -height % w))
        rows, columns = x.shape[2] // w, x.shape[3] // w
        x = x.reshape(batch, channels, rows, w, columns, w).permute(0, 2, 4, 3, 5, 1)
        x = self.attn(x.reshape(batch * rows * columns, w * w, channels))
        x = x.reshape(batch, rows, columns, w, w, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, channels, rows * w, columns * w)[:, :, :height, :width]


class Stage(nn.Module):
    """A row of ``blocks`` and, except after the last stage, a ``downsample``."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.downsample(self.blocks(x)))
