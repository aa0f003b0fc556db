"""An explanation as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edgesam_deploy.measure.explain import BlockRow, Explanation, GraphExplanation, NodeRecord, Share, describe, run_by
from edgesam_deploy.measure.explain_search import search_section

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1f; --soft: #5b6168; --line: #d9dce0; --page: #ffffff; --panel: #f5f6f8;
  --int8: #1f77b4; --fp16: #2ca07a; --fp32: #d98324; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa1a9; --line: #3a3f45; --page: #16181b;
  --panel: #1f2226; --int8: #5aa9e6; --fp16: #4cc79b; --fp32: #f0a350; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } p { margin: .25rem 0; } .soft { color: var(--soft); }
.legend span { margin-right: 1.25rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.int8 { background: var(--int8); } .fp16 { background: var(--fp16); } .fp32 { background: var(--fp32); }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.tile { flex: 1 1 20rem; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; }
.tile b { font-size: 1.35rem; }
.bar { display: flex; height: .85rem; border-radius: 3px; overflow: hidden; min-width: 2px; }
.tile .bar { height: 1.1rem; margin: .6rem 0; }
.row { display: grid; grid-template-columns: minmax(12rem, 29rem) minmax(6rem, 1fr) 5.5rem 5rem 5rem; gap: .75rem;
  align-items: center; padding: .3rem .5rem; }
.row > :nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
.head { margin-top: 1rem; color: var(--soft); font-size: .85rem; border-bottom: 1px solid var(--line);
  align-items: end; }
details { border-bottom: 1px solid var(--line); } summary { cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary:hover, details[open] > summary { background: var(--panel); }
.name { overflow-wrap: anywhere; font-size: .9rem; padding-left: 1.1em; position: relative; }
.name::before { content: "\\25B8"; color: var(--soft); position: absolute; left: 0; }
details[open] > summary .name::before { content: "\\25BE"; }
.inside { padding: .25rem .5rem 1rem 1.6rem; overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; } th { color: var(--soft); font-weight: normal; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.mark { white-space: nowrap; } td.mark i { display: inline-block; width: .65em; height: .65em; margin-right: .4em;
  border-radius: 2px; } td.long { overflow-wrap: anywhere; min-width: 14rem; }
svg { width: 100%; max-width: 44rem; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg .axis { stroke: var(--line); } svg .line { stroke: var(--int8); fill: none; stroke-width: 1.5; }
svg .point { fill: var(--int8); } svg .tried { fill: var(--soft); opacity: .55; }
svg .chosen { fill: var(--fp32); } svg .limit { stroke: var(--fp32);
  stroke-dasharray: 4 3; }
@media (max-width: 44rem) { .row { grid-template-columns: 1fr 1fr 1fr; }
  .row > :nth-child(-n+2) { grid-column: 1 / -1; } .head > :nth-child(-n+2) { display: none; } }
"""


def page(explanation: Explanation) -> str:
    """The whole page. Every name and reason in it is escaped."""
    title = f"{explanation.recipe} in {explanation.precision} for {explanation.target}"
    widest = max((block.macs for graph in explanation.graphs for block in graph.blocks), default=0)
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="soft">What each node computes in, and why. Bars: multiply-accumulates (MACs) of a block, by '
        "precision; click a block for its nodes. IoU cost: mean mask IoU lost when the block alone is INT8.</p>",
        f'<p class="legend">{_legend(explanation.graphs)}</p>',
        f'<div class="tiles">{"".join(_tile(graph) for graph in explanation.graphs)}</div>',
        search_section(explanation.search) if explanation.search is not None else "",
        *(_graph(graph, widest) for graph in explanation.graphs),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
        f'content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n{''.join(parts)}\n</body>\n</html>\n"
    )


def _legend(graphs: Sequence[GraphExplanation]) -> str:
    kinds = dict.fromkeys(share.precision for graph in graphs for share in graph.shares)
    return "".join(f'<span><i class="{kind}"></i>{kind.upper()}</span>' for kind in kinds)


