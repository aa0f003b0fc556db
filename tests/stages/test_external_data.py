"""Graphs too large for one file: weights beside them, from export to bundle. A lowered limit, a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.bundle import load_bundle
from edgesam_deploy.contract import GraphContract, TensorSpec
from edgesam_deploy.errors import BundleError, GraphError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.recipe import Int8Rules, PrecisionRules, load_recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import external_data
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.fp16 import emulate_fp16
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.skeleton import unit_ranges
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.stages.typed_nodes import wanted_precisions
from edgesam_deploy.target import load_target

from ..conftest import PHOTOS

WIDTH, LAYERS = 64, 3
LIMIT = 2 * 4 * WIDTH * WIDTH


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the three weights of ``network`` are as much as one file holds."""
    monkeypatch.setattr(external_data, "LIMIT_BYTES", LIMIT)


def network() -> onnx.ModelProto:
    """x (1,8,64) -> three products with weights of 16 KB, a bias after each, and an addition of a folded constant."""
    rng = np.random.default_rng(0)
    nodes, values = [], {"half": np.float32(0.5), "other": np.float32(0.25)}
    for i in range(LAYERS):
        values[f"w{i}"] = (rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        values[f"b{i}"] = rng.normal(size=WIDTH).astype(np.float32)
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"product{i}"], name=f"layer{i}/MatMul"),
            helper.make_node("Add", [f"product{i}", f"b{i}"], [f"x{i + 1}"], name=f"layer{i}/Add"),
        ]
    nodes.append(helper.make_node("Add", ["half", "other"], ["sum"], name="folded"))
    nodes.append(helper.make_node("Mul", [f"x{LAYERS}", "sum"], ["y"], name="last"))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, 8, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, WIDTH])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def saved(folder: Path, name: str = "network.onnx") -> Path:
    folder.mkdir(exist_ok=True)
    graphs.save(network(), folder / name, {"stage": "test"})
    return folder / name


