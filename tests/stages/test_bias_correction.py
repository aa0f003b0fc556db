"""Bias correction moves the means of INT8 outputs to those of FP32, and touches nothing but biases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from onnx import TensorProto, helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.recipe import Int8Rules, Recipe, load_recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.bias_correction import correct_biases
from edgesam_deploy.stages.calibrate import calibrate
from edgesam_deploy.stages.quantize import quantize
from edgesam_deploy.transforms import to_encoder_input

from ..conftest import PHOTOS

IMAGES = list_images(PHOTOS / "calibration")[:4]


@pytest.fixture(scope="module")
def corrected(built: SimpleNamespace, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny encoder: ``source``, its INT8 graph ``plain``, and ``result`` of correcting that."""
    folder, recipe = tmp_path_factory.mktemp("bias"), load_recipe(tiny_recipe)
    source = built.stages / "simplify-encoder" / "encoder.onnx"
    ranges = calibrate({"encoder": source}, IMAGES, recipe, Int8Rules(), folder / "ranges.json")["encoder"]
    plain = quantize(source, ranges, Int8Rules(), folder / "plain.onnx").output
    result = correct_biases(source, plain, IMAGES, recipe, folder / "corrected.onnx")
    return SimpleNamespace(source=source, plain=plain, result=result, recipe=recipe)


def channel_means(graph: Path, names: list[str], recipe: Recipe, folder: Path) -> dict[str, np.ndarray]:
    """Mean of every channel of (1,C,H,W) tensors, fetched whole."""
    model = graphs.load(graph)
    del model.graph.output[:]
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    path = folder / "watched.onnx"
    path.write_bytes(model.SerializeToString())
    sums: dict[str, np.ndarray] = {}
    with open_session(path) as session:
        for image in IMAGES:
            feed = to_encoder_input(read_image(image), recipe.geometry.image_size, recipe.pixels.padding)
            for name, value in session.run({"image": feed}).items():
                sums[name] = sums.get(name, 0.0) + value.mean(axis=(0, 2, 3), dtype=np.float64) / len(IMAGES)
    return sums


def test_means_become_those_of_fp32(corrected: SimpleNamespace, tmp_path: Path) -> None:
    names = [n.output[0] for n in graphs.load(corrected.source).graph.node if n.op_type == "Conv"]
    assert corrected.result.layers == len(names)
    assert corrected.result.largest > 0
    want, plain, got = (
        channel_means(graph, names, corrected.recipe, tmp_path)
        for graph in (corrected.source, corrected.plain, corrected.result.output)
    )
    for name in names:
        before, after = (float(np.abs(m[name] - want[name]).max()) for m in (plain, got))
        assert after <= 0.02 * before + 1e-4, name


def test_only_biases_change(corrected: SimpleNamespace) -> None:
    before, after = graphs.load(corrected.plain), graphs.load(corrected.result.output)
    assert [(n.name, n.op_type, n.input[:2]) for n in after.graph.node] == [
        (n.name, n.op_type, n.input[:2]) for n in before.graph.node
    ]
    old, new = graphs.constants(before), graphs.constants(after)
    added = set(new) - set(old)
    assert len(added) == corrected.result.layers
    assert all(name.endswith(":corrected_bias") for name in added)
    for name in set(old) & set(new):
        np.testing.assert_array_equal(new[name], old[name])


def test_a_graph_of_another_model_is_refused(corrected: SimpleNamespace, tmp_path: Path) -> None:
    model = graphs.load(corrected.source)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = f"{name}_other" if name.startswith("conv2d") else name
    renamed = tmp_path / "renamed.onnx"
    graphs.save(model, renamed, {})
    with pytest.raises(GraphError, match="was not made from"):
        correct_biases(renamed, corrected.plain, IMAGES, corrected.recipe, tmp_path / "out.onnx")
