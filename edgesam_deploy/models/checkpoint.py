"""Checkpoints: fetch, hash, load strictly under upstream's own key names."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgesam_deploy.download import fetch
from edgesam_deploy.errors import CheckpointError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.models import build_model
from edgesam_deploy.recipe import PACKAGE, Recipe

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def checkpoint_path(recipe: Recipe) -> Path:
    """The recipe's own checkpoint as a local file with the right sha256: packaged, cached, or downloaded now."""
    source = recipe.checkpoint
    if source.url is not None and source.sha256 is not None:
        return fetch(source.url, source.sha256, source.size_bytes)
    if source.file is None:
        raise CheckpointError(f"recipe {recipe.name} has no published weights: give yours with --checkpoint FILE")
    path = PACKAGE / source.file
    if not path.is_file():
        raise CheckpointError(f"the packaged checkpoint {path} is missing; install edgesam-deploy again")
    found = sha256_file(path)
    if found != source.sha256:
        raise CheckpointError(
            f"the packaged checkpoint {path} was altered: expected sha256 {source.sha256}, found {found}; "
            "install edgesam-deploy again"
        )
    return path


def load_model(recipe: Recipe, checkpoint: Path) -> Sam:
    """The recipe's network with the weights of ``checkpoint``, float32, eval mode.

    Raises CheckpointError if the file cannot be read as plain tensors, or if any tensor is missing, left over, of
    another shape or not finite. Nothing but tensors is unpickled (``weights_only=True``).
    """
    state = read_state_dict(checkpoint)
    model = build_model(recipe)
    _check_keys(model.state_dict(), state, checkpoint, recipe)
    broken = sorted(k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all())
    if broken:
        # A BatchNorm variance that overflowed in float16 is enough: the embedding then ignores the image.
        raise CheckpointError(
            f"{checkpoint} is damaged: {len(broken)} tensors hold inf or NaN, the first is {broken[0]}. Save it again "
            "in float32, or get it from its publisher"
        )
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .pt or .pth file, on the CPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was pickled; what it holds is checked below
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds Python objects or code besides tensors, or is not a PyTorch checkpoint; "
            "expected a state dict saved with torch.save(model.state_dict(), path)"
        ) from error
    except (  # what torch.load lets through, by what a damaged or foreign file makes it trip over
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is not a readable PyTorch checkpoint (truncated?): {reason}") from error
    if (
        not isinstance(loaded, Mapping)
        or not loaded
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items())
    ):
        raise CheckpointError(f"{path} must hold a state dict (tensor names to tensors), holds {_describe(loaded)}")
    return dict(loaded)


def _check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, recipe: Recipe) -> None:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    shapes = [
        f"{k} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    problems = [
        f"{len(items)} {what} ({items[0]}{', …' if len(items) > 1 else ''})"
        for what, items in (("missing", missing), ("unexpected", extra), ("misshapen", shapes))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit recipe '{recipe.name}': {'; '.join(problems)} of {len(expected)} tensors. "
            "Give the checkpoint of this model, or the recipe of this checkpoint"
        )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with keys {sorted(map(str, value))[:4]}"
    return type(value).__name__
