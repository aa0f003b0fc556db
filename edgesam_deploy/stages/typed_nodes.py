"""What a typed ONNX graph means each of its nodes to compute in: the yardstick for auditing a compiled engine."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from edgesam_deploy.errors import GraphError
from edgesam_deploy.measure.audit import WEIGHTED
from edgesam_deploy.stages import graph as graphs

_FLOATS: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}
_INTEGERS = (TensorProto.INT8, TensorProto.UINT8)
# They compute nothing: conversions, constants, shapes, and other views of the same numbers.
_NOT_AUDITED = {"QuantizeLinear", "DequantizeLinear", "Cast", "Constant", "ConstantOfShape", "Shape", "Size"}
_NOT_AUDITED |= {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}


def wanted_precisions(graph: Path) -> dict[str, str]:
    """Node name → "int8", "fp16" or "fp32", for every node that computes on floats.

    A Conv, ConvTranspose, Gemm or MatMul whose two operands come straight from DequantizeLinear of int8 (of uint8 in
    the CPU encoding) is "int8", whether or not its output is rounded too; so is an operator that reads what a
    QuantizeLinear wrote, such as the Clip that stands for a Relu in the CPU encoding. Any other node has the float type
    of its first output, or of an input where it has none (a comparison). Raises GraphError where shape inference cannot
    tell a type, and for nodes of one name that differ.
    """
    model = graphs.load(graph, weights=False)
    types = _element_types(model)
    made_by = graphs.producers(model)
    wanted: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in _NOT_AUDITED:
            continue
        unknown = [name for name in (*node.output, *node.input) if name and name not in types]
        if unknown:
            raise GraphError(
                f"{graph}: shape inference does not tell the type of '{unknown[0]}' of node '{node_name(node)}'; "
                "simplify the graph first"
            )
        floats = [_FLOATS[types[t]] for t in (*node.output, *node.input) if t and types[t] in _FLOATS]
        quantized = _is_int8(node, made_by, types)
        if not floats and not quantized:
            continue
        meant = "int8" if quantized else floats[0]
        if wanted.setdefault(node_name(node), meant) != meant:
            raise GraphError(f"{graph}: nodes of one name, '{node_name(node)}', are typed differently; name every node")
    return wanted


def operators(graph: Path) -> dict[str, str]:
    """Node name → operator, for every node."""
    return {node_name(node): node.op_type for node in graphs.load(graph, weights=False).graph.node}


def node_name(node: onnx.NodeProto) -> str:
    """As TensorRT's parser calls it: a node without a name is called after its first output."""
    return node.name or f"node_of_{node.output[0]}"


def _is_int8(node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto], types: dict[str, int]) -> bool:
    def dequantized(name: str) -> bool:
        source = made_by.get(name)
        return source is not None and source.op_type == "DequantizeLinear" and types.get(source.input[0]) in _INTEGERS

    if node.op_type in WEIGHTED:
        return all(dequantized(name) for name in node.input[:2])
    reads = made_by.get(node.input[0]) if node.input else None
    return reads is not None and reads.op_type == "QuantizeLinear"


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = graphs.inferred(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    types |= {i.name: i.data_type for i in model.graph.initializer}
    return {name: kind for name, kind in types.items() if kind != TensorProto.UNDEFINED}
