"""Typed graphs: INT8 on what was chosen, one float type on the rest, every exception with its reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.errors import GraphError, InputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.recipe import Int8Rules, PrecisionRules
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.fp16 import emulate_fp16
from edgesam_deploy.stages.placement import ATTENTION, DEPTHWISE, POINT_ENCODING, TRANSPOSED, eligible
from edgesam_deploy.stages.quantize import MIN_SCALE, NEVER_SEEN, NOT_CHOSEN, quantize
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.stages.typed_nodes import wanted_precisions

FP32 = Typing("tensorrt", "fp32")
FP16 = Typing("tensorrt", "fp16")


@pytest.fixture(scope="module")
def ranges(both_ranges: dict[str, Ranges]) -> dict[str, Ranges]:
    return both_ranges


def source(built: SimpleNamespace, name: str) -> Path:
    return built.stages / f"simplify-{name}" / f"{name}.onnx"


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("how", [FP32, FP16, Typing("cpu", "fp32")], ids=["fp32-rest", "fp16-rest", "cpu"])
def test_int8_is_where_it_was_asked_for(
    built: SimpleNamespace, ranges: dict[str, Ranges], tmp_path: Path, name: str, how: Typing
) -> None:
    """Half of what may be INT8 is; every other node that multiplies says why not."""
    model = graphs.load(source(built, name))
    allowed, refused = eligible(model, Int8Rules())
    chosen = allowed[::2]
    result = type_graph(
        source(built, name), ranges[name], PrecisionRules(), Int8Rules(), how, tmp_path / "t.onnx", chosen
    )
    assert list(result.int8) == chosen
    meant = wanted_precisions(result.output)
    assert all(meant[node] == "int8" for node in chosen)
    assert all(meant[node] == how.rest for node in allowed[1::2])
    weighted = [n.name for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    assert set(result.reasons) >= set(weighted) - set(chosen)
    assert {result.reasons[n] for n in allowed[1::2]} == {NOT_CHOSEN}
    assert set(refused) <= set(result.reasons)


def test_the_decoders_exceptions_have_their_reasons(built: SimpleNamespace) -> None:
    _, refused = eligible(graphs.load(source(built, "decoder")), Int8Rules())
    assert set(refused.values()) == {POINT_ENCODING, ATTENTION, TRANSPOSED}
    _, refused = eligible(graphs.load(source(built, "decoder")), Int8Rules(attention=True, conv_transpose=True))
    assert set(refused.values()) == {POINT_ENCODING}
    _, refused = eligible(graphs.load(source(built, "encoder")), Int8Rules(depthwise=False, keep=(r"\.fuse\.",)))
    assert set(refused.values()) == {DEPTHWISE, r"the recipe keeps '\.fuse\.'"}


@pytest.mark.parametrize("rules", [Int8Rules(), Int8Rules(attention=True, conv_transpose=True, residual_add="all")])
def test_fp16_beside_int8_costs_what_fp16_costs(
    built: SimpleNamespace, ranges: dict[str, Ranges], tmp_path: Path, rules: Int8Rules
) -> None:
    """The emulated device graph answers as the FP32-rest graph does, to half's precision."""
    for name in ("encoder", "decoder"):
        files = {}
        for how in (FP32, FP16):
            path = tmp_path / f"{name}-{how.rest}.onnx"
            own = ranges[name]
            if rules.attention or rules.conv_transpose:  # tensors that calibration had no reason to watch
                own = dataclasses.replace(own, amax={**own.absmax, **own.amax})
            files[how.rest] = type_graph(source(built, name), own, PrecisionRules(), rules, how, path).output
        emulated = emulate_fp16(files["fp16"], tmp_path / "emulated.onnx")
        feeds = graphs.example_feeds(graphs.load(source(built, name)))
        with open_session(files["fp32"]) as a, open_session(emulated) as b:
            for key, value in a.run(feeds).items():
                got = b.run(feeds)[key]
                assert np.isfinite(got).all()
                assert np.corrcoef(got.ravel(), value.ravel())[0, 1] > 0.995


