"""Weights and inputs that are the same everywhere: made from tensor names by PCG64's raw bits alone.

The raw stream of a bit generator is stable across NumPy versions; neither torch's nor NumPy's distributions are.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Tensors that are looked up or added instead of multiplied with: their fan-in says nothing.
UNIT_SCALE = re.compile(r"(_embed|point_embeddings\.\d+|iou_token|mask_tokens)\.weight$|pos_embed$|gaussian_matrix$")


def uniform(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Mean 0, variance 1, in (-sqrt(3), sqrt(3)), seeded by the CRC-32 of ``name``."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    unit: npt.NDArray[np.float64] = (np.asarray(raw, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray(math.sqrt(3.0) * (2.0 * unit.reshape(shape) - 1.0))


def deterministic_state(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names, shapes and dtypes of ``like`` whose activations stay of order 1."""
    return {name: torch.from_numpy(_values(name, tuple(t.shape))).to(t.dtype) for name, t in like.items()}


def _values(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape)
    noise = uniform(name, shape)
    if last == "running_var":
        return 1.0 + 0.3 * noise
    if last == "attention_biases":
        return 0.5 * noise
    if len(shape) == 1:
        return (1.0 if last == "weight" else 0.0) + 0.1 * noise
    if UNIT_SCALE.search(name):
        return noise
    return noise / math.sqrt(math.prod(shape[1:]))


def smooth_image(size: int) -> Tensor:
    """(1,3,size,size) float32, standing for a normalised photograph: per channel a sum of plane waves."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = uniform("waves", (3, 12, 4))
    channels = [
        sum(a * np.sin(2.0 * np.pi * (8.0 * u * x + 8.0 * v * y + phase)) for u, v, phase, a in channel) / 3.0
        for channel in waves
    ]
    return torch.from_numpy(np.stack(channels)[None].astype(np.float32))
