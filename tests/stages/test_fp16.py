"""FP16: typed graphs with FP32 point encoding, and an emulation in which overflow is real."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.recipe import PrecisionRules
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.fp16 import convert_to_fp16, emulate_fp16


def square_net(folder: Path) -> Path:
    """image -> x*x -> mean: the first step of a written-out LayerNorm."""
    nodes = [
        helper.make_node("Mul", ["image", "image"], ["square"], name="square"),
        helper.make_node("ReduceMean", ["square"], ["out"], name="mean", keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(np.zeros(1, dtype=np.float32), "unused")],
    )
    path = folder / "square.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    return path


def test_emulation_overflows_where_half_does(tmp_path: Path) -> None:
    """300 squared leaves FP16; the emulated graph shows it, as numpy's half arithmetic does."""
    half = convert_to_fp16(square_net(tmp_path), PrecisionRules(), tmp_path / "half.onnx").output
    with open_session(emulate_fp16(half, tmp_path / "emulated.onnx")) as session:
        small = session.run({"image": np.full((1, 64), 100, dtype=np.float32)})["out"]
        large = session.run({"image": np.full((1, 64), 300, dtype=np.float32)})["out"]
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(300) * np.float16(300))
    assert small[0, 0] == np.float32(np.float16(10_000))
    assert not np.isfinite(large).all()


def test_emulation_rounds_as_numpy_does(tmp_path: Path) -> None:
    half = convert_to_fp16(square_net(tmp_path), PrecisionRules(), tmp_path / "half.onnx").output
    values = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    rounded = values.astype(np.float16)
    expected = (rounded.astype(np.float32) ** 2).astype(np.float16).astype(np.float32).mean().astype(np.float16)
    with open_session(emulate_fp16(half, tmp_path / "emulated.onnx")) as session:
        got = session.run({"image": values})["out"][0, 0]
    assert got == pytest.approx(float(expected), rel=1e-3)


def test_decoder_keeps_point_encoding_in_fp32(built: SimpleNamespace, tmp_path: Path) -> None:
    result = convert_to_fp16(
        built.stages / "simplify-decoder" / "decoder.onnx", PrecisionRules(), tmp_path / "decoder.onnx"
    )
    model = onnx.shape_inference.infer_shapes(graphs.load(result.output))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type in ("Sin", "Cos"):
            assert types[node.input[0]] == TensorProto.FLOAT
    assert result.half > 0.8 * result.nodes
    source = graphs.load(built.stages / "simplify-decoder" / "decoder.onnx")
    feeds = graphs.example_feeds(source, seed=3)
    emulated = emulate_fp16(result.output, tmp_path / "emulated.onnx")
    error = graphs.disagreement(built.stages / "simplify-decoder" / "decoder.onnx", emulated, feeds)
    assert 1e-6 < error < 0.05


def angles(path: Path, feeds: dict[str, np.ndarray], output: Path) -> np.ndarray:
    """What the first Sin of a graph reads."""
    model = graphs.load(path)
    name = next(n.input[0] for n in model.graph.node if n.op_type == "Sin")
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    graphs.save(model, output, {})
    with open_session(output) as session:
        return session.run(feeds)[name]


def test_half_a_pixel_survives_the_point_encoding(built: SimpleNamespace, tmp_path: Path) -> None:
    """513.25 is no FP16 number: what the first sine reads must be FP32's to the bit."""
    source = built.stages / "simplify-decoder" / "decoder.onnx"
    half = convert_to_fp16(source, PrecisionRules(), tmp_path / "half.onnx").output
    emulated = emulate_fp16(half, tmp_path / "emulated.onnx")
    feeds = graphs.example_feeds(graphs.load(source), seed=3)
    feeds["point_coords"][:] = 513.25
    assert float(np.float16(513.25)) != 513.25
    expected = angles(source, feeds, tmp_path / "expected.onnx")
    np.testing.assert_array_equal(angles(emulated, feeds, tmp_path / "got.onnx"), expected)


def test_keep_rules_hold_nodes_in_fp32(tmp_path: Path) -> None:
    result = convert_to_fp16(square_net(tmp_path), PrecisionRules(keep=("^square$",)), tmp_path / "half.onnx")
    with open_session(emulate_fp16(result.output, tmp_path / "emulated.onnx")) as session:
        out = session.run({"image": np.full((1, 64), 250, dtype=np.float32)})["out"]
    assert out[0, 0] == np.float32(np.float16(62_500))


def test_a_kept_node_may_read_what_was_no_float(tmp_path: Path) -> None:
    """A comparison cast to float is half's like any other tensor: joining it would hand its bool to the kept node."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    nodes = [
        helper.make_node("Less", ["x", "limit"], ["below"], name="less"),
        helper.make_node("Cast", ["below"], ["mask"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "mask"], ["y"], name="keepme"),
    ]
    limit = [numpy_helper.from_array(np.array(2.0, dtype=np.float32), "limit")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], limit)
    path = tmp_path / "mask.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    half = convert_to_fp16(path, PrecisionRules(keep=("keepme",)), tmp_path / "half.onnx").output
    with open_session(half) as session:
        got = session.run({"x": np.array([[1, 2, 3, 0.5]], dtype=np.float32)})["y"]
    np.testing.assert_array_equal(got, [[1, 0, 0, 0.5]])
