"""What a typed ONNX graph asks of a device: kernels with their operations and bytes, for ``measure.roofline``.

Counted is the typed graph itself, in TensorRT's encoding, so that a boundary between precisions costs what it costs: a
convolution in FP16 between two in INT8 reads and writes twice the bytes. The fusions that are taken for granted:

- Q and DQ belong to their neighbours: a node reads a tensor behind a DQ as INT8, and writes one as INT8 whose readers
  all read it through Q. A Q beside readers in float is a kernel of its own.
- Pointwise operators (``POINTWISE``) are computed by the node that multiplies, or the pointwise one, whose output they
  alone read; where that holds for two inputs, as in a residual addition, by the later one.
- Views (Reshape and the like) and what is computed on constants or shapes cost nothing.

Everything else is a kernel. Engines also fuse attention and leave out concatenations: that is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from edgesam_deploy.contract import POINTS_AXIS, PROMPTS_AXIS
from edgesam_deploy.measure.roofline import Efficiency, GraphCost, Kernel, price
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.placement import WEIGHTED, groups_of
from edgesam_deploy.stages.shapes import TensorType, tensor_types
from edgesam_deploy.stages.typed_nodes import node_name
from edgesam_deploy.target import Device

# fmt: off
POINTWISE = frozenset((
    "Abs", "Add", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "Not", "PRelu", "Pow", "Reciprocal",
    "Relu", "Round", "Sigmoid", "Sin", "Softplus", "Sqrt", "Sub", "Tanh", "Where",
))
# fmt: on
VIEWS = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_INT8 = (TensorProto.INT8, TensorProto.UINT8)
_FLOATS: dict[int, str] = {TensorProto.FLOAT16: "fp16", TensorProto.FLOAT: "fp32"}
# One click, which the prompt encoder pads to two points.
PROMPTS, POINTS = 1, 2


def node_macs(graph: Path, prompts: int = PROMPTS, points: int = POINTS) -> dict[str, int]:
    """Multiply-adds by name of every node that multiplies (Conv, ConvTranspose, Gemm, MatMul), in graph order.

    prompts, points: sizes of the decoder's dynamic axes. Raises GraphError where a shape cannot be told.
    """
    model = graphs.load(graph)
    types = tensor_types(model, {PROMPTS_AXIS: prompts, POINTS_AXIS: points})
    return {node_name(node): macs(node, types) for node in model.graph.node if node.op_type in WEIGHTED}


def graph_cost(
    graph: Path, device: Device, efficiency: Efficiency | None = None, prompts: int = PROMPTS, points: int = POINTS
) -> GraphCost:
    """What a typed graph would take on a device. Raises GraphError where a shape cannot be told."""
    return price(kernels(graphs.load(graph), prompts, points), device, efficiency)


def macs(node: onnx.NodeProto, types: Mapping[str, TensorType]) -> int:
    """Multiply-adds of one node that multiplies, its bias not counted; 0 for any other."""
    if node.op_type not in WEIGHTED:
        return 0
    first, second, output = types[node.input[0]], types[node.input[1]], types[node.output[0]]
    if node.op_type == "Conv":  # weight (M, C/groups, k…): each output element takes C/groups · k…
        return output.elements * math.prod(second.shape[1:])
    if node.op_type == "ConvTranspose":  # weight (C, M/groups, k…): each input element goes into M/groups · k…
        return first.elements * math.prod(second.shape[1:])
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return output.elements * first.shape[0 if transposed else 1]
    return output.elements * first.shape[-1]


def kernels(model: onnx.ModelProto, prompts: int = PROMPTS, points: int = POINTS) -> list[Kernel]:
    """The kernels of a typed graph, in graph order."""
    reading = _Reading(model, tensor_types(model, {PROMPTS_AXIS: prompts, POINTS_AXIS: points}))
    made: dict[str, _Group] = {}
    found: list[_Group] = []
    for index, node in enumerate(model.graph.node):
        if reading.free(node):
            continue
        group = _joined(node, made, reading)
        if group is None:
            group = _Group()
            found.append(group)
        group.nodes.append(node)
        group.last = index
        made |= dict.fromkeys(node.output, group)
    return [_kernel(group, reading) for group in found]


@dataclass(slots=True)
class _Group:
    """Nodes of one kernel, in graph order; last: the position of the latest."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    last: int = 0

    @property
    def open(self) -> bool:
        return self.nodes[0].op_type in WEIGHTED or self.nodes[0].op_type in POINTWISE


