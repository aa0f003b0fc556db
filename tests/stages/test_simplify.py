"""Simplifiers are not trusted: a foreign operator, a grown graph or a moved output is rejected."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages import simplify as stage


def affine_net(folder: Path, scale: float) -> Path:
    """Conv -> Relu -> Mul(scale) -> Add(0.3): HGNetV2's learnable affine block."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "c": rng.normal(size=4).astype(np.float32),
        "s": np.array([scale], dtype=np.float32),
        "b": np.array([0.3], dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w", "c"], ["y"], name="conv"),
        helper.make_node("Relu", ["y"], ["r"], name="relu"),
        helper.make_node("Mul", ["s", "r"], ["m"], name="mul"),
        helper.make_node("Add", ["m", "b"], ["out"], name="add"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    path = folder / "net.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    return path


def test_reference_graphs_simplify_and_agree(built: SimpleNamespace) -> None:
    for name in ("encoder", "decoder"):
        before, after = built.stages / "export" / f"{name}.onnx", built.stages / f"simplify-{name}" / f"{name}.onnx"
        assert graphs.foreign_nodes(graphs.load(after)) == []
        assert len(graphs.load(after).graph.node) < len(graphs.load(before).graph.node)
        assert graphs.disagreement(before, after, graphs.example_feeds(graphs.load(before), seed=7)) <= 1e-4


def test_affine_after_relu_folds_into_the_convolution(tmp_path: Path) -> None:
    source = affine_net(tmp_path, scale=0.7)
    feeds = {"image": np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)}
    result = stage.simplify(source, tmp_path / "out.onnx")
    assert [n.op_type for n in graphs.load(result.output).graph.node] == ["Conv", "Clip"]
    assert graphs.disagreement(source, result.output, feeds) <= 1e-6


def test_a_negative_scale_is_left_alone(tmp_path: Path) -> None:
    model = graphs.load(affine_net(tmp_path, scale=-0.7))
    assert stage.fold_affine_after_relu(model) == 0
    assert [n.op_type for n in model.graph.node] == ["Conv", "Relu", "Mul", "Add"]


def _plant_attention(model: Any) -> None:
    model.graph.node[0].domain = "com.microsoft"


def _grow(model: Any) -> None:
    name = model.graph.output[0].name
    for node in model.graph.node:
        for i, out in enumerate(node.output):
            if out == name:
                node.output[i] = "inner"
    model.graph.node.append(helper.make_node("Identity", ["inner"], [name], name="extra"))


def _move_outputs(model: Any) -> None:
    weight = next(i for i in model.graph.initializer if i.name == "w")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), "w"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(_plant_attention, "planted com.microsoft::Conv"), (_grow, "grew the graph"), (_move_outputs, "outputs moved by")],
    ids=["foreign operator", "grown", "moved"],
)
def test_a_bad_simplifier_is_rejected_and_the_next_one_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], None], reason: str
) -> None:
    source = affine_net(tmp_path, scale=-1.0)

    def bad(model: Any) -> Any:
        damage(model)
        return model

    monkeypatch.setattr(stage, "_TOOLS", {"bad": bad, "good": lambda model: model})
    result = stage.simplify(source, tmp_path / "out.onnx")
    assert result.tool == "good"
    assert reason in result.rejected[0]
    monkeypatch.setattr(stage, "_TOOLS", {"bad": bad})
    with pytest.raises(GraphError, match="no simplifier gave an acceptable graph"):
        stage.simplify(source, tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()


def test_a_zero_pad_before_maxpool_keeps_its_zeros(tmp_path: Path) -> None:
    """ONNX Runtime's Pad_Fusion would turn the zeros into MaxPool's own -inf; our sessions switch it off."""
    nodes = [
        helper.make_node("Pad", ["image", "pads"], ["p"], name="pad"),
        helper.make_node("MaxPool", ["p"], ["out"], name="pool", kernel_shape=[2, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 1, 2, 2])],
        [numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 1, 1], dtype=np.int64), "pads")],
    )
    path = tmp_path / "pad.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    with open_session(path) as session:
        out = session.run({"image": np.full((1, 1, 2, 2), -5, dtype=np.float32)})["out"]
    np.testing.assert_array_equal(out[0, 0], [[-5, 0], [0, 0]])


@pytest.mark.parametrize("swapped", [False, True])
def test_gelu_is_halved_last_and_stays_the_same(tmp_path: Path, swapped: bool) -> None:
    """x·(0.5·(1+erf)) becomes (x·(1+erf))·0.5: the same numbers to the bit where nothing is fused."""
    values = {"r": np.float32(2**-0.5), "one": np.float32(1), "half": np.float32(0.5)}
    factors = ["h", "x"] if swapped else ["x", "h"]
    nodes = [
        helper.make_node("Mul", ["x", "r"], ["z"], name="z"),
        helper.make_node("Erf", ["z"], ["e"], name="e"),
        helper.make_node("Add", ["e", "one"], ["a"], name="a"),
        helper.make_node("Mul", ["half", "a"], ["h"], name="h"),
        helper.make_node("Mul", factors, ["y"], name="y"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in ("x", "y")]
    constants = [numpy_helper.from_array(np.array(v), k) for k, v in values.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=10,
    )
    assert stage.halve_gelu_last(model) == 1
    assert stage.halve_gelu_last(model) == 0
    by_name = {n.name: n for n in model.graph.node}
    assert set(by_name["h"].input) == {"x", "a"}
    assert set(by_name["y"].input) == {"h", "half"}
    graphs.save(model, tmp_path / "gelu.onnx", {})
    x = np.linspace(-4, 4, 64, dtype=np.float32)[None]
    with open_session(tmp_path / "gelu.onnx") as session:
        expected = [[v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x[0]]]
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, atol=1e-6)
