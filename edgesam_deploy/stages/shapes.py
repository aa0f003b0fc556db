"""Concrete shapes of every tensor of a graph, its dynamic axes set to given sizes.

ONNX's own inference stops at a Reshape whose target is computed (decoders compute it from the number of prompts). Here
shapes are inferred node by node, and small integer tensors that follow from shapes alone are computed on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import defs, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from edgesam_deploy.errors import GraphError

# Larger integer tensors are data, not shapes.
_MAX_FOLDED = 256
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)


@dataclass(frozen=True, slots=True)
class TensorType:
    """shape: elements along each axis, () for a scalar. element: ``onnx.TensorProto`` data type."""

    shape: tuple[int, ...]
    element: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * int(onnx.helper.tensor_dtype_to_np_dtype(self.element).itemsize)


def tensor_types(model: onnx.ModelProto, axes: Mapping[str, int]) -> dict[str, TensorType]:
    """Type by tensor name: inputs, initializers and what every node writes.

    axes: size by name of a dynamic axis. Raises GraphError for a dynamic axis without a size and for a tensor whose
    shape depends on values.
    """
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    protos = {i.name: onnx.helper.make_tensor_type_proto(i.data_type, i.dims) for i in model.graph.initializer}
    # Of any type: the scales of a Resize are floats.
    constants = (i for i in model.graph.initializer if math.prod(i.dims) <= _MAX_FOLDED)
    known: dict[str, onnx.TensorProto] = {i.name: i for i in constants}
    for value in model.graph.input:
        if value.name not in protos:
            protos[value.name] = _sized(value, axes)
    for node in model.graph.node:
        found = _outputs(node, protos, known, opset, model)
        for name in node.output:
            if name:
                if not _concrete(found.get(name)):
                    raise GraphError(
                        f"the shape of '{name}' ({node.op_type} '{node.name}') depends on values: simplify the graph"
                    )
                protos[name] = found[name]
        _fold(node, protos, known, model)
    return {name: _type(proto) for name, proto in protos.items()}


def _sized(value: onnx.ValueInfoProto, axes: Mapping[str, int]) -> onnx.TypeProto:
    shape = []
    for axis in value.type.tensor_type.shape.dim:
        if not axis.HasField("dim_value") and axis.dim_param not in axes:
            raise GraphError(
                f"the input '{value.name}' has a dynamic axis '{axis.dim_param}': expected one of "
                f"{', '.join(axes) or 'none'}"
            )
        shape.append(axis.dim_value if axis.HasField("dim_value") else axes[axis.dim_param])
    return onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, shape)


def _outputs(
    node: onnx.NodeProto,
    protos: Mapping[str, onnx.TypeProto],
    known: Mapping[str, onnx.TensorProto],
    opset: int,
    model: onnx.ModelProto,
) -> dict[str, onnx.TypeProto]:
    names = {name for name in node.input if name}
    found: dict[str, onnx.TypeProto]
    try:
        found = shape_inference.infer_node_outputs(
            defs.get_schema(node.op_type, opset, node.domain),
            node,
            {name: protos[name] for name in names},
            {name: known[name] for name in names & known.keys()},
            opset_imports=list(model.opset_import),
            ir_version=model.ir_version,
        )
    except (shape_inference.InferenceError, defs.SchemaError) as error:
        raise GraphError(f"cannot infer the shape that '{node.name}' ({node.op_type}) writes: {error}") from error
    return found


def _fold(
    node: onnx.NodeProto,
    protos: Mapping[str, onnx.TypeProto],
    known: dict[str, onnx.TensorProto],
    model: onnx.ModelProto,
) -> None:
    """Compute what a node writes if it is a shape, or follows from shapes; into ``known``."""
    name = node.output[0]
    if len(node.output) != 1 or not _small(protos[name].tensor_type.elem_type, _type(protos[name]).shape):
        return
    if node.op_type == "Shape":
        value = np.array(_type(protos[node.input[0]]).shape, dtype=np.int64)
        known[name] = numpy_helper.from_array(value[_slice(node)], name)
    elif all(not read or read in known for read in node.input):
        body = onnx.helper.make_graph([node], "one", [], [onnx.ValueInfoProto(name=name, type=protos[name])])
        body.initializer.extend(known[read] for read in dict.fromkeys(node.input) if read)
        one = onnx.helper.make_model(body, opset_imports=list(model.opset_import), ir_version=model.ir_version)
        results: Any = ReferenceEvaluator(one).run(None, {})
        known[name] = numpy_helper.from_array(np.asarray(results[0]), name)


def _slice(node: onnx.NodeProto) -> slice:
    limits = {str(a.name): int(a.i) for a in node.attribute}
    return slice(limits.get("start"), limits.get("end"))


def _small(element: int, shape: Iterable[int]) -> bool:
    return element in _INTEGERS and math.prod(shape) <= _MAX_FOLDED


def _concrete(proto: onnx.TypeProto | None) -> bool:
    return (
        proto is not None
        and proto.tensor_type.HasField("shape")
        and all(d.HasField("dim_value") for d in proto.tensor_type.shape.dim)
    )


def _type(proto: onnx.TypeProto) -> TensorType:
    tensor = proto.tensor_type
    return TensorType(tuple(d.dim_value for d in tensor.shape.dim), tensor.elem_type)
