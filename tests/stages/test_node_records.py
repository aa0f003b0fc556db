"""What is recorded of every node: read off the graphs that ship, in both encodings, and checked against the sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
torch = pytest.importorskip("torch", reason="needs the export extra")

from onnx import numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from edgesam_deploy.bundle import GRAPHS, NODES, load_bundle
from edgesam_deploy.contract import contracts
from edgesam_deploy.errors import GraphError
from edgesam_deploy.measure.audit import WEIGHTED
from edgesam_deploy.measure.explain import read_nodes
from edgesam_deploy.models import graph_modules
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import Int8Rules, Recipe, load_recipe
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.node_records import (
    FLOAT_OUTPUT,
    TOP,
    NodeRecord,
    node_records,
    uniform_reasons,
    write_nodes,
)
from edgesam_deploy.stages.typed import Typing, type_graph

ENCODINGS = {"tensorrt": "quantize-encoder", "cpu": "encode-encoder"}
CONVOLUTIONS = 49


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path) -> Recipe:
    return load_recipe(tiny_recipe)


@pytest.fixture(scope="module")
def ranges(both_ranges: dict[str, Ranges]) -> dict[str, Ranges]:
    return both_ranges


@pytest.fixture(scope="module")
def sources(built: SimpleNamespace) -> dict[str, Path]:
    return {name: built.stages / f"simplify-{name}" / f"{name}.onnx" for name in GRAPHS}


@pytest.fixture(scope="module")
def encoders(built: SimpleNamespace, sources: Mapping[str, Path], ranges: Mapping[str, Ranges]) -> dict[str, object]:
    """The records of the encoder, by encoding."""
    return {
        encoding: node_records(built.stages / stage / "encoder.onnx", sources["encoder"], ranges["encoder"], {}, {}, {})
        for encoding, stage in ENCODINGS.items()
    }


def by_name(records: list[NodeRecord]) -> dict[str, NodeRecord]:
    return {record.node: record for record in records}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_node_of_the_fp32_graph_in_its_order_with_its_operator(
    encoders: dict[str, list[NodeRecord]], sources: dict[str, Path], encoding: str
) -> None:
    nodes = {node.name: node.op_type for node in onnx.load(sources["encoder"]).graph.node}
    found = {record.node: record.op for record in encoders[encoding]}
    assert set(nodes) - set(found) == {name for name, op in nodes.items() if op == "Cast"}
    assert list(found.items()) == [(name, op) for name, op in nodes.items() if name in found]


def test_both_encodings_are_the_same_arithmetic(encoders: dict[str, list[NodeRecord]]) -> None:
    """What multiplies does so in INT8 with one scale; the twin's activations moved behind the rounding."""
    device, twin = (by_name(encoders[encoding]) for encoding in ("tensorrt", "cpu"))
    assert list(device) == list(twin)
    for name, record in device.items():
        if record.weighted:
            assert (record.precision, twin[name].precision) == ("int8", "int8")
            assert record.scale == twin[name].scale
            assert record.scale is not None
    assert Counter(r.precision for r in device.values())["int8"] == CONVOLUTIONS
    moved = {r.op for name, r in twin.items() if r.precision == "int8" and device[name].precision == "fp32"}
    assert moved == {"Clip", "Relu"}


def test_what_the_cpu_cannot_fuse_is_said(encoders: dict[str, list[NodeRecord]], sources: dict[str, Path]) -> None:
    """The convolution that makes the embedding; on a device its output is float as any other's."""
    last = onnx.load(sources["encoder"]).graph.node[-1].name
    assert [r.node for r in encoders["cpu"] if r.reason] == [last]
    assert by_name(encoders["cpu"])[last].reason == FLOAT_OUTPUT
    assert [r.node for r in encoders["tensorrt"] if r.reason] == []


def test_ranges_and_scales_are_those_of_the_calibration(
    encoders: dict[str, list[NodeRecord]], sources: dict[str, Path], ranges: dict[str, Ranges], built: SimpleNamespace
) -> None:
    """|max| is of the output; the scale, by the file that ships, covers the input's range with 127 steps."""
    nodes = {node.name: node for node in onnx.load(sources["encoder"]).graph.node}
    seen, exact = ranges["encoder"], 0
    values = {i.name: numpy_helper.to_array(i) for i in onnx.load(
        built.stages / ENCODINGS["tensorrt"] / "encoder.onnx"
    ).graph.initializer}  # fmt: skip
    for record in encoders["tensorrt"]:
        node = nodes[record.node]
        if node.output[0] in seen.absmax:
            assert record.absmax == pytest.approx(seen.absmax[node.output[0]], rel=1e-6)
        if record.op == "Conv":
            assert np.float32(record.scale) == values[f"{node.input[0]}:scale"]
            steps = seen.amax[node.input[0]] / float(record.scale or 0.0)
            assert steps <= 127.0 * (1 + 1e-6)
            exact += steps > 126.8
    assert exact > CONVOLUTIONS // 2, "tensors that meet in a Concat share the larger scale"


