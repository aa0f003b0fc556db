"""sam-export explain: which precision every node of a bundle computes in, and why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from edgesam_deploy.measure.explain import Explanation, GraphExplanation, NodeRecord


@click.command("explain")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--nodes", "every_node", is_flag=True, help="List every node, not blocks.")
@click.option("--html", type=click.Path(path_type=Path), help="Draw it as a page, one file without anything else.")
@json_option
def command(bundle: Path | None, every_node: bool, html: Path | None, as_json: bool) -> None:
    """Tell what each block of BUNDLE [default: the shipped INT8 reference] computes in, and why.

    For every block: its multiply-accumulates (MACs) by precision, the largest value that calibration saw, the mask IoU
    that the block alone costs in INT8 where a search measured it, and why what is not INT8 is not.
    """
    from edgesam_deploy.bundle import load_bundle, shipped_bundle
    from edgesam_deploy.measure.explain import explain

    # Engines play no part: they may be cut or another machine's.
    found = explain(load_bundle(bundle or shipped_bundle(), plans=False))
    if html is not None:
        _write_page(found, html)
    if as_json:
        print_json(found)
    else:
        _show(found, every_node)


def _write_page(found: Explanation, file: Path) -> None:
    from edgesam_deploy.files import write_bytes
    from edgesam_deploy.measure.explain_page import page

    write_bytes(file, page(found).encode())
    say(f"page: {file}")


def _show(found: Explanation, every_node: bool) -> None:
    for graph in found.graphs:
        notes = _notes(graph.nodes if every_node else graph.not_int8)
        if every_node:
            _show_nodes(graph, notes)
        else:
            _show_blocks(graph, notes)
        _show_reasons(graph, notes)
        click.echo("")


def _notes(records: Iterable[NodeRecord]) -> dict[str, str]:
    """Each reason once, with the number that stands for it in the table."""
    reasons = dict.fromkeys(record.reason for record in records if record.reason)
    return {reason: f"[{number}]" for number, reason in enumerate(reasons, 1)}


def _title(graph: GraphExplanation) -> str:
    from edgesam_deploy.measure.explain import describe, run_by

    return f"{graph.graph}: {graph.macs / 1e9:.3f} GMACs, {describe(graph.shares)}; {run_by(graph)}"


def _show_blocks(graph: GraphExplanation, notes: dict[str, str]) -> None:
    from edgesam_deploy.measure.explain import describe

    rows = [
        (
            block.block,
            str(block.nodes),
            f"{block.macs / 1e6:.1f}",
            f"{100 * block.macs / graph.macs if graph.macs else 0.0:.1f}",
            describe(block.shares),
            _number(block.absmax),
            _cost(block.iou_cost),
            _marks(block.reasons, notes),
        )
        for block in graph.blocks
    ]
    columns = ("block", "nodes", "MMACs", "% of MACs", "computes in", "largest |x|", "IoU cost", "why not INT8")
    print_table(_title(graph), columns, rows)


def _show_nodes(graph: GraphExplanation, notes: dict[str, str]) -> None:
    rows = [
        (
            record.node,
            record.op,
            record.precision,
            f"{record.macs / 1e6:.2f}",
            _number(record.absmax),
            _number(record.scale),
            _cost(record.iou_cost),
            notes.get(record.reason or "", ""),
        )
        for record in graph.nodes
    ]
    columns = ("node", "operator", "computes in", "MMACs", "largest |x|", "scale", "IoU cost", "why")
    print_table(_title(graph), columns, rows)


def _show_reasons(graph: GraphExplanation, notes: dict[str, str]) -> None:
    """What the numbers in brackets mean, and how much of the work stays out of INT8 for it."""
    if not graph.not_int8:
        click.echo("every node that multiplies computes in INT8")
    for reason, mark in notes.items():
        held = [record for record in graph.not_int8 if record.reason == reason]
        macs = sum(record.macs for record in held) / 1e6
        weight = f" ({len(held)} that multiply, {macs:.1f} MMACs)" if held else ""
        click.echo(f"{mark} {reason}{weight}")


def _marks(reasons: Iterable[str], notes: dict[str, str]) -> str:
    return " ".join(notes[reason] for reason in reasons)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _cost(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
