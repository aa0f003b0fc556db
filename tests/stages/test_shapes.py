"""Concrete shapes where ONNX's own inference needs a constant's values."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.stages.shapes import tensor_types


def test_a_resize_by_scales_has_a_shape() -> None:
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2.5], dtype=np.float32), "scales")
    graph = helper.make_graph(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], name="up", mode="cubic")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["prompts", 3, 4, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [scales],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    assert tensor_types(model, {"prompts": 2})["y"].shape == (2, 3, 8, 15)
