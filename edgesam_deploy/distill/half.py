"""Weights in float16, as the shipped ones are: half the size, and the same masks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from edgesam_deploy.errors import CheckpointError
from edgesam_deploy.models.timm_fpn import TimmFpnEncoder

MAX_VARIANCE = 4096.0


@torch.no_grad()
def half_precision(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, floating tensors as float16. Raises CheckpointError if one does not fit.

    The neck's inputs are not normalised, so the variance in a BatchNorm behind it can pass float16's 65504; as inf, it
    makes the embedding ignore the image. Halving a convolution quarters the variance and changes nothing else.
    """
    rescaled = copy.deepcopy(model)
    encoder = getattr(rescaled, "image_encoder", None)
    if isinstance(encoder, TimmFpnEncoder):
        # Any: torch types a module's buffers as Tensor | Module.
        pairs: list[tuple[Any, Any]] = [(encoder.fuse[i], encoder.fuse[i + 1]) for i in (0, 3)]
        for convolution, norm in pairs:
            while torch.isfinite(norm.running_var).all() and norm.running_var.max() > MAX_VARIANCE:
                convolution.weight /= 2
                norm.running_mean /= 2
                norm.running_var /= 4
    weights = {k: v.half() if v.is_floating_point() else v for k, v in rescaled.state_dict().items()}
    broken = [k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise CheckpointError(
            f"the trained weights do not fit float16: {len(broken)} tensors hold inf or NaN, the first is {broken[0]}; "
            "write them without --half"
        )
    return weights