def test_scales_are_fp16_numbers_in_every_variant(
    built: SimpleNamespace, ranges: dict[str, Ranges], tmp_path: Path
) -> None:
    """One set of scales: those of the FP32 graph are already what FP16 can hold, and never below what they cover."""
    found = {}
    for how in (FP32, FP16):
        path = tmp_path / f"{how.rest}.onnx"
        type_graph(source(built, "encoder"), ranges["encoder"], PrecisionRules(), Int8Rules(), how, path)
        model = graphs.load(path)
        values = graphs.constants(model)
        names = {n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        found[how.rest] = {name: values[name] for name in names}
    assert found["fp32"].keys() == found["fp16"].keys()
    for name, scale in found["fp32"].items():
        assert scale.dtype == np.float32
        assert found["fp16"][name].dtype == np.float16
        np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
        np.testing.assert_array_equal(found["fp16"][name].astype(np.float32), scale)
        assert (scale >= MIN_SCALE).all()
    tensor = next(t for t, largest in ranges["encoder"].amax.items() if f"{t}:scale" in found["fp32"] and largest > 0)
    assert float(found["fp32"][f"{tensor}:scale"]) * 127 >= ranges["encoder"].amax[tensor]


def test_what_leaves_fp16_is_not_int8_there(built: SimpleNamespace, ranges: dict[str, Ranges], tmp_path: Path) -> None:
    """A convolution that returns 40,000 stays FP32 as a whole beside FP16, and is INT8 beside FP32."""
    node = next(n for n in graphs.load(source(built, "encoder")).graph.node if n.op_type == "Conv")
    absmax = {**ranges["encoder"].absmax, node.output[0]: 40_000.0}
    own = dataclasses.replace(ranges["encoder"], absmax=absmax)
    for how, is_int8 in ((FP32, True), (FP16, False)):
        result = type_graph(
            source(built, "encoder"), own, PrecisionRules(), Int8Rules(), how, tmp_path / f"{how.rest}.onnx"
        )
        assert (node.name in result.int8) == is_int8
        if not is_int8:
            assert "reaches 4e+04" in result.reasons[node.name]
            assert wanted_precisions(result.output)[node.name] == "fp32"


def test_a_tensor_that_was_always_zero_is_not_quantized(
    built: SimpleNamespace, ranges: dict[str, Ranges], tmp_path: Path
) -> None:
    """Its scale would be nothing, and the first value that differs from zero would saturate."""
    node = next(n for n in graphs.load(source(built, "encoder")).graph.node if n.op_type == "Conv")
    own = dataclasses.replace(ranges["encoder"], amax={**ranges["encoder"].amax, node.input[0]: 0.0})
    result = quantize(source(built, "encoder"), own, Int8Rules(), tmp_path / "q.onnx")
    assert result.reasons == {node.name: NEVER_SEEN}


def test_products_and_transposed_convolutions_by_rule(tmp_path: Path) -> None:
    """x -> ConvTranspose -> x·xᵀ: in float by default, INT8 where the rules say so, and then close to FP32."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["up"], name="up", strides=[2, 2]),
        helper.make_node("Transpose", ["up"], ["t"], name="t", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["up", "t"], ["y"], name="product"),
    ]
    weight = numpy_helper.from_array(rng.normal(size=(4, 6, 2, 2)).astype(np.float32), "w")
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 16, 16]),
    ]
    path = tmp_path / "net.onnx"
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    graphs.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path, {})
    feeds = graphs.example_feeds(graphs.load(path))
    amax = {"x": 1.0, "up": 8.0, "t": 8.0}
    own = Ranges(1, "", "minmax", 100.0, sha256_file(path), amax, amax)
    plain = quantize(path, own, Int8Rules(), tmp_path / "plain.onnx")
    assert (plain.int8, set(plain.reasons)) == ((), {"up", "product"})
    result = quantize(path, own, Int8Rules(conv_transpose=True, attention=True), tmp_path / "int8.onnx")
    assert (result.int8, result.reasons) == (("up", "product"), {})
    assert 0 < graphs.disagreement(path, result.output, feeds) < 0.05


def test_wrong_requests_are_refused(built: SimpleNamespace, ranges: dict[str, Ranges], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CPU encoding"):
        Typing("cpu", "fp16")
    with pytest.raises(InputError, match="rest must be one of"):
        Typing("cpu", "int4")
    with pytest.raises(GraphError, match="no such node"):
        quantize(source(built, "encoder"), ranges["encoder"], Int8Rules(), tmp_path / "q.onnx", ["nothing"])
    with pytest.raises(GraphError, match="point encoding"):
        quantize(source(built, "decoder"), ranges["decoder"], Int8Rules(), tmp_path / "q.onnx", ["/node_matmul"])
