"""Checkpoints: find or fetch, hash, join where published in parts, load strictly under the network's names."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgesam_deploy.download import NO_CONSENT, Consent, cache_folder, fetch
from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.files import sha256_bytes, sha256_file, write_bytes
from edgesam_deploy.models import architecture, build_model
from edgesam_deploy.models.state_dict import read_state_dict
from edgesam_deploy.recipe import PACKAGE, Recipe


def checkpoint_path(recipe: Recipe, consent: Consent = NO_CONSENT) -> Path:
    """The recipe's own checkpoint as a local file with the right sha256: packaged, cached, or downloaded now.

    Raises CheckpointError where there is none, or the user has not agreed to what it takes.
    """
    source = recipe.checkpoint
    if source.file is not None:
        return _packaged(PACKAGE / source.file, source.sha256)
    if not source.files:
        raise CheckpointError(f"recipe '{recipe.name}' has no published weights: give yours with --checkpoint FILE")
    fetched = [fetch(published, consent) for published in source.files]
    return fetched[0] if source.url is not None else join(recipe, fetched)


def join(recipe: Recipe, files: Sequence[Path]) -> Path:
    """One checkpoint from the files of the recipe's parts: each gives the tensors that its part takes.

    It lies in the cache, under the network's own names and a file name with its hash: the same parts give the same
    file. Raises InputError unless there is a file for each part, CheckpointError where two parts give the same tensor
    or one gives none.
    """
    parts = recipe.checkpoint.parts
    if len(files) != len(parts):
        names = [part.name for part in parts]
        raise InputError(
            f"recipe '{recipe.name}' takes one --checkpoint that holds everything"
            f"{f', or one for each of {names}, in this order' if names else ''}; got {len(files)} of them"
        )
    joined: dict[str, Tensor] = {}
    for part, path in zip(parts, files, strict=True):
        found = {part.prefix + name: tensor for name, tensor in read_state_dict(path, part.key).items()}
        taken = {k: v for k, v in _named(recipe, found, path).items() if k.startswith(part.takes)}
        if not taken:
            raise CheckpointError(
                f"{path} holds no {' or '.join(part.takes)} of recipe '{recipe.name}': {_first(found)}"
            )
        if twice := sorted(joined.keys() & taken):
            raise CheckpointError(f"{path} holds {twice[0]}, which an earlier part of recipe '{recipe.name}' gave")
        joined |= taken
    buffer = io.BytesIO()  # a file's own name would become part of what is saved, and so of its hash
    torch.save({name: joined[name].clone() for name in sorted(joined)}, buffer)
    data = buffer.getvalue()
    digest = sha256_bytes(data)
    path = cache_folder() / f"{recipe.name}-{digest[:12]}.pt"
    if not path.is_file() or sha256_file(path) != digest:
        write_bytes(path, data)
    return path


def load_model(recipe: Recipe, checkpoint: Path) -> nn.Module:
    """The recipe's network with the weights of ``checkpoint``, float32, eval mode.

    The file's names are the publisher's or the network's own. Raises CheckpointError if it cannot be read as plain
    tensors, or if any tensor is missing, left over, of another shape or not finite. Nothing but tensors is unpickled
    (``weights_only=True``).
    """
    found = read_state_dict(checkpoint, recipe.checkpoint.key)
    model = build_model(recipe)
    state = _named(recipe, found, checkpoint)
    own_names = _own_names(found, state)
    _check_keys(model.state_dict(), state, own_names, checkpoint, recipe)
    broken = sorted(own_names[k] for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all())
    if broken:
        # A BatchNorm variance that overflowed in float16 is enough: the embedding then ignores the image.
        raise CheckpointError(
            f"{checkpoint} is damaged: {len(broken)} tensors hold inf or NaN, the first is {broken[0]}. Save it again "
            "in float32, or get it from its publisher"
        )
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def _packaged(path: Path, sha256: str | None) -> Path:
    if not path.is_file():
        raise CheckpointError(f"the packaged checkpoint {path} is missing; install edgesam-deploy again")
    found = sha256_file(path)
    if found != sha256:
        raise CheckpointError(
            f"the packaged checkpoint {path} was altered: expected sha256 {sha256}, found {found}; "
            "install edgesam-deploy again"
        )
    return path


def _named(recipe: Recipe, found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A file's tensors under the network's names."""
    try:
        return architecture(recipe).published_names(found)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not fit recipe '{recipe.name}': its tensors are not those of '{recipe.architecture}' "
            f"({type(error).__name__}: {reason}); {_first(found)}"
        ) from error


def _own_names(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """What each tensor of ``state`` is called in the file, where it is one of the file's or a piece of one."""
    whole = {id(tensor): name for name, tensor in found.items()}
    storages = Counter(_storage(tensor) for tensor in found.values())
    pieces = {_storage(tensor): name for name, tensor in found.items() if storages[_storage(tensor)] == 1}
    return {name: whole.get(id(tensor)) or pieces.get(_storage(tensor)) or name for name, tensor in state.items()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_keys(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    own_names: Mapping[str, str],
    path: Path,
    recipe: Recipe,
) -> None:
    """own_names: what the file itself calls the tensors that are found, for whoever looks there."""
    missing = sorted(set(expected) - set(found))
    extra = sorted(own_names[k] for k in set(found) - set(expected))
    shapes = [
        f"{own_names[k]} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}"
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


def _first(found: Mapping[str, Tensor]) -> str:
    return f"its first tensors are {', '.join(list(found)[:3])}"
