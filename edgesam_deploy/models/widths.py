"""Widths of a network's layers: what a pruned network is built from, where it differs from the one it was cut from.

[model.widths]
"backbone.stem.stem1.conv" = [3, 8, 1]    # Conv2d: channels in, channels out, groups
"backbone.stem.stem1.bn" = [8]            # BatchNorm2d: channels
"head" = [64, 32]                         # Linear: features in, features out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from edgesam_deploy.errors import RecipeError

Width = tuple[int, ...]


def widths(module: nn.Module) -> dict[str, Width]:
    """Of every layer of ``module`` that can be given another width, by name."""
    return {name: width for name, layer in module.named_modules() if (width := _width(layer))}


def resize(module: nn.Module, wanted: Any) -> None:
    """Give the layers named in ``wanted``, a table of widths, new widths and initial weights; all else stays theirs.

    In place: stride, padding, activation and class of a layer are kept. Raises RecipeError for what is no table of
    widths, for a layer that is not there and for a width that it cannot have.
    """
    if not isinstance(wanted, Mapping):
        raise RecipeError(f"[model] widths must be a table of layers and their widths, got {wanted!r}")
    layers = dict(module.named_modules())
    for name, width in wanted.items():
        layer = layers.get(name)
        if layer is None or not (own := _width(layer)):
            raise RecipeError(
                f"[model.widths] names '{name}', which is no Conv2d, BatchNorm2d or Linear of the encoder"
            )
        if (
            not isinstance(width, list | tuple)
            or len(width) != len(own)
            or not all(type(n) is int and n > 0 for n in width)
            or (len(width) == 3 and (width[0] % width[2] or width[1] % width[2]))
        ):
            raise RecipeError(
                f"[model.widths] '{name}' must be {len(own)} positive integers such as {list(own)}, got {width!r}"
            )
        _resize(layer, tuple(width))


def _width(layer: nn.Module) -> Width:
    """() for a layer that has none."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, layer.groups
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.BatchNorm2d):
        return (layer.num_features,)
    return ()


def _resize(layer: nn.Module, width: Width) -> None:
    if isinstance(layer, nn.Conv2d):
        layer.in_channels, layer.out_channels, layer.groups = width
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        layer.weight = nn.Parameter(layer.weight.new_empty(shape))
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = width
        layer.weight = nn.Parameter(layer.weight.new_empty(layer.out_features, layer.in_features))
    else:
        assert isinstance(layer, nn.BatchNorm2d)
        (layer.num_features,) = width
        for name in ("running_mean", "running_var"):
            if (buffer := getattr(layer, name)) is not None:
                setattr(layer, name, buffer.new_empty(width))
        if layer.weight is not None:
            layer.weight = nn.Parameter(layer.weight.new_empty(width))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(width[1] if len(width) > 1 else width[0]))
    layer.reset_parameters()
