"""Parameters and multiply-adds of the shipped recipes' networks, counted once and read without PyTorch.

Counted rather than published: authors leave figures out, and they count differently (``published.Published.notes``).
``benchmarks/counts.py`` writes ``assets/counts.json``; an entry holds for one network, told by ``network_key``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from edgesam_deploy.recipe import PACKAGE, Recipe

COUNTS = PACKAGE / "assets" / "counts.json"
# What of the geometry decides the counts.
_SIZES = ("image_size", "embedding_size", "embedding_channels", "num_masks", "mask_input", "high_res_channels")


@dataclass(frozen=True, slots=True)
class Counts:
    """encoder_params, decoder_params: of the network as published; the decoder's with the prompt encoder.

    encoder_macs: multiply-adds of one image as exported, at the recipe's size; decoder_macs: of one prompt of two
    points. Products of attention count, biases, norms and resampling do not.
    """

    encoder_params: int
    decoder_params: int
    encoder_macs: int
    decoder_macs: int

    @property
    def params_m(self) -> float:
        """Parameters of encoder and decoder, 10⁶."""
        return (self.encoder_params + self.decoder_params) / 1e6

    @property
    def macs_g(self) -> float:
        """Multiply-adds of an image and one prompt, 10⁹."""
        return (self.encoder_macs + self.decoder_macs) / 1e9


def network_key(recipe: Recipe) -> str:
    """sha256 of what decides a recipe's counts: its architecture, the options of that and its sizes."""
    sizes = [getattr(recipe.geometry, name) for name in _SIZES]
    network = [recipe.architecture, dict(recipe.options), sizes]
    return hashlib.sha256(json.dumps(network, sort_keys=True).encode()).hexdigest()


def counts_of(recipe: Recipe) -> Counts | None:
    """The counts of this very network, under whatever name; None for one that was not counted."""
    entry = _counted().get(network_key(recipe))
    return None if entry is None else Counts(**entry)


@cache
def _counted() -> Mapping[str, Mapping[str, int]]:
    """network_key -> entries of Counts. Students of one backbone and published models of one network share one."""
    counted: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    return {entry.pop("network"): entry for entry in counted["models"].values()}
