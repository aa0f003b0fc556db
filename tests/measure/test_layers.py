"""Layer listings of three versions, and the rules that tell a node's type, on lines that builders really wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgesam_deploy.errors import BackendError, InputError
from edgesam_deploy.measure.audit import audit
from edgesam_deploy.measure.layers import TensorInfo, layer_times, layers_from_inspector, layers_from_log

FOLDER = Path(__file__).parent / "layers"
STEM = "image_encoder.backbone.stem"
CONV = f"{STEM}.stem1.bn/node_Conv_628"


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def test_a_line_of_the_rtx_log() -> None:
    layers = layers_from_log(read("rtx_int8.log"))
    assert [layer.kind for layer in layers] == ["signal", "kgen", "correlation", "kgen", "maxpool", "kgen"]
    conv = layers[2]
    assert conv.name == f"{CONV}_myl0_3"
    nhwc = "(NHWC) Channel major format"
    assert conv.inputs == (TensorInfo("__mye6284getitem_before_bias.1_2_myl0", (1, 4, 512, 512), "int8", nhwc),)
    assert conv.constants == (
        TensorInfo("__mye12770_dconst_myl0", (16, 4, 3, 3), "int8", nhwc),
        TensorInfo("__mye11521dconst_myl0", (1, 16, 1, 1), "fp32", nhwc),
        TensorInfo("__mye11526dconst_myl0", (1, 16, 1, 1), "fp32", nhwc),
    )
    assert conv.outputs == (TensorInfo("__myln_k_arg__bb1_3_myl0", (1, 16, 256, 256), "fp32", nhwc),)
    assert conv.onnx_nodes == (CONV, "where:dq", f"{CONV}:weight_dq")
    assert (conv.tactic, conv.stream) == ("__myelin_CASK_STUB", 0)
    assert (layers[0].inputs, layers[0].onnx_nodes, layers[0].stream) == ((), (), 0)
    assert layers[4].stream == 1


def test_brackets_in_formats_dynamic_sizes_and_text_after_the_node() -> None:
    fusion, product, attention, shape, deconv, norm = layers_from_log(read("rtx_fp16.log"))
    assert fusion.onnx_nodes == (CONV, f"{STEM}.stem1.act/node_relu_affine")
    assert product.onnx_nodes == ("image_encoder.backbone.stages_2.blocks.0.aggregation.0.bn/node_Conv_672",)
    assert [t.format for t in attention.inputs] == [
        f"(Arbitrary) Format with stride order = [{order}]" for order in ("1,2,0", "1,0,2", "1,2,0")
    ]
    assert shape.outputs == ()
    assert deconv.inputs[0].shape == (-1, 256, 32, 32)
    assert [t.dtype for t in deconv.constants] == ["fp16", "fp32", "fp32", "fp16"]
    assert [t.dtype for t in norm.outputs] == ["fp32", "fp32"]


def test_tensorrt_10_names_type_and_layout_together_and_lists_constants_among_inputs() -> None:
    first, second, product, fusion = layers_from_log(read("trt10.log"))
    assert [(t.name, t.dtype) for t in first.inputs] == [("x", "fp32")]
    assert [t.shape for t in first.constants] == [(1, 10), (10, 10)]
    assert [t.dtype for t in second.constants] == ["fp16", "fp16"]
    assert second.outputs[0].dtype == "fp32"
    assert product.onnx_nodes == ("/encoder/layers.0/pos_ff/output/MatMul", "/encoder/layers.0/pos_ff/output/Add")
    wanted = {"/encoder/layers.0/pos_ff/output/MatMul": "fp16", "/encoder/layers.9/pos_ff/dense/MatMul": "int8"}
    found = audit((product, fusion), wanted, dict.fromkeys(wanted, "MatMul"))
    assert [(row.node, row.compiled) for row in found.mismatched] == [("/encoder/layers.9/pos_ff/dense/MatMul", "fp16")]


def test_inspector_json_of_tensorrt_10() -> None:
    quantize, conv, skip, copy = layers_from_inspector(read("trt10_inspector.json"))
    assert [t.dtype for t in (*quantize.inputs, *quantize.outputs)] == ["fp32", "int8"]
    assert conv.inputs[0].format == "Four wide channel vectorized row major Int8 format"
    assert conv.constants == (TensorInfo("Weights", (864,), "int8", ""),)
    assert conv.tactic == "volta_int8x4_icudnn_int8x4_128x32_relu_xregs_small_c32_nn_v1"
    assert [t.dtype for t in skip.inputs] == ["fp16", "fp16"]
    assert (copy.stream, copy.onnx_nodes) == (0, ())
    result = audit((quantize, conv, skip, copy), {})
    assert result.layers == {"CaskConvolution": {"int8": 1, "fp16": 1}, "Reformat": {"fp32": 2}}
    assert result.overhead == (quantize.name, copy.name)


def test_inspector_json_of_tensorrt_11_says_what_the_rtx_log_says() -> None:
    """The same convolution; the excerpt leaves out its last constant and last node."""
    (layer,) = layers_from_inspector(read("trt11_inspector.json"))
    logged = layers_from_log(read("rtx_int8.log"))[2]
    assert (layer.name, layer.kind, layer.inputs, layer.outputs) == (
        logged.name,
        logged.kind,
        logged.inputs,
        logged.outputs,
    )
    assert layer.constants == logged.constants[:2]
    assert layer.onnx_nodes == logged.onnx_nodes[:2]


@pytest.mark.parametrize(
    ("metadata", "nodes"),
    [
        ("", ()),
        ("[ONNX Layer: a/Conv]", ("a/Conv",)),
        ("[ONNX Layer: a][ONNX Layer: b][ONNX Layer: a]", ("a", "b")),
        ("[ONNX Layer: a]\x1f[ONNX Layer: b]", ("a", "b")),
        ("[ONNX Layer: a]\x1e[ONNX Layer: b[0]/c]", ("a", "b[0]/c")),
        ("[ONNX Layer: a]__gemm_from_conv1x1", ("a",)),
        ("[ONNX Layer: a[0]", ("a[0",)),
        ("[CONVOLUTION]-[aten_ops.convolution.default]-[/features/0/convolution]", ()),
    ],
)
def test_node_names_in_metadata(metadata: str, nodes: tuple[str, ...]) -> None:
    """A raw control character, as TensorRT 10 parts names by, is not valid JSON; it is read all the same."""
    text = f'{{"Layers": [{{"Name": "n", "LayerType": "kgen", "Metadata": "{metadata}"}}]}}'
    assert layers_from_inspector(text)[0].onnx_nodes == nodes


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("Half", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("BFloat16", "bf16"),
        ("Row major linear Int32 format", "int32"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_types_in_the_words_of_tensorrt_10(text: str, dtype: str) -> None:
    tensor = {"Name": "t", "Location": "Device", "Dimensions": [1], "Format/Datatype": text}
    layer = {"Name": "n", "LayerType": "Reformat", "Inputs": [tensor], "Outputs": []}
    assert layers_from_inspector(json.dumps({"Layers": [layer]}))[0].inputs[0].dtype == dtype


@pytest.mark.parametrize("text", ["", "Layers: 3", "Severity.VERBOSE\tEngine Layer Information:\nLayer(Myelin): {a}"])
def test_a_log_without_a_listing_is_refused(text: str) -> None:
    with pytest.raises(BackendError, match=r"one listing 'Layers:', holds 0.*VERBOSE"):
        layers_from_log(text)


def test_a_log_of_two_builds_is_refused() -> None:
    with pytest.raises(BackendError, match="holds 2"):
        layers_from_log(read("rtx_int8.log") + read("rtx_fp16.log"))


def test_a_cut_line_is_refused() -> None:
    with pytest.raises(BackendError, match="LayerType"):
        layers_from_log("Layers:\nName: a, LayerType: kgen, Inp")


def test_an_engine_that_tells_names_only_is_refused() -> None:
    with pytest.raises(BackendError, match=r"compile it again with ProfilingVerbosity\.DETAILED"):
        layers_from_inspector('{"Layers": ["Conv_0 + Relu_1", "MaxPool_2"], "Bindings": ["x"]}')


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}"])
def test_what_is_not_the_inspectors_json_is_refused(text: str) -> None:
    with pytest.raises(BackendError, match="engine inspector's JSON"):
        layers_from_inspector(text)


RELU, POOL = f"{STEM}.stem1.act/node_relu_affine", f"{STEM}.pool/node_max_pool2d"
MHA = "image_encoder.layers.1.blocks.0.attn"
NORM = "prompt_encoder.mask_downscaling.4/node_layer_norm_1"


@pytest.mark.parametrize(
    ("log", "node", "op", "wanted", "compiled", "right"),
    [
        # Reads int8 and int8, holds float scales, writes float: the kernels around it that name it do not count.
        ("rtx_int8.log", CONV, "Conv", "int8", "int8", True),
        ("rtx_int8.log", CONV, None, "int8", "int8", True),
        ("rtx_int8.log", CONV, "Conv", "fp32", "int8", False),
        # Reads the convolution's float, writes int8: the addition and the clipping happen in float.
        ("rtx_int8.log", RELU, "Clip", "fp32", "fp32", True),
        ("rtx_int8.log", RELU, "Clip", "fp16", "fp32", False),
        # Moves int8; its float constants are alpha and beta.
        ("rtx_int8.log", POOL, "MaxPool", "fp32", "int8", True),
        ("rtx_fp16.log", CONV, "Conv", "fp16", "fp16", True),
        ("rtx_fp16.log", CONV, "Conv", "int8", "fp16", False),
        ("rtx_fp16.log", CONV, "Conv", "fp32", "fp16", False),
        ("rtx_fp16.log", f"{MHA}/node_matmul", "MatMul", "fp16", "fp16", True),
        ("rtx_fp16.log", f"{MHA}/node_softmax", "Softmax", "fp32", "fp16", False),
        ("rtx_fp16.log", "mask_decoder.output_upscaling.0/node_convolution", "ConvTranspose", "fp16", "fp16", True),
        # Half in, float mean and variance out.
        ("rtx_fp16.log", NORM, "LayerNormalization", "fp16", "mixed", True),
    ],
)
def test_what_a_node_computes_in(log: str, node: str, op: str | None, wanted: str, compiled: str, right: bool) -> None:
    result = audit(layers_from_log(read(log)), {node: wanted}, {node: op} if op else None)
    (row,) = result.rows
    assert (row.compiled, row.reason is None) == (compiled, right)
    assert result.nodes == {compiled: 1}
    assert result.mismatched == (() if right else (row,))


def test_a_mismatch_says_where_and_what() -> None:
    (row,) = audit(layers_from_log(read("rtx_fp16.log")), {CONV: "int8"}).mismatched
    assert row.reason == "meant int8, layer __myl_CorrMaxMin_myl0_1 (runtime_fusion) computes in fp16"


def test_the_summary_of_an_engine() -> None:
    result = audit(layers_from_log(read("rtx_int8.log")), {CONV: "int8", "gone": "fp32"}, {CONV: "Conv"})
    assert result.missing == ("gone",)
    assert result.layers == {
        "signal": {"none": 1},
        "kgen": {"fp32": 2, "int8": 1},
        "correlation": {"int8": 1},
        "maxpool": {"int8": 1},
    }
    assert result.overhead == ("__myl_Move_myl0_12",)


def convolution(data: str, weight: str, *, kind: str = "CaskConvolution", skip: str | None = None) -> str:
    """The inspector's JSON of one layer, made up."""
    inputs = [{"Name": "x", "Dimensions": [1, 8, 4, 4], "Format/Datatype": data}]
    if skip is not None:
        inputs.append({"Name": "skip", "Dimensions": [1, 8, 4, 4], "Format/Datatype": skip})
    layer = {"Name": "Conv_0", "LayerType": kind, "Inputs": inputs, "Outputs": inputs[:1]}
    layer |= {"Weights": {"Type": weight, "Count": 576}, "Metadata": "[ONNX Layer: Conv_0]"}
    return json.dumps({"Layers": [layer]})


