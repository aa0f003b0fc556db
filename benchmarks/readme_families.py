"""What ``readme.py`` tells of every family of models: RESULTS.md's first table."""

from __future__ import annotations

from typing import Any

from result_tables import RESULTS, load, table


def family_rows() -> list[dict[str, Any]]:
    return list(load(RESULTS / "families" / "families.json")["rows"])


def families() -> list[str]:
    """Every family through the whole tool."""
    rows = []
    for row in family_rows():
        if "failed" in row:
            rows.append([row["recipe"], row["failed"], *["–"] * 5])
            continue
        nodes = " / ".join(f"{before} → {after}" for before, after in row["nodes"].values())
        error = max(row["export_error"], row["simplify_error"])
        foreign = sum(len(found) for found in row["foreign_nodes"].values())
        rows.append(
            [
                row["recipe"],
                *parity_cells(row.get("parity")),
                f"{nodes}; {foreign or 'none'} foreign",
                f"{error:.1e}",
                engine_cell(row["engines"], "fp16"),
                engine_cell(row["engines"], "int8 fp16"),
                "yes" if row["predict"] else "no",
            ]
        )
    header = [
        "recipe",
        "upstream tensors",
        "error against upstream",
        "nodes before → after, encoder / decoder",
        "ONNX Runtime error",
        "FP16 engines",
        "INT8 engines",
        "`predict`",
    ]
    return [
        "**Every family through the whole tool**, one size of each, and every timm student. Upstream's tensors load "
        "strictly, by name and shape; error: the largest difference of embeddings, low-resolution masks and predicted "
        "IoU, as a share of the largest value, from what upstream's own code answered with the same weights (recorded "
        "in `tests/models/data`). Students have no upstream. Engines: both graphs (of students the encoder: their "
        "decoder is SAM's) built with TensorRT for RTX without a GPU; not as meant: nodes compiled to another type. "
        "Graphs here have initial weights. Source: "
        "`benchmarks/results/families/families.json`, `families.py`.",
        "",
        *table(header, rows),
    ]


def parity_cells(parity: dict[str, Any] | None) -> list[str]:
    if parity is None:
        return ["–", "–"]
    if parity["failed"]:
        return ["–", f"{len(parity['failed'])} of {parity['tests']} tests failed"]
    return [str(parity["upstream_tensors"]), f"{parity['largest_error']:.1e}" if parity["largest_error"] else "none"]


def engine_cell(engines: list[dict[str, Any]], precision: str) -> str:
    rows = [row for row in engines if row["precision"] == precision]
    wrong = sum(len(row["mismatched"]) for row in rows)
    return f"{sum(row['plan_mb'] for row in rows):.0f} MB, {wrong or 'none'} not as meant"