def small(folder: Path) -> Path:
    """The same network in one file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "LIMIT_BYTES", 1 << 30)
        return saved(folder)


@pytest.mark.usefixtures("lowered")
def test_large_weights_go_beside_the_graph_and_come_back(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = tmp_path / "network.onnx.data"
    assert path.stat().st_size < 4 * WIDTH * WIDTH < LAYERS * 4 * WIDTH * WIDTH <= data.stat().st_size
    model, expected = graphs.load(path), graphs.constants(network())
    assert {p.key: p.value for p in model.metadata_props} == {"data_sha256": sha256_file(data), "stage": "test"}
    assert graphs.constants(model).keys() == expected.keys()
    assert all(np.array_equal(value, expected[name]) for name, value in graphs.constants(model).items())
    assert not external_data.is_external(model)
    unread = graphs.load(path, weights=False)
    assert {t.name for t in unread.graph.initializer if t.data_location == TensorProto.EXTERNAL} == {"w0", "w1", "w2"}
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_runtimes_find_the_weights(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    feeds = {"x0": np.random.default_rng(1).normal(size=(1, 8, WIDTH)).astype(np.float32)}
    with open_session(saved(tmp_path / "large"), backend) as session:
        found = session.run(feeds)["y"]
    with open_session(small(tmp_path / "small"), backend) as session:
        assert np.array_equal(found, session.run(feeds)["y"])


def test_at_the_limit_there_is_one_file_and_an_older_one_of_weights_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(value.nbytes for value in graphs.constants(network()).values())
    monkeypatch.setattr(external_data, "LIMIT_BYTES", total - 1)
    path = saved(tmp_path)
    assert (tmp_path / "network.onnx.data").exists()
    monkeypatch.setattr(external_data, "LIMIT_BYTES", total)
    saved(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.usefixtures("lowered")
def test_the_same_graph_is_written_alike_and_its_hash_covers_the_weights(tmp_path: Path) -> None:
    first, again = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert sha256_file(first) == sha256_file(again)
    model = network()
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones((WIDTH, WIDTH), np.float32), "w0"))
    graphs.save(model, tmp_path / "b" / "network.onnx", {"stage": "test"})
    assert sha256_file(first) != sha256_file(again)


@pytest.mark.usefixtures("lowered")
def test_weights_of_another_graph_missing_or_cut_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = tmp_path / "network.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(GraphError, match=r"network\.onnx\.data is not of this graph: expected sha256"):
        graphs.load(path)
    data.unlink()
    with pytest.raises(GraphError, match=r"network\.onnx is not a valid ONNX graph"):
        graphs.load(path)
    data.write_bytes(whole[: len(whole) // 2])
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    with pytest.raises(GraphError, match=r"network\.onnx\.data is cut: it ends within 'w"):
        external_data.read_weights(model, path)
    unread = next(t for t in model.graph.initializer if t.name == "w2")
    unread.external_data[0].value = "../network.onnx.data"
    data.write_bytes(whole)
    with pytest.raises(GraphError, match="names weights outside its folder"):
        external_data.read_weights(model, path)


@pytest.mark.usefixtures("lowered")
def test_a_graph_without_its_weights_is_not_written(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(GraphError, match="its weights were not read"):
        graphs.save(graphs.load(path, weights=False), tmp_path / "again.onnx", {})
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.usefixtures("lowered")
def test_copies_and_removals_take_both_files(tmp_path: Path) -> None:
    path = saved(tmp_path)
    graphs.copy(path, tmp_path / "copy" / "encoder.onnx")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    graphs.remove(path)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    values, expected = graphs.constants(graphs.load(tmp_path / "copy" / "encoder.onnx")), graphs.constants(network())
    assert all(np.array_equal(values[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("lowered")
def test_a_large_graph_is_simplified_around_its_weights(tmp_path: Path) -> None:
    result = simplify(saved(tmp_path), tmp_path / "simple.onnx")
    assert (result.nodes_before, result.nodes_after) == (8, 7)
    assert result.max_error <= 1e-6
    model = graphs.load(result.output)
    assert [i.name for i in model.graph.input] == ["x0"]
    assert external_data.data_file(result.output).exists()
    assert {p.name for p in tmp_path.iterdir()} == {
        name + end for name in ("network.onnx", "simple.onnx") for end in ("", ".data")
    }


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize(
    ("rest", "int8", "large"),
    [("fp32", (), True), ("fp16", (), False), ("fp32", ("layer0/MatMul",), True), ("fp16", None, False)],
    ids=["fp32", "fp16", "int8 on one layer beside fp32", "int8 beside fp16"],
)
def test_typed_graphs_are_those_of_a_small_one(
    rest: str, int8: tuple[str, ...] | None, large: bool, tmp_path: Path
) -> None:
    """Node for node and value for value; those that fit into one file again are one file."""
    how, typed = Typing("tensorrt", rest), {}
    sources = {"large": saved(tmp_path / "large"), "small": small(tmp_path / "small")}
    limit = external_data.LIMIT_BYTES if large else LIMIT // 2 + LIMIT // 4 + 2048
    for name, source in sources.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(external_data, "LIMIT_BYTES", 1 << 30 if name == "small" else limit)
            ranges, output = unit_ranges(source), tmp_path / name / "typed.onnx"
            type_graph(source, ranges, PrecisionRules(), Int8Rules(), how, output, int8)
            typed[name] = output
    assert wanted_precisions(typed["large"]) == wanted_precisions(typed["small"])
    first, second = graphs.load(typed["large"]), graphs.load(typed["small"])
    assert first.graph.node == second.graph.node
    values = graphs.constants(second)
    assert all(np.array_equal(value, values[name]) for name, value in graphs.constants(first).items())


@pytest.mark.usefixtures("lowered")
def test_emulated_half_precision_keeps_its_weights_beside_it(tmp_path: Path) -> None:
    source = saved(tmp_path)
    half = type_graph(
        source, unit_ranges(source), PrecisionRules(), Int8Rules(), Typing("tensorrt", "fp16"), tmp_path / "h.onnx", ()
    ).output
    emulated = emulate_fp16(half, tmp_path / "emulated.onnx")
    assert external_data.data_file(emulated).exists()
    assert 0 < graphs.disagreement(source, emulated, graphs.example_feeds(graphs.load(source))) < 0.01


@pytest.mark.usefixtures("lowered")
def test_tensorrt_for_rtx_reads_the_weights_beside_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgesam_deploy.runtime.bindings import use
    from edgesam_deploy.stages.compile import CompileOptions, compile_graph

    shape = (1, 8, WIDTH)
    contract = GraphContract((TensorSpec("x0", "float32", shape),), (TensorSpec("y", "float32", shape),))
    options = CompileOptions(compute_capabilities=("8.6",))
    plans = []
    for source in (saved(tmp_path / "large"), small(tmp_path / "small")):
        compile_graph(source, source.with_suffix(".engine"), contract, options, use("tensorrt_rtx"))
        plans.append(source.with_suffix(".engine").read_bytes())
    assert plans[0] == plans[1]


@pytest.fixture(scope="module")
def large_build(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny model built to FP32 with its encoder's weights over the limit, verified on one photograph."""
    from edgesam_deploy.stages.build import BuildOptions, build

    folder = tmp_path_factory.mktemp("large")
    (folder / "images").mkdir()
    shutil.copyfile(PHOTOS / "verify" / "dog.jpg", folder / "images" / "dog.jpg")
    options = BuildOptions(
        load_recipe(tiny_recipe),
        load_target("cpu"),
        "fp32",
        folder / "tiny-fp32",
        images=folder / "images",
        backend="onnxruntime",
    )

    def run() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(external_data, "LIMIT_BYTES", 1 << 20)
            return build(options)

    return SimpleNamespace(result=run(), again=run, bundle=options.output, stages=folder / ".stages" / "tiny-fp32")


def test_a_bundle_lists_hashes_and_runs_its_weights(large_build: SimpleNamespace, tmp_path: Path) -> None:
    assert large_build.result.passed
    files = json.loads((large_build.bundle / "manifest.json").read_text(encoding="utf-8"))["files"]
    data = large_build.bundle / "encoder.onnx.data"
    assert files["encoder.onnx.data"] == {"sha256": sha256_file(data), "size_bytes": data.stat().st_size}
    assert files["encoder.onnx"]["size_bytes"] < 1 << 20 < files["encoder.onnx.data"]["size_bytes"]
    with load_bundle(large_build.bundle).open() as predictor:
        predictor.set_image(np.zeros((40, 60, 3), dtype=np.uint8))
        assert predictor.predict(box=[5, 5, 30, 30]).masks.shape == (3, 40, 60)
    broken = tmp_path / "broken"
    shutil.copytree(large_build.bundle, broken)
    with (broken / "encoder.onnx.data").open("rb+") as file:
        file.write(b"\xff")
    with pytest.raises(BundleError, match=r"is broken: encoder\.onnx\.data has sha256"):
        load_bundle(broken)
    (broken / "encoder.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"is incomplete: encoder\.onnx\.data is missing"):
        load_bundle(broken)


def test_a_stage_whose_weights_were_altered_runs_again(large_build: SimpleNamespace) -> None:
    with (large_build.stages / "simplify-encoder" / "encoder.onnx.data").open("rb+") as file:
        file.write(b"\xff")
    reused = {run.name: run.reused for run in large_build.again().stages}
    assert reused["export"]
    assert reused["simplify-decoder"]
    assert not reused["simplify-encoder"]