@pytest.mark.parametrize(
    ("data", "weight", "skip", "compiled"),
    [
        ("Int8", "Int8", None, "int8"),
        ("Int8", "Int8", "Half", "int8"),
        ("Half", "Int8", None, "mixed"),
        ("Half", "Half", "Int8", "fp16"),
        ("N/A due to dynamic shapes", "Int8", None, "mixed"),
    ],
)
def test_operands_are_the_activation_and_the_weight(data: str, weight: str, skip: str | None, compiled: str) -> None:
    layers = layers_from_inspector(convolution(data, weight, skip=skip))
    result = audit(layers, {"Conv_0": "int8"}, {"Conv_0": "Conv"})
    assert result.nodes == {compiled: 1}
    assert bool(result.mismatched) == (compiled != "int8")


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="int8, fp16, fp32, got 'half'"):
        audit((), {"a": "half"})


def test_layer_times() -> None:
    first, second = layer_times([{"a": 1.0, "b": 2.0}, {"b": 4.0, "a": 1.0}, {"a": 4.0, "b": 12.0}])
    assert (first.name, first.mean_ms, first.median_ms, first.share) == ("a", 2.0, 1.0, 0.25)
    assert (second.name, second.mean_ms, second.median_ms, second.share) == ("b", 6.0, 4.0, 0.75)


@pytest.mark.parametrize("samples", [[], [{}], [{"a": 1.0}, {"b": 1.0}], [{"a": 1.0}, {"a": 1.0, "b": 1.0}]])
def test_layer_times_of_nothing_or_of_two_engines_are_refused(samples: list[dict[str, float]]) -> None:
    with pytest.raises(InputError, match="profiled run"):
        layer_times(samples)
