"""What a build decided for every node, and why: the records behind ``nodes.json``.

They are read off the graph that ships, not off the plan for it: a node whose Q/DQ went missing on the way shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from edgesam_deploy.errors import GraphError
from edgesam_deploy.files import write_json
from edgesam_deploy.measure.audit import WEIGHTED
from edgesam_deploy.measure.explain import NODES_SCHEMA
from edgesam_deploy.measure.explain import NodeRecord as NodeRecord
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.blocks import blocks
from edgesam_deploy.stages.calibrate import Ranges
from edgesam_deploy.stages.node_work import node_macs
from edgesam_deploy.stages.typed_nodes import node_name, wanted_precisions

# Nodes that belong to no module of the PyTorch model.
TOP = "(top)"
FLOAT_OUTPUT = "its output is read in float: ONNX Runtime computes it in float on the values rounded to INT8"


def node_records(
    typed: Path,
    source: Path,
    ranges: Ranges | None,
    reasons: Mapping[str, str],
    iou_cost: Mapping[str, float],
    block_of: Mapping[str, str],
) -> list[NodeRecord]:
    """A record of every node that computes on floats in ``source``, in its order.

    typed: the graph that ships, in either encoding. source: the simplified FP32 graph it was made from; its operators,
    tensors and MACs are what is shown. ranges: of calibration, None if there was none. reasons: by node. iou_cost: by
    block, mask IoU lost. block_of: node → block, as a search grouped them; empty to group what multiplies by
    ``stages.blocks``. Nodes that it does not know go with the block around their module, else with what they read.

    Raises GraphError where the two graphs do not fit, and for a weighted node that is not INT8 and has no reason: the
    stage that left it out must say why.
    """
    model, meant = graphs.load(source, weights=False), wanted_precisions(typed)
    macs, inputs = node_macs(source), _Quantized(typed)
    grouped = _grouped(model, block_of)
    records: dict[str, NodeRecord] = {}
    for node in model.graph.node:
        name = node_name(node)
        if name not in meant:
            _check_gone(node, typed)
            continue
        block = grouped[name]
        weighted = node.op_type in WEIGHTED
        records[name] = NodeRecord(
            node=name,
            op=node.op_type,
            block=block,
            precision=meant[name],
            reason=reasons.get(name) if meant[name] != "int8" else inputs.float_output(name),
            macs=macs.get(name, 0),
            absmax=_exact(ranges.absmax.get(node.output[0])) if ranges is not None else None,
            scale=inputs.scale(name),
            iou_cost=iou_cost.get(block) if weighted else None,
        )
    _check_reasons(records.values(), typed)
    return list(records.values())


def uniform_reasons(source: Path, why: str) -> dict[str, str]:
    """One reason for every weighted node of a graph: "the decoder stays FP32", "built in FP16"."""
    nodes = graphs.load(source, weights=False).graph.node
    return {node_name(node): why for node in nodes if node.op_type in WEIGHTED}


def write_nodes(
    path: Path, records: Mapping[str, Sequence[NodeRecord]], search: Mapping[str, Any] | None = None
) -> None:
    """Write ``nodes.json`` for ``measure.explain``. search: how the assignment was found, with its frontier."""
    tables = {name: {"nodes": [asdict(record) for record in rows]} for name, rows in records.items()}
    write_json(path, {"schema": NODES_SCHEMA, "graphs": tables, "search": search})


class _Quantized:
    """What a typed graph's nodes read and write in INT8."""

    def __init__(self, typed: Path) -> None:
        model = graphs.load(typed)
        self.values, self.made_by = graphs.constants(model), graphs.producers(model)
        self.nodes = {node_name(node): node for node in model.graph.node}
        self.users = graphs.consumers(model)
        inferred = graphs.inferred(model).graph
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}

    def scale(self, name: str) -> float | None:
        """Of the first activation that the node reads through a Q/DQ pair, or as integers; None if there is none."""
        for tensor in self.nodes[name].input:
            reader = self.made_by.get(tensor)
            if reader is None or reader.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            if reader.op_type == "QuantizeLinear" or reader.input[0] not in self.values:
                return _exact(float(self.values[reader.input[1]]))
        return None

    def float_output(self, name: str) -> str | None:
        """``FLOAT_OUTPUT`` for an INT8 convolution of the CPU encoding that ONNX Runtime cannot fuse, or None.

        It has products of matrices that read integers and write floats, but no such convolution.
        """
        node = self.nodes[name]
        source = self.made_by.get(node.input[0])
        if "Conv" not in node.op_type or source is None or self.types.get(source.input[0]) != TensorProto.UINT8:
            return None
        readers = self.users.get(node.output[0], [])
        return None if any(reader.op_type == "QuantizeLinear" for reader in readers) else FLOAT_OUTPUT


def _grouped(model: onnx.ModelProto, block_of: Mapping[str, str]) -> dict[str, str]:
    """Node → block, for every node of a graph in topological order."""
    names = [node_name(node) for node in model.graph.node if node.op_type in WEIGHTED]
    given = block_of or {layer: block.name for block in blocks(names) for layer in block.layers}
    inner_first = sorted(set(given.values()), key=len, reverse=True)
    made_by, found = graphs.producers(model), dict[str, str]()
    for node in model.graph.node:
        name = node_name(node)
        module = name.rpartition("/")[0]
        around = next((b for b in inner_first if module == b or module.startswith((f"{b}.", f"{b}/"))), None)
        read = [found[node_name(made_by[tensor])] for tensor in node.input if tensor in made_by and module]
        found[name] = given.get(name) or around or next(iter(read), module or TOP)
    return found


def _check_gone(node: onnx.NodeProto, typed: Path) -> None:
    """Raise GraphError if a node that multiplies is not in the typed graph; others may be views, shapes or folded."""
    if node.op_type in WEIGHTED:
        raise GraphError(
            f"{typed} has no node '{node_name(node)}' ({node.op_type}) of the FP32 graph it was made from: give that "
            "graph, and build again with --force"
        )


def _check_reasons(records: Iterable[NodeRecord], typed: Path) -> None:
    silent = [r for r in records if r.weighted and r.precision != "int8" and not r.reason]
    if silent:
        raise GraphError(
            f"{typed}: node '{silent[0].node}' ({silent[0].op}) and {len(silent) - 1} more compute in "
            f"{silent[0].precision}, and nothing says why they are not INT8: a defect of the stage that typed the graph"
        )


def _exact(value: float | None) -> float | None:
    """The shortest number that is the same in float32."""
    return None if value is None else float(str(np.float32(value)))
