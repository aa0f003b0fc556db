"""Every recipe through TensorRT for RTX's parser, builder and layer list, in every precision. Needs no GPU.

    python benchmarks/rtx_audit.py [--recipes reference mobile_sam sam_vit_b] [--capability 8.6]

Writes benchmarks/results/rtx/audit.json and prints the table: for every graph in FP32, FP16, INT8 beside FP32 and INT8
beside FP16, what each node was compiled to, and every disagreement with what `sam-export explain` says of it. INT8 is
where the target's rules let it be. What is compiled to what does not depend on the values of weights and ranges: a
recipe whose checkpoint is not shipped gets seeded random weights and made-up ranges, and the result says so. Times are
those of one build each on a machine that may do other things: read them as upper bounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesam_deploy.contract import contracts
from edgesam_deploy.files import write_json
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.audit import audit
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.measure.layers import CompiledLayer, layers_from_log
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import PACKAGE, Int8Rules, Recipe, load_recipe
from edgesam_deploy.runtime.bindings import use
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.build import PHOTOS
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.calibrate import Ranges, calibrate
from edgesam_deploy.stages.compile import CompileOptions, CompileResult, compile_graph
from edgesam_deploy.stages.export import export_model
from edgesam_deploy.stages.node_records import NodeRecord, node_records, uniform_reasons
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.skeleton import simplified_graphs, unit_ranges
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import load_target

TARGET = "rtx"
# label -> (the floats beside INT8, what is INT8: nothing, or all that the rules allow)
TYPED: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "fp16": ("fp16", ()),
    "int8 fp32": ("fp32", None),
    "int8 fp16": ("fp16", None),
}
OUTPUT = Path("benchmarks/results/rtx/audit.json")


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph in one precision. label: "fp32", "fp16", "int8 fp32" or "int8 fp16", the rest behind the INT8."""

    graph: str
    label: str
    typed: Path
    records: list[NodeRecord]


def ranges_of(sources: Mapping[str, Path], recipe: Recipe, rules: Int8Rules, folder: Path) -> dict[str, Ranges]:
    """Calibrated for shipped weights, made up for random ones."""
    if recipe.checkpoint.file is not None:
        images = list_images(PHOTOS / "calibration")
        return calibrate(sources, images, recipe, rules, folder / "ranges.json")
    return {name: unit_ranges(source) for name, source in sources.items()}


def sources_of(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Both graphs of a recipe in FP32, simplified: with the weights that are shipped, or with initial ones."""
    if recipe.checkpoint.file is None:
        return simplified_graphs(recipe, folder)
    model = load_model(recipe, PACKAGE / recipe.checkpoint.file)
    sources = {}
    for name, proto in export_model(model, recipe).items():
        graphs.save(proto, folder / f"{name}.onnx", {})
        sources[name] = simplify(folder / f"{name}.onnx", folder / f"{name}.fp32.onnx").output
    return sources


def variants(recipe: Recipe, sources: Mapping[str, Path], labels: Sequence[str], folder: Path) -> Iterator[Variant]:
    """Both simplified graphs of a recipe, each in the precisions of ``labels``."""
    rules = load_target(TARGET).rules_for(recipe)
    ranges = ranges_of(sources, recipe, rules, folder)
    for name, source in sources.items():
        asked = uniform_reasons(source, "INT8 was not asked for")
        if "fp32" in labels:
            yield Variant(name, "fp32", source, node_records(source, source, ranges[name], asked, {}, {}))
        for label, (rest, int8) in TYPED.items():
            if label not in labels:
                continue
            output = folder / f"{name}.typed.onnx"
            typed = type_graph(source, ranges[name], recipe.fp16, rules, Typing("tensorrt", rest), output, int8)
            reasons = typed.reasons if int8 is None else {**asked, **typed.reasons}
            yield Variant(name, label, output, node_records(output, source, ranges[name], reasons, {}, {}))


def examine(
    recipe: Recipe, sources: Mapping[str, Path], capability: str, labels: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Build each variant without a GPU and compare what it was compiled to with what was meant; a row for each."""
    rows = []
    for variant in variants(recipe, sources, labels, folder):
        options = CompileOptions(compute_capabilities=(capability,))
        contract = contracts(recipe.geometry)[variant.graph]
        plan = folder / "plan.engine"
        built = compile_graph(variant.typed, plan, contract, options, use("tensorrt_rtx"), verbose=True)
        listing = next(m.text for m in built.log if m.text.startswith("Layers:"))
        rows.append(row(recipe, variant, layers_from_log(listing), built))
        show(rows[-1])
    return rows


def row(recipe: Recipe, variant: Variant, layers: tuple[CompiledLayer, ...], built: CompileResult) -> dict[str, Any]:
    """Compiled layers against the rows of ``sam-export explain``. A node that multiplies and that no layer names is a
    disagreement too: nothing shows what became of it.
    """
    by_name = {record.node: record for record in variant.records}
    wanted = {name: record.precision for name, record in by_name.items()}
    found = audit(layers, wanted, {name: record.op for name, record in by_name.items()})
    disagreements = [
        {"node": r.node, "block": by_name[r.node].block, "explain": r.wanted, "compiled": r.compiled, "why": r.reason}
        for r in found.mismatched
    ]
    disagreements += [
        {"node": n, "block": by_name[n].block, "explain": wanted[n], "compiled": None, "why": "no layer names it"}
        for n in found.missing
        if by_name[n].weighted
    ]
    return {
        "recipe": recipe.name,
        "weights": "shipped" if recipe.checkpoint.file else "random, seed 0; ranges made up",
        "graph": variant.graph,
        "precision": variant.label,
        "onnx_nodes": len(graphs.load(variant.typed).graph.node),
        "wanted": dict(Counter(record.precision for record in variant.records)),
        "compiled": found.nodes,
        "mismatched": disagreements,
        "folded": len(found.missing),
        "layers": sum(sum(kinds.values()) for kinds in found.layers.values()),
        "overhead_layers": len(found.overhead),
        "seconds": round(built.seconds, 2),
        "onnx_mb": round(variant.typed.stat().st_size / 1e6, 1),
        "plan_mb": round(built.size_bytes / 1e6, 1),
    }


def show(row: dict[str, Any]) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["compiled"].items())
    print(
        f"{row['recipe']:10s} {row['graph']:8s} {row['precision']:9s} {kinds:34s} "
        f"not as meant {len(row['mismatched'])}, folded {row['folded']}, layers {row['layers']}, "
        f"{row['seconds']:.1f} s, plan {row['plan_mb']:.1f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["reference", "mobile_sam", "sam_vit_b"])
    parser.add_argument("--capability", default="8.6")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"python benchmarks/rtx_audit.py --recipes {' '.join(options.recipes)} "
        f"--capability {options.capability}",
        "library": f"tensorrt_rtx {use('tensorrt_rtx').version}",
        "machine": machine(),
        "tools": tool_versions(),
        "graphs": [],
    }
    for name in options.recipes:
        recipe = load_recipe(name)
        with tempfile.TemporaryDirectory() as folder:
            sources = sources_of(recipe, Path(folder))
            result["graphs"] += examine(recipe, sources, options.capability, ("fp32", *TYPED), Path(folder))
        write_json(options.output, result)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