def _tile(graph: GraphExplanation) -> str:
    counts = ", ".join(f"{s.weighted} in {s.precision.upper()}" for s in graph.shares if s.weighted)
    return (
        f'<div class="tile"><b>{escape(graph.graph)}</b> <span class="soft">{graph.macs / 1e9:.2f} GMACs</span>'
        f"{_bar(graph.shares, 100.0)}<p>{escape(describe(graph.shares))}</p>"
        f'<p class="soft">{len(graph.nodes)} nodes; of those that multiply, {escape(counts or "none")}; '
        f"{escape(run_by(graph))}</p></div>"
    )


def _bar(shares: Sequence[Share], percent: float) -> str:
    """One bar, ``percent`` of its cell wide, split by precision."""
    parts = "".join(
        f'<span class="{s.precision}" style="width:{100 * s.share:.3f}%" title="{s.precision}: '
        f'{s.macs / 1e6:,.1f} MMACs, {s.weighted} nodes that multiply"></span>'
        for s in shares
        if s.macs
    )
    return f'<div class="bar" style="width:{percent:.3f}%">{parts}</div>'


def _graph(graph: GraphExplanation, widest: int) -> str:
    head = (
        '<div class="row head"><span>block</span><span>MACs by precision</span><span>MMACs</span>'
        "<span>largest |x|</span><span>IoU cost</span></div>"
    )
    members: dict[str, list[NodeRecord]] = {}
    for record in graph.nodes:
        members.setdefault(record.block, []).append(record)
    blocks = "".join(_block(block, members[block.block], widest) for block in graph.blocks)
    return f"<h2>{escape(graph.graph)}</h2>{_reasons(graph)}{head}{blocks}"


def _reasons(graph: GraphExplanation) -> str:
    """Why nodes that multiply are not INT8: each reason once, with what it costs in MACs."""
    by_reason: dict[str, list[int]] = {}
    for record in graph.not_int8:
        by_reason.setdefault(record.reason or "no reason recorded", []).append(record.macs)
    if not by_reason:
        return "<p>Every node that multiplies computes in INT8.</p>"
    rows = "".join(
        f'<tr><td class="n">{len(macs)}</td><td class="n">{sum(macs) / 1e6:,.1f}</td><td>{escape(reason)}</td></tr>'
        for reason, macs in by_reason.items()
    )
    return (
        '<table><tr><th class="n">nodes that multiply</th><th class="n">MMACs</th><th>why not INT8</th></tr>'
        f"{rows}</table>"
    )


def _block(block: BlockRow, members: Sequence[NodeRecord], widest: int) -> str:
    bar = _bar(block.shares, 100 * block.macs / widest if widest else 0.0)
    hover = escape("; ".join((describe(block.shares), *block.reasons)))
    return (
        f'<details><summary class="row" title="{hover}"><span class="name">{escape(block.block)}</span>{bar}'
        f"<span>{block.macs / 1e6:,.1f}</span><span>{_number(block.absmax)}</span><span>{_cost(block.iou_cost)}"
        f'</span></summary><div class="inside">{_nodes(members)}</div></details>'
    )


def _nodes(members: Sequence[NodeRecord]) -> str:
    head = "".join(
        f"<th{' class=n' if numeric else ''}>{name}</th>"
        for name, numeric in (
            ("node", False), ("operator", False), ("computes in", False), ("MMACs", True), ("|x| up to", True),
            ("scale", True), ("IoU cost", True), ("why", False),
        )
    )  # fmt: skip
    return f"<table><tr>{head}</tr>{''.join(_node(record) for record in members)}</table>"


def _node(record: NodeRecord) -> str:
    return (
        f'<tr><td class="long">{escape(record.node)}</td><td>{escape(record.op)}</td><td class="mark">'
        f'<i class="{record.precision}"></i>{record.precision.upper()}</td><td class="n">{record.macs / 1e6:,.2f}</td>'
        f'<td class="n">{_number(record.absmax)}</td><td class="n">{_number(record.scale)}</td>'
        f'<td class="n">{_cost(record.iou_cost)}</td><td class="long">{escape(record.reason or "")}</td></tr>'
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _cost(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
