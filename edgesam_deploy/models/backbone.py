"""First weights of a student's encoder: those that its timm backbone learnt from ImageNet.

A backbone that knows images learns a teacher's embeddings in a fraction of the time that random weights take. timm
publishes the weights as huggingface.co/timm/NAME/resolve/main/model.safetensors, under its networks' own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.models.state_dict import read_state_dict
from edgesam_deploy.models.timm_fpn import TimmFpnEncoder
from edgesam_deploy.recipe import Recipe

# Of a pixel's 255 levels: what rounding in recipes may make of a mean or a deviation.
CLOSE = 0.5


def load_backbone(model: nn.Module, recipe: Recipe, path: Path) -> None:
    """Give the timm backbone of ``model``, which was built from ``recipe``, the weights in ``path``; all else stays.

    path: a state dict of the whole timm model, its classifier included or not. Raises InputError for a network without
    a timm backbone of full width, or one that is given other pixels than its backbone was taught; CheckpointError for
    a file that cannot be read as plain tensors, or of another network.
    """
    encoder = getattr(model, "image_encoder", None)
    if not isinstance(encoder, TimmFpnEncoder) or recipe.options.get("widths"):
        raise InputError(
            f"'{recipe.name}' has no timm backbone of full width, whose weights could be given: choose a student that "
            "was not pruned, or give weights of the whole network with --init"
        )
    name = str(recipe.options["backbone"])
    # Any: timm has no types.
    whole: Any = timm.create_model(name, pretrained=False)
    _check_pixels(whole.pretrained_cfg, recipe, name)
    state = _whole_state(whole, read_state_dict(path), path, name)
    # timm tells which of a model's tensors its features keep, and under which names.
    given = {"state_dict": state}
    features = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, features_only=True)
    encoder.backbone.load_state_dict(features.state_dict())


def _whole_state(whole: Any, found: Mapping[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of the timm model, from the file but for the classifier, which nothing here uses."""
    own: dict[str, Tensor] = whole.state_dict()
    heads = whole.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    wanted = {k: v for k, v in own.items() if not k.startswith(heads)} if heads else own
    kept = {k: v.float() if v.is_floating_point() else v for k, v in found.items() if k in wanted}
    extra = [k for k in found if k not in own]
    missing = [k for k in wanted if k not in kept and not k.endswith("num_batches_tracked")]
    shapes = [k for k, v in kept.items() if v.shape != own[k].shape]
    if problem := next(
        (
            f"{what} {names[0]} ({len(names)} of them)"
            for what, names in (("lacks", missing), ("holds besides", extra), ("has another shape of", shapes))
            if names
        ),
        None,
    ):
        raise CheckpointError(
            f"{path} is not timm's '{name}': it {problem}; get huggingface.co/timm/{name}'s model.safetensors, or save "
            "your own from timm.create_model"
        )
    if broken := [k for k, v in kept.items() if v.is_floating_point() and not torch.isfinite(v).all()]:
        raise CheckpointError(f"{path} is damaged: {broken[0]} holds inf or NaN ({len(broken)} such tensors)")
    return {**own, **kept}


def _check_pixels(taught: Mapping[str, Any], recipe: Recipe, name: str) -> None:
    """Raises InputError unless the recipe normalises pixels as the backbone was taught them."""
    for key, ours in (("mean", recipe.pixels.mean), ("std", recipe.pixels.std)):
        theirs = 255 * np.array(taught[key], float)
        if not np.allclose(theirs, ours, atol=CLOSE):
            raise InputError(
                f"timm's '{name}' was taught pixels of {key} {theirs.round(3).tolist()}, '{recipe.name}' gives it "
                f"{list(ours)}: write timm's mean and std into the recipe's [pixels]"
            )
