"""What a typed graph means, and that a real builder compiled it so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")

from onnx import TensorProto, helper, numpy_helper

from edgesam_deploy.errors import GraphError
from edgesam_deploy.measure.audit import audit
from edgesam_deploy.measure.layers import CompiledLayer, layers_from_log
from edgesam_deploy.stages.typed_nodes import operators, wanted_precisions

CHANNELS = 32
# A process of its own: TensorRT uses the first logger of a process for all that follows.
BUILD = """
import sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def log(self, severity, message):
        messages.append(message)

messages, log = [], None
log = Log()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
assert parser.parse(open(sys.argv[1], "rb").read()), parser.get_error(0).desc()
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
assert builder.build_serialized_network(network, config) is not None, messages[-1]
print("\\n".join(messages))
"""


def write_graph(path: Path, *, named: bool = True) -> Path:
    """x → Conv in FP32 → Q/DQ, Conv in INT8 → Cast, Conv in FP16, Relu → Cast → y."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
    constants = {
        "w32": weight,
        "w16": weight.astype(np.float16),
        "w8": rng.integers(-127, 128, weight.shape).astype(np.int8),
        "scale": np.array(0.05, dtype=np.float32),
        "scales": np.full(CHANNELS, 0.01, dtype=np.float32),
    }
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w32"], ["a"], name="a/Conv", **pads),
        helper.make_node("QuantizeLinear", ["a", "scale"], ["a_q"], name="a_q"),
        helper.make_node("DequantizeLinear", ["a_q", "scale"], ["a_dq"], name="a_dq"),
        helper.make_node("DequantizeLinear", ["w8", "scales"], ["w_dq"], name="w_dq", axis=0),
        helper.make_node("Conv", ["a_dq", "w_dq"], ["b"], name="b/Conv", **pads),
        helper.make_node("Cast", ["b"], ["b16"], name="b16", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["b16", "w16"], ["c"], name="c/Conv", **pads),
        helper.make_node("Relu", ["c"], ["d"], name="c/Relu" if named else ""),
        helper.make_node("Cast", ["d"], ["y"], name="y", to=TensorProto.FLOAT),
    ]
    # int8, not QuantizeLinear's default uint8, by a zero point of that type.
    constants["zero"] = np.array(0, dtype=np.int8)
    for node in nodes[1:3]:
        node.input.append("zero")
    shape = (1, CHANNELS, 16, 16)
    graph = helper.make_graph(
        nodes,
        "typed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


WANTED = {"a/Conv": "fp32", "b/Conv": "int8", "c/Conv": "fp16", "c/Relu": "fp16"}


def test_what_a_typed_graph_means(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "typed.onnx")
    assert wanted_precisions(graph) == WANTED
    assert operators(graph)["c/Relu"] == "Relu"


def test_a_node_without_a_name_is_called_as_tensorrt_calls_it(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "typed.onnx", named=False)
    assert wanted_precisions(graph)["node_of_d"] == "fp16"


def test_one_quantized_operand_is_not_int8(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "typed.onnx")
    model = onnx.load(path)
    model.graph.node[4].input[0] = "a"
    path.write_bytes(model.SerializeToString())
    assert wanted_precisions(path)["b/Conv"] == "fp32"


def test_the_cpu_encoding_means_the_same(tmp_path: Path) -> None:
    """uint8 is INT8 with another zero point; so is a Clip between rounding and reading back, which has no float."""
    path = write_graph(tmp_path / "typed.onnx")
    model = onnx.load(path)
    (zero,) = [i for i in model.graph.initializer if i.name == "zero"]
    zero.CopyFrom(numpy_helper.from_array(np.array(128, dtype=np.uint8), "zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(128, dtype=np.uint8), "low"))
    model.graph.node.insert(2, helper.make_node("Clip", ["a_q", "low"], ["a_clip"], name="a/Relu"))
    model.graph.node[3].input[0] = "a_clip"
    path.write_bytes(model.SerializeToString())
    assert wanted_precisions(path) == {"a/Conv": "fp32", "a/Relu": "int8", **WANTED}


def test_shapes_and_views_are_not_audited(tmp_path: Path) -> None:
    """Shape and Gather compute on integers, Reshape computes nothing; the comparison computes on its float input."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="Shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="Gather"),
        helper.make_node("Unsqueeze", ["n", "axis"], ["m"], name="Unsqueeze"),
        helper.make_node("Reshape", ["x", "m"], ["r"], name="Reshape"),
        helper.make_node("Less", ["r", "r"], ["y"], name="Less"),
    ]
    constants = {"zero": np.array(0), "axis": np.array([0])}
    graph = helper.make_graph(
        nodes,
        "shapes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4])],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, ["n"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path = tmp_path / "shapes.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10).SerializeToString()
    )
    assert wanted_precisions(path) == {"Less": "fp16"}


def test_nodes_of_one_name_that_differ_are_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "typed.onnx")
    model = onnx.load(path)
    model.graph.node[4].name = "a/Conv"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="'a/Conv', are typed differently"):
        wanted_precisions(path)


@pytest.fixture(scope="module", params=[True, False], ids=["named", "nameless-relu"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The typed graph, and what TensorRT for RTX logs when it builds it; needs no GPU."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs TensorRT for RTX")
    graph = write_graph(tmp_path_factory.mktemp("typed") / "typed.onnx", named=request.param)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(graph)], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode and "ImportError" in done.stderr:
        pytest.skip("TensorRT for RTX does not load here")
    assert done.returncode == 0, done.stderr
    return graph, done.stdout


def layers_of(compiled: tuple[Path, str]) -> tuple[CompiledLayer, ...]:
    return layers_from_log(compiled[1])


def test_a_real_builder_computes_as_the_graph_means(compiled: tuple[Path, str]) -> None:
    wanted = wanted_precisions(compiled[0])
    result = audit(layers_of(compiled), wanted, operators(compiled[0]))
    assert {row.node: row.compiled for row in result.rows} == wanted
    assert (result.mismatched, result.missing) == ((), ())


@pytest.mark.parametrize(
    ("node", "wanted", "compiled_as"),
    [("a/Conv", "int8", "fp32"), ("a/Conv", "fp16", "fp32"), ("b/Conv", "fp16", "int8"), ("c/Conv", "int8", "fp16")],
)
def test_a_node_meant_otherwise_is_listed(compiled: tuple[Path, str], node: str, wanted: str, compiled_as: str) -> None:
    """Planted mistakes: the graph says one type, the audit is told another."""
    meant = {**wanted_precisions(compiled[0]), node: wanted}
    (row,) = audit(layers_of(compiled), meant, operators(compiled[0])).mismatched
    assert (row.node, row.wanted, row.compiled) == (node, wanted, compiled_as)
    assert row.reason is not None
    assert row.reason.startswith(f"meant {wanted}, layer ")
    assert row.reason.endswith(f"computes in {compiled_as}")
