"""Blocks: layers that share a module path, the units in which a search gives out INT8.

ONNX node names carry the path of the module that they came from, ``encoder.stages_2.blocks.1.conv/node_Conv_690``. It
is read as a tree, whatever the exporter's style: components end at "/" and ".".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgesam_deploy.errors import InputError

# No block holds more than this share of a graph's layers: fine enough to keep what is bad, few enough to try each.
SHARE = 1 / 8
# A module of more layers than this, all of them directly in it, tells nothing by its path.
_FLAT = 16
_COMPONENT = re.compile(r"[^/.]+")


@dataclass(frozen=True, slots=True)
class Block:
    """name: the path that its layers share; a single layer's module, or its own name. layers: node names, in order."""

    name: str
    layers: tuple[str, ...]


def blocks(layers: Sequence[str], share: float = SHARE) -> tuple[Block, ...]:
    """Split layers along their paths, from the top, until no block holds more than ``share`` of them.

    layers: node names in graph order, each once. Blocks come in the order of their first layers; a block that cannot be
    split stays whole. Raises InputError for a name that occurs twice.
    """
    if len(set(layers)) != len(layers):
        twice = next(name for name in layers if layers.count(name) > 1)
        raise InputError(f"expected layers with names of their own, got two called '{twice}': name every node")
    limit = max(share * len(layers), 1.0)
    done: list[Block] = []
    waiting = [_block(layers)] if layers else []
    while waiting:
        block = waiting.pop(0)
        parts = children(block) if len(block.layers) > limit else ()
        if len(parts) == len(block.layers) and len(parts) > _FLAT:
            parts = _runs(block.layers, int(limit))
        waiting = [*parts, *waiting]
        if not parts:
            done.append(block)
    position = {name: index for index, name in enumerate(layers)}
    return tuple(_distinct(sorted(done, key=lambda block: position[block.layers[0]])))


def children(block: Block) -> tuple[Block, ...]:
    """The parts of a block one step down its path, down to single layers; none for a single layer."""
    if len(block.layers) < 2:
        return ()
    depth = len(_shared(block.layers))
    parts: dict[str, list[str]] = {}
    for name in block.layers:
        path = _COMPONENT.findall(name)
        parts.setdefault(path[depth] if depth < len(path) else "", []).append(name)
    if len(parts) < 2:  # names that only differ in their separators
        parts = {name: [name] for name in block.layers}
    return tuple(_distinct([_block(part) for part in parts.values()]))


def _block(layers: Sequence[str]) -> Block:
    """A block named after the path that its layers share; one layer, after its module."""
    ends = [match.end() for match in _COMPONENT.finditer(layers[0])]
    depth = len(_shared(layers)) if len(layers) > 1 else max(len(ends) - 1, 1)
    if depth and ends:
        return Block(layers[0][: ends[depth - 1]], tuple(layers))
    return Block(layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}", tuple(layers))


def _runs(layers: Sequence[str], length: int) -> tuple[Block, ...]:
    """Neighbours together, where names tell nothing: exporters that number nodes from Conv_0 on."""
    return tuple(
        Block(f"{run[0]} to {run[-1]}" if len(run) > 1 else run[0], tuple(run))
        for run in (layers[i : i + length] for i in range(0, len(layers), length))
    )


def _shared(layers: Sequence[str]) -> list[str]:
    """The components that all names begin with."""
    paths = [_COMPONENT.findall(name) for name in layers]
    shared = []
    for column in zip(*paths, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


def _distinct(found: Sequence[Block]) -> list[Block]:
    """Blocks whose names would be one take their first layer's."""
    names = [block.name for block in found]
    return [Block(b.layers[0], b.layers) if names.count(b.name) > 1 else b for b in found]
