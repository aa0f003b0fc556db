"""Where Q/DQ may go: which nodes compute in INT8 by a set of rules, and which tensors that makes them read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import onnx

from edgesam_deploy.recipe import Int8Rules
from edgesam_deploy.stages import graph as graphs

# Operators that multiply; INT8 exists for them and gains where they are.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators whose output holds only values of their inputs: one scale serves both sides.
SAME_RANGE = ("Concat", "MaxPool", "Pad")

RULE = "rule: "
OF_WEIGHTS = f"{RULE}computes on weights alone, once"
POINT_ENCODING = "point encoding: its coordinates need more than 8 bits"
TRANSPOSED = f"{RULE}conv_transpose = false: TensorRT for RTX keeps transposed convolutions in float"
ATTENTION = f"{RULE}attention = false: a product of two activations gains little and loses most"
DEPTHWISE = f"{RULE}depthwise = false: grouped convolutions gain nothing in INT8 here"


def eligible(model: onnx.ModelProto, rules: Int8Rules) -> tuple[list[str], dict[str, str]]:
    """(names of the nodes that may be INT8, in graph order; every other node that multiplies, with the reason)."""
    values, encoding = graphs.constants(model), point_encoding(model)
    chosen: list[str] = []
    refused: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED:
            continue
        reason = POINT_ENCODING if node.name in encoding else _refusal(node, values, rules)
        if reason is None:
            chosen.append(node.name)
        else:
            refused[node.name] = reason
    return chosen, refused


def weight_of(node: onnx.NodeProto, values: Mapping[str, Any]) -> str | None:
    """The name of the constant weight (two axes at least) of a node that multiplies, or None."""
    if node.op_type in WEIGHTED and node.input[1] in values and values[node.input[1]].ndim >= 2:
        return str(node.input[1])
    return None


def channel_axis(node: onnx.NodeProto) -> int:
    """The output channel axis of a weight: what INT8 scales of weights run along."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)):
        return 0
    return 1


def groups_of(node: onnx.NodeProto) -> int:
    """The ``group`` attribute of a convolution; 1 for any other node."""
    return int(next((a.i for a in node.attribute if a.name == "group"), 1))


def point_encoding(model: onnx.ModelProto) -> set[str]:
    """Names of the Sin and Cos nodes and of every node they depend on."""
    made_by = graphs.producers(model)
    found: set[str] = set()
    waiting = [n for n in model.graph.node if n.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [made_by[name] for name in node.input if name in made_by]
    return found


def activation_inputs(node: onnx.NodeProto, values: Mapping[str, Any]) -> list[int]:
    """Indices of the inputs of an INT8 node that are activations."""
    return [0] if weight_of(node, values) is not None else [0, 1]


def carried_inputs(node: onnx.NodeProto) -> range:
    """Indices of the inputs of a ``SAME_RANGE`` node whose values appear in its output (not the pads of a Pad)."""
    return range(len(node.input) if node.op_type == "Concat" else 1)


def add_inputs(model: onnx.ModelProto, chosen: Collection[str], rules: Int8Rules) -> list[tuple[onnx.NodeProto, int]]:
    """(Add, input index) that read INT8 by ``rules.residual_add``, given the names of the INT8 nodes.

    "conv": where one input, through Relu or Clip at most, is an INT8 convolution's. An input that nobody else reads and
    that is the convolution's direct output stays as it is, one at most: TensorRT fuses it with the addition. "all":
    both inputs of every addition of two activations.
    """
    made_by, users = graphs.producers(model), graphs.consumers(model)

    def convolution(name: str) -> onnx.NodeProto | None:
        node = made_by.get(name)
        if node is not None and node.op_type in ("Clip", "Relu"):
            node = made_by.get(node.input[0])
        return node if node is not None and node.op_type == "Conv" and node.name in chosen else None

    found: list[tuple[onnx.NodeProto, int]] = []
    for add in model.graph.node:
        if add.op_type != "Add" or not all(name in made_by for name in add.input) or rules.residual_add == "none":
            continue
        if rules.residual_add == "all":
            found += [(add, 0), (add, 1)]
            continue
        branches = [convolution(name) for name in add.input]
        if not any(branches):
            continue
        direct = [
            i
            for i, (conv, name) in enumerate(zip(branches, add.input, strict=True))
            if conv is not None and conv.output[0] == name and len(users[name]) == 1
        ]
        found += [(add, i) for i in range(len(add.input)) if i not in direct[:1]]
    return found


def quantizable(model: onnx.ModelProto, rules: Int8Rules) -> set[str]:
    """Tensors that some choice of INT8 nodes within the rules gives a scale: those whose distribution matters."""
    values, made_by = graphs.constants(model), graphs.producers(model)
    chosen = set(eligible(model, rules)[0])
    names: set[str] = set()
    for node in model.graph.node:
        if node.name in chosen:
            names |= {node.input[i] for i in activation_inputs(node, values)}
            names.add(node.output[0])  # the CPU twin rounds it where it is read in float
        elif node.op_type in SAME_RANGE:
            names |= {node.output[0], *(node.input[i] for i in carried_inputs(node))}
    names |= {add.input[index] for add, index in add_inputs(model, chosen, rules)}
    return names & {*made_by, *(i.name for i in model.graph.input)}


def _refusal(node: onnx.NodeProto, values: Mapping[str, Any], rules: Int8Rules) -> str | None:
    """Why a node that multiplies may not be INT8, or None if it may."""
    for pattern in rules.keep:
        if re.search(pattern, node.name):
            return f"the recipe keeps '{pattern}'"
    if node.input[0] in values:
        return OF_WEIGHTS
    if node.op_type == "ConvTranspose" and not rules.conv_transpose:
        return TRANSPOSED
    if weight_of(node, values) is None:
        if node.op_type != "MatMul":
            return f"{RULE}its weight is computed, not a constant"
        return None if rules.attention else ATTENTION
    if groups_of(node) > 1 and (not rules.depthwise or node.op_type == "ConvTranspose"):
        return DEPTHWISE
    return None
