"""Why a bundle computes what in which precision: its ``nodes.json``, by node, by block and in all.

The build writes the file (``stages.node_records``); reading it takes neither onnx nor torch, so that a device can tell
what its engines are meant to be, and compare (``measure.audit``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgesam_deploy.bundle import GRAPHS, NODES, Bundle
from edgesam_deploy.errors import BundleError
from edgesam_deploy.measure.audit import PRECISIONS, WEIGHTED

NODES_SCHEMA = 2


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node of the FP32 graph, and what the shipped graph makes of it.

    op: the FP32 graph's operator. block: the group it is searched and shown in. precision: "int8", "fp16" or "fp32".
    reason: why it is not INT8, or anything else to know. macs: multiply-accumulates for one image, or one prompt of two
    points. absmax: largest |output| that calibration saw. scale: of its quantized input, real value = scale x integer.
    iou_cost: mean mask IoU lost when its block alone is INT8.

    Raises BundleError on creation for values that cannot be.
    """

    node: str
    op: str
    block: str
    precision: str
    reason: str | None
    macs: int
    absmax: float | None
    scale: float | None
    iou_cost: float | None

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.node, self.op, self.block, self.reason or "")):
            raise BundleError(f"node {self.node!r}: node, op, block and reason must be texts")
        if self.precision not in PRECISIONS:
            raise BundleError(f"node {self.node!r}: precision must be one of {PRECISIONS}, is {self.precision!r}")
        if not isinstance(self.macs, int) or isinstance(self.macs, bool) or self.macs < 0:
            raise BundleError(f"node {self.node!r}: macs must be a whole number from 0, is {self.macs!r}")
        for name in ("absmax", "scale", "iou_cost"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
                raise BundleError(f"node {self.node!r}: {name} must be a finite number or null, is {value!r}")

    @property
    def weighted(self) -> bool:
        """Whether it multiplies and adds: Conv, ConvTranspose, Gemm, MatMul."""
        return self.op in WEIGHTED


@dataclass(frozen=True, slots=True)
class NodesFile:
    """``nodes.json``: the records of each graph in graph order, and how a search chose them, or None."""

    graphs: Mapping[str, tuple[NodeRecord, ...]]
    search: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Share:
    """What computes in one precision. share: of the MACs of all, 0 to 1."""

    precision: str
    nodes: int
    weighted: int
    macs: int
    share: float


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One block. weighted: nodes that multiply, of ``nodes``. shares: by precision. absmax: the largest of its nodes.

    reasons: why weighted nodes of it are not INT8, each once.
    """

    block: str
    nodes: int
    weighted: int
    macs: int
    shares: tuple[Share, ...]
    absmax: float | None
    iou_cost: float | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GraphExplanation:
    """One graph: its blocks and nodes in graph order. not_int8: its weighted nodes that are not INT8.

    backend, bf16: what runs it, and whether that is told to compute in bfloat16 what is FP32 here.
    """

    graph: str
    backend: str
    bf16: bool
    macs: int
    shares: tuple[Share, ...]
    blocks: tuple[BlockRow, ...]
    nodes: tuple[NodeRecord, ...]
    not_int8: tuple[NodeRecord, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``explain`` found. search: as the search recorded it, or None."""

    bundle: Path
    recipe: str
    precision: str
    target: str
    graphs: tuple[GraphExplanation, ...]
    search: Mapping[str, Any] | None


def explain(bundle: Bundle) -> Explanation:
    """Sum up a bundle's ``nodes.json``. Raises BundleError as ``read_nodes`` does."""
    found = read_nodes(bundle)
    graphs = tuple(
        _explain_graph(name, bundle.backends[name], bundle.bf16[name], records)
        for name, records in found.graphs.items()
    )
    return Explanation(bundle.path, bundle.recipe, bundle.precision, bundle.target, graphs, found.search)


def read_nodes(bundle: Bundle) -> NodesFile:
    """Read ``nodes.json``. Raises BundleError where it is missing, damaged or of another schema, with the cure."""
    path = bundle.path / NODES
    again = "build the bundle again with  sam-export build"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"bundle {bundle.path} has no {NODES}, which lists its nodes: {again}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}; {again}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != NODES_SCHEMA:
        newer = isinstance(schema, int) and schema > NODES_SCHEMA
        cure = "upgrade edgesam-deploy" if newer else again
        told = f"schema {schema}" if isinstance(schema, int) else "no schema, as older versions wrote it"
        raise BundleError(f"{path} has {told}; this version reads schema {NODES_SCHEMA}: {cure}")
    try:
        graphs = {name: _records(raw["graphs"][name]["nodes"]) for name in GRAPHS}
        search = raw["search"]
        if search is not None and not isinstance(search, dict):
            raise TypeError("'search' must be a table or null")
    except (KeyError, TypeError, BundleError) as error:
        raise BundleError(f"{path} lacks or garbles an entry: {error}; {again}") from error
    return NodesFile(graphs, search)


def _records(rows: Sequence[Mapping[str, Any]]) -> tuple[NodeRecord, ...]:
    names = {f.name for f in fields(NodeRecord)}
    records = tuple(NodeRecord(**{name: row[name] for name in names}) for row in rows)
    if len({record.node for record in records}) != len(records):
        raise TypeError("a node is listed twice")
    return records


def _explain_graph(name: str, backend: str, bf16: bool, records: tuple[NodeRecord, ...]) -> GraphExplanation:
    blocks: dict[str, list[NodeRecord]] = {}
    for record in records:
        blocks.setdefault(record.block, []).append(record)
    return GraphExplanation(
        graph=name,
        backend=backend,
        bf16=bf16,
        macs=sum(record.macs for record in records),
        shares=_shares(records),
        blocks=tuple(_block_row(block, members) for block, members in blocks.items()),
        nodes=records,
        not_int8=tuple(record for record in records if record.weighted and record.precision != "int8"),
    )


def _block_row(block: str, members: Sequence[NodeRecord]) -> BlockRow:
    told = (r.reason for r in members if r.weighted and r.precision != "int8" and r.reason is not None)
    return BlockRow(
        block=block,
        nodes=len(members),
        weighted=sum(record.weighted for record in members),
        macs=sum(record.macs for record in members),
        shares=_shares(members),
        absmax=_largest(record.absmax for record in members),
        iou_cost=_largest(record.iou_cost for record in members),
        reasons=tuple(dict.fromkeys(told)),
    )


def _shares(records: Sequence[NodeRecord]) -> tuple[Share, ...]:
    """By precision, in the order of PRECISIONS, those that occur."""
    total = sum(record.macs for record in records)
    found = []
    for precision in PRECISIONS:
        own = [record for record in records if record.precision == precision]
        macs = sum(record.macs for record in own)
        if own:
            weighted = sum(record.weighted for record in own)
            found.append(Share(precision, len(own), weighted, macs, macs / total if total else 0.0))
    return tuple(found)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def run_by(graph: GraphExplanation) -> str:
    """ "run by openvino, which computes in bfloat16 what is fp32 here"."""
    return f"run by {graph.backend}" + (", which computes in bfloat16 what is fp32 here" if graph.bf16 else "")


def describe(shares: Sequence[Share]) -> str:
    """ "int8 98.2 %, fp32 1.8 %" of the MACs; where nothing multiplies, what the nodes compute in."""
    if not any(share.macs for share in shares):
        return ", ".join(share.precision for share in shares)
    return ", ".join(f"{share.precision} {100 * share.share:.1f} %" for share in shares if share.macs)
