"""Tensors by name from the files that weights are published in; nothing but tensors is ever unpickled."""

from __future__ import annotations

import io
import lzma
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgesam_deploy.errors import CheckpointError, MissingExtraError
from edgesam_deploy.models.onnx_weights import is_onnx, read_onnx
from edgesam_deploy.transfer import CEILING_BYTES

# Where training scripts put the weights beside optimizers, epochs and arguments.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "module", "ema", "model_ema", "ema_state_dict")
# What DistributedDataParallel and torch.compile put before every name.
NAME_PREFIXES = ("module.", "_orig_mod.")
MAX_DEPTH = 3


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a .safetensors or .onnx file or from what ``torch.save`` wrote (.pt, .pth),
    alone in a ZIP archive or not.

    A training checkpoint may hold them under one of WRAPPERS, or under ``key``, which counts where the file is not a
    plain state dict. Tables of tensors inside one another get names with dots. Raises CheckpointError for a file that
    cannot be read, holds other things, or more than one set of weights.
    """
    loaded = _read(path)
    state = _unwrap(loaded, path, key)
    for prefix in NAME_PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return read_onnx(path) if is_onnx(path) else _read_pickle(path)


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was pickled; what it holds is checked below
            return torch.load(_unpacked(path), map_location="cpu", weights_only=True)
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
        AssertionError,
        ArithmeticError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is not a readable PyTorch checkpoint (truncated?): {reason}") from error


def _unpacked(path: Path) -> Path | io.BytesIO:
    """The one .pt or .pth in a ZIP archive that its publisher packed it into; any other file as it is."""
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        # What macOS adds to archives has the names of the files themselves.
        entries = [entry for entry in archive.infolist() if not entry.filename.startswith("__MACOSX/")]
        found = [entry for entry in entries if entry.filename.endswith((".pt", ".pth"))]
        if len(found) != 1:
            return path
        if found[0].file_size > CEILING_BYTES:  # reading stops there, whatever the archive really unpacks to
            raise ValueError(f"{found[0].filename} in it would have {found[0].file_size} bytes")
        return io.BytesIO(archive.read(found[0]))


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError("safetensors", "export") from error
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except (SafetensorError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not a readable safetensors file (truncated?): {reason}") from error


def _unwrap(loaded: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    for _ in range(MAX_DEPTH):
        if not isinstance(loaded, Mapping) or _is_state_dict(loaded):
            break
        entry = _wrapper(loaded, path, key)
        if entry is None:
            break
        loaded, key = loaded[entry], None
    flat = dict(_flat(loaded))
    if not _is_state_dict(flat):
        raise CheckpointError(f"{path} must hold a state dict (tensor names to tensors), holds {_describe(loaded)}")
    return flat


def _wrapper(loaded: Mapping[Any, Any], path: Path, key: str | None) -> str | None:
    """The entry with the weights; None where no entry is known to be one."""
    found = [name for name in WRAPPERS if isinstance(loaded.get(name), Mapping)] if key is None else [key]
    if key is not None and key not in loaded:
        raise CheckpointError(
            f"{path} has no '{key}', where the recipe looks for the weights: it is {_describe(loaded)}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds several sets of weights, {' and '.join(found)}: say which in the recipe's [checkpoint], "
            f'as in key = "{found[0]}"'
        )
    return found[0] if found else None


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided for k, v in value.items()
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[Any, Any]]:
    """The leaves of tables inside one another, by their joined names."""
    if not isinstance(value, Mapping):
        yield prefix.removesuffix("."), value
        return
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield (f"{prefix}{name}" if isinstance(name, str) else name), inner


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with keys {sorted(map(str, value))[:4]}"
    return type(value).__name__