class _Reading:
    """How nodes of a typed graph read and write its tensors."""

    def __init__(self, model: onnx.ModelProto, types: Mapping[str, TensorType]) -> None:
        self.types = types
        self.users, self.made_by = graphs.consumers(model), graphs.producers(model)
        self.outputs = {o.name for o in model.graph.output}
        self.constants = {i.name for i in model.graph.initializer}
        for node in model.graph.node:
            if all(name in self.constants for name in node.input if name):
                self.constants.update(node.output)

    def free(self, node: onnx.NodeProto) -> bool:
        """Whether a node is no work of its own."""
        output = node.output[0]
        if output in self.constants or node.op_type in VIEWS or node.op_type == "DequantizeLinear":
            return True
        if node.op_type == "QuantizeLinear":
            origin = self._origin(node.input[0])
            return origin in self.made_by and self._only_quantized(origin)
        return self.types[output].element not in (*_FLOATS, *_INT8)  # shapes, indices and comparisons

    def sole_reader(self, name: str) -> bool:
        return len(self.users.get(name, ())) == 1 and name not in self.outputs

    def stored(self, name: str) -> int:
        """The element type in which a node finds a tensor."""
        source = self.made_by.get(name)
        if source is not None and (source.op_type == "DequantizeLinear" or source.op_type in VIEWS):
            return self.stored(source.input[0])
        return self.types[name].element

    def precision(self, names: Iterable[str]) -> str:
        """Of work on tensors: INT8 if all are stored as that, else the widest float type among them."""
        found = {TensorProto.INT8 if self._only_quantized(n) else self.stored(n) for n in names}
        if found <= set(_INT8):
            return "int8"
        return "fp32" if TensorProto.FLOAT in found else "fp16"

    def read_bytes(self, names: Iterable[str]) -> int:
        return sum(self._bytes(name, self.stored(name)) for name in dict.fromkeys(names) if name)

    def written_bytes(self, name: str) -> int:
        return self._bytes(name, TensorProto.INT8 if self._only_quantized(name) else self.types[name].element)

    def _bytes(self, name: str, element: int) -> int:
        return TensorType(self.types[name].shape, element).bytes

    def _origin(self, name: str) -> str:
        source = self.made_by.get(name)
        return self._origin(source.input[0]) if source is not None and source.op_type in VIEWS else name

    def _only_quantized(self, name: str) -> bool:
        readers = self.users.get(name, [])
        return (
            bool(readers)
            and name not in self.outputs
            and all(
                r.op_type == "QuantizeLinear" or (r.op_type in VIEWS and self._only_quantized(r.output[0]))
                for r in readers
            )
        )


def _joined(node: onnx.NodeProto, made: Mapping[str, _Group], reading: _Reading) -> _Group | None:
    """The group that computes a pointwise node beside its own work, if there is one."""
    if node.op_type not in POINTWISE:
        return None
    groups = [made[name] for name in node.input if name in made and made[name].open and reading.sole_reader(name)]
    return max(groups, key=lambda group: group.last, default=None)


def _kernel(group: _Group, reading: _Reading) -> Kernel:
    head, tail = group.nodes[0], group.nodes[-1]
    inside = {name for node in group.nodes for name in node.output}
    # The scale and zero point of a Q are not worth counting.
    read = [n for node in group.nodes for n in (node.input[:1] if node.op_type in _QDQ else node.input)]
    moved = reading.read_bytes(n for n in read if n not in inside)
    moved += sum(reading.written_bytes(name) for name in tail.output if name)
    weighted = head.op_type in WEIGHTED
    return Kernel(
        node=node_name(head),
        fused=tuple(node_name(node) for node in group.nodes[1:]),
        operations=2 * macs(head, reading.types),
        bytes=moved,
        precision=reading.precision(head.input[:2] if weighted else tail.output[:1]),
        dense=weighted and groups_of(head) == 1,
    )