@pytest.mark.parametrize("name", GRAPHS)
def test_macs_are_half_of_pytorchs_flops(recipe: Recipe, checkpoint: Path, built: SimpleNamespace, name: str) -> None:
    """For one image, and for one prompt of two points; FlopCounterMode counts a multiply-accumulate as two."""
    module = dict(zip(GRAPHS, graph_modules(load_model(recipe, checkpoint), recipe), strict=True))[name]
    sizes = {"prompts": 1, "points": 2}
    feeds = [
        torch.zeros(
            [sizes[n] if isinstance(n, str) else n for n in spec.shape], dtype=getattr(torch, np.dtype(spec.dtype).name)
        )
        for spec in contracts(recipe.geometry)[name].inputs
    ]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module.eval()(*feeds)
    records = read_nodes(load_bundle(built.bundle)).graphs[name]
    assert 2 * sum(record.macs for record in records) == counter.get_total_flops()
    assert all((record.macs > 0) == record.weighted for record in records)


def test_every_bundle_says_why_a_node_that_multiplies_is_not_int8(built: SimpleNamespace) -> None:
    graphs = read_nodes(load_bundle(built.bundle)).graphs
    for name in GRAPHS:
        nodes = {n.name for n in onnx.load(built.bundle / f"{name}.onnx").graph.node if n.op_type in WEIGHTED}
        records = [record for record in graphs[name] if record.weighted]
        assert {record.node for record in records} == nodes
        assert all(record.precision == "int8" or record.reason for record in records)


@pytest.mark.parametrize("name", GRAPHS)
def test_int8_beside_fp16(
    recipe: Recipe, sources: dict[str, Path], ranges: dict[str, Ranges], tmp_path: Path, name: str
) -> None:
    """What multiplies is INT8 or says why; the rest is FP16 or, as the point encoding, says why it is FP32."""
    how = Typing("tensorrt", "fp16")
    typed = type_graph(sources[name], ranges[name], recipe.fp16, Int8Rules(), how, tmp_path / "typed.onnx")
    records = node_records(typed.output, sources[name], ranges[name], typed.reasons, {}, {})
    assert tuple(r.node for r in records if r.weighted and r.precision == "int8") == typed.int8
    for record in records:
        if record.precision == "fp32" or (record.weighted and record.precision != "int8"):
            assert record.reason, record
    kinds = Counter(r.precision for r in records)
    assert kinds["int8"] >= CONVOLUTIONS
    assert kinds["fp16"] > kinds["fp32"]
    points = [r for r in records if r.op in ("Sin", "Cos")]
    assert [r.precision for r in points] == ["fp32"] * len(points)


def test_a_node_that_nobody_gave_a_reason_for_is_a_defect(sources: dict[str, Path]) -> None:
    graph = sources["decoder"]
    reasons = uniform_reasons(graph, "built in FP32")
    records = node_records(graph, graph, None, reasons, {}, {})
    assert {r.reason for r in records if r.weighted} == {"built in FP32"}
    assert {r.absmax for r in records} == {None}
    (forgotten,) = [name for name in reasons if "iou_prediction_head.layers.1" in name]
    del reasons[forgotten]
    with pytest.raises(GraphError, match="nothing says why they are not INT8"):
        node_records(graph, graph, None, reasons, {}, {})


def test_a_graph_made_from_another_is_refused(sources: dict[str, Path], built: SimpleNamespace) -> None:
    typed = built.stages / ENCODINGS["cpu"] / "encoder.onnx"
    with pytest.raises(GraphError, match=r"has no node '.*' .* of the FP32 graph it was made from"):
        node_records(typed, sources["decoder"], None, {}, {}, {})


def test_blocks_and_their_cost(sources: dict[str, Path]) -> None:
    """Nodes that a search did not group go with the block around them, else with what they read."""
    graph = sources["decoder"]
    attention = "mask_decoder.transformer.layers.0.self_attn"
    layer = "mask_decoder.transformer.layers.0"
    names = uniform_reasons(graph, "why")
    block_of = {name: attention if attention in name else layer for name in names if name.startswith(layer)}
    records = node_records(graph, graph, None, names, {attention: 0.02, layer: 0.01}, block_of)
    blocks = {r.node: r.block for r in records}
    # The exporter's numbers behind "node_add_" change with its version.
    sums = [block for node, block in blocks.items() if node.startswith(f"{layer}/node_add_")]
    assert sums
    assert set(sums) == {layer}
    assert blocks["mask_decoder.transformer.layers.0.self_attn/node_softmax"] == attention
    assert blocks["/node_sin"] == TOP
    second = [block for node, block in blocks.items() if node.startswith("mask_decoder.transformer.layers.1.")]
    assert set(second) == {layer}, "nobody grouped them: they read what the first layer writes"
    costs = {attention: 0.02, layer: 0.01}
    assert all(r.iou_cost == (costs.get(r.block) if r.weighted else None) for r in records)


def test_without_a_search_layers_are_grouped_by_their_modules(encoders: dict[str, list[NodeRecord]]) -> None:
    """No block holds more than an eighth of the layers, and activations are where their convolution is."""
    blocks = Counter(record.block for record in encoders["tensorrt"] if record.weighted)
    assert max(blocks.values()) <= CONVOLUTIONS / 8 or len(blocks) > 8
    alone = {record.block for record in encoders["tensorrt"]} - set(blocks)
    assert alone == {TOP}


def test_what_is_written_is_read(encoders: dict[str, list[NodeRecord]], tmp_path: Path, built: SimpleNamespace) -> None:
    records = dict.fromkeys(GRAPHS, encoders["cpu"])
    write_nodes(tmp_path / NODES, records, {"verdict": "found"})
    found = read_nodes(SimpleNamespace(path=tmp_path))  # type: ignore[arg-type]
    assert {name: list(rows) for name, rows in found.graphs.items()} == records
    assert found.search == {"verdict": "found"}
