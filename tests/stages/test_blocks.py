"""Blocks: layers grouped by module path, whatever the exporter's naming."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgesam_deploy.errors import InputError
from edgesam_deploy.stages.blocks import Block, blocks, children

DOTTED = [
    f"net.stages_{s}.blocks.{b}.{part}.bn/node_Conv_{s}{b}{part}" for s in (0, 1) for b in (0, 1) for part in "pqr"
]
SLASHED = [f"/net/stages.{s}/blocks.{b}/{part}/Conv" for s in (0, 1) for b in (0, 1) for part in "pqr"]


@pytest.mark.parametrize(
    ("layers", "share", "names"),
    [
        (DOTTED, 1.0, ["net"]),
        (DOTTED, 0.5, ["net.stages_0.blocks", "net.stages_1.blocks"]),
        (DOTTED, 0.3, [f"net.stages_{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]),
        (SLASHED, 0.5, ["/net/stages.0/blocks", "/net/stages.1/blocks"]),
        (SLASHED, 0.3, [f"/net/stages.{s}/blocks.{b}" for s in (0, 1) for b in (0, 1)]),
        (["stem/Conv", *DOTTED[:6]], 0.9, ["stem", "net.stages_0.blocks"]),
        ([f"Conv_{i}" for i in range(3)], 0.5, ["Conv_0", "Conv_1", "Conv_2"]),
        ([f"Conv_{i}" for i in range(20)], 0.25, [f"Conv_{i} to Conv_{i + 4}" for i in (0, 5, 10, 15)]),
        ([], 0.5, []),
        (["only/Conv"], 0.1, ["only"]),
    ],
)
def test_split_from_the_top(layers: list[str], share: float, names: list[str]) -> None:
    found = blocks(layers, share)
    assert [block.name for block in found] == names
    assert [layer for block in found for layer in block.layers] == layers
    assert all(len(block.layers) <= max(share * len(layers), 1) for block in found)
    assert found == blocks(list(layers), share)


def test_siblings_of_one_module_keep_their_own_names() -> None:
    found = blocks(["a/Conv", "a/Conv_1", "b/Conv"], 0.1)
    assert [block.name for block in found] == ["a/Conv", "a/Conv_1", "b"]


def test_inside_a_block_down_to_layers() -> None:
    (whole,) = blocks(DOTTED, 1.0)
    stages = children(whole)
    assert [b.name for b in stages] == ["net.stages_0.blocks", "net.stages_1.blocks"]
    block = children(stages[1])[0]
    assert [b.name for b in children(block)] == [f"net.stages_1.blocks.0.{part}.bn" for part in "pqr"]
    assert all(children(layer) == () for layer in children(block))
    # Names that differ in nothing but separators still come apart.
    assert len(children(Block("x", ("a.b", "a/b")))) == 2


def test_names_must_be_distinct() -> None:
    with pytest.raises(InputError, match="two called 'Conv'"):
        blocks(["Conv", "Conv"])


def test_the_reference_falls_into_its_modules(built: SimpleNamespace) -> None:
    pytest.importorskip("onnx", reason="needs the export extra")
    from edgesam_deploy.recipe import Int8Rules
    from edgesam_deploy.stages import graph as graphs
    from edgesam_deploy.stages.placement import eligible

    layers = eligible(graphs.load(built.stages / "simplify-encoder" / "encoder.onnx"), Int8Rules())[0]
    found = {block.name: len(block.layers) for block in blocks(layers)}
    assert found["image_encoder.backbone.stem"] == 5
    assert found["image_encoder.backbone.stages_2.blocks.1.layers"] == 6
    assert max(found.values()) <= len(layers) / 8
    assert sum(found.values()) == len(layers)
