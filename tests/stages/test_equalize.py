"""Equalization leaves FP32 as it is to the bit. That it undoes what makes plain INT8 fail: test_planted.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.equalize import equalize


def convolutions(folder: Path, groups: int = 1, between: str = "Relu", second_reader: bool = False) -> Path:
    """x -> Conv(3→4) -> ``between`` -> Conv -> y, with channels of very different size."""
    rng = np.random.default_rng(1)
    sizes = np.array([1, 64, 0.125, 0], dtype=np.float32).reshape(4, 1, 1, 1)
    weights = {
        "w1": rng.normal(size=(4, 3, 3, 3)).astype(np.float32) * sizes,
        "b1": rng.normal(size=4).astype(np.float32),
        "w2": rng.normal(size=(4, 4 // groups, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="first"),
        helper.make_node(between, ["a"], ["r"], name="between"),
        helper.make_node("Conv", ["r", "w2"], ["y"], name="second", group=groups),
    ]
    outputs = ["y"]
    if second_reader:
        nodes.append(helper.make_node("Neg", ["r"], ["z"], name="reader"))
        outputs.append("z")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 6, 6]) for n in outputs],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    path = folder / "convolutions.onnx"
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    return path


@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depthwise"])
def test_ranges_become_equal_and_outputs_stay_to_the_bit(tmp_path: Path, groups: int) -> None:
    source = convolutions(tmp_path, groups)
    result = equalize(source, tmp_path / "out.onnx")
    assert (result.pairs, result.channels) == (1, 2 if groups == 1 else result.channels)
    feeds = graphs.example_feeds(graphs.load(source), seed=5)
    with open_session(source) as before, open_session(result.output) as after:
        np.testing.assert_array_equal(after.run(feeds)["y"], before.run(feeds)["y"])
    values = graphs.constants(graphs.load(result.output))
    first = np.abs(values["w1"]).reshape(4, -1).max(axis=1)
    second = np.abs(np.moveaxis(values["w2"], 0 if groups == 4 else 1, 0)).reshape(4, -1).max(axis=1)
    ratios = first[:3] / second[:3]
    assert (ratios >= 0.5).all(), "within a factor of two: powers of two only"
    assert (ratios <= 2.0).all()


@pytest.mark.parametrize(
    "other", [{"between": "Sigmoid"}, {"groups": 2}, {"second_reader": True}], ids=["no-relu", "grouped", "read-twice"]
)
def test_what_would_change_the_function_is_left_alone(tmp_path: Path, other: dict[str, object]) -> None:
    result = equalize(convolutions(tmp_path, **other), tmp_path / "out.onnx")  # type: ignore[arg-type]
    assert (result.pairs, result.channels, result.largest, result.max_error) == (0, 0, 1.0, 0.0)
