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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from edgesam_deploy.bundle import GRAPHS
from edgesam_deploy.contract import contracts
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.audit import audit
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.measure.layers import CompiledLayer, layers_from_log
from edgesam_deploy.models import build_model
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
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import load_target

TARGET = "rtx"
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
    return {name: _made_up(source) for name, source in sources.items()}


def _made_up(source: Path) -> Ranges:
    model = onnx.shape_inference.infer_shapes(graphs.load(source))
    tensors = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    ones = {tensor.name: 1.0 for tensor in tensors}
    return Ranges(0, "made up", "minmax", 100.0, sha256_file(source), ones, ones)


def variants(recipe: Recipe, rules: Int8Rules, folder: Path) -> Iterator[Variant]:
    """Both graphs of a recipe in FP32, in FP16, and in INT8 beside either."""
    torch.manual_seed(0)
    shipped = recipe.checkpoint.file
    model = load_model(recipe, PACKAGE / shipped) if shipped is not None else build_model(recipe)
    for name, proto in export_model(model, recipe).items():
        graphs.save(proto, folder / f"{name}.onnx", {})
    del model
    sources = {}
    for name in GRAPHS:
        sources[name] = folder / f"{name}.fp32.onnx"
        simplify(folder / f"{name}.onnx", sources[name])
    ranges = ranges_of(sources, recipe, rules, folder)
    for name, source in sources.items():
        asked = uniform_reasons(source, "INT8 was not asked for")
        yield Variant(name, "fp32", source, node_records(source, source, ranges[name], asked, {}, {}))
        for label, rest, int8 in (("fp16", "fp16", ()), ("int8 fp32", "fp32", None), ("int8 fp16", "fp16", None)):
            output = folder / f"{name}.typed.onnx"
            how = Typing("tensorrt", rest)
            typed = type_graph(source, ranges[name], recipe.fp16, rules, how, output, int8)
            reasons = typed.reasons if int8 is None else {**asked, **typed.reasons}
            yield Variant(name, label, output, node_records(output, source, ranges[name], reasons, {}, {}))


def examine(recipe: Recipe, capability: str) -> list[dict[str, Any]]:
    rows = []
    rules = load_target(TARGET).rules_for(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for variant in variants(recipe, rules, folder):
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
        result["graphs"] += examine(load_recipe(name), options.capability)
        write_json(options.output, result)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
