"""Every recipe through TensorRT for RTX's parser, builder and layer list, in every precision. Needs no GPU.

    python benchmarks/rtx_audit.py [--recipes reference mobile_sam sam_vit_b] [--capability 8.6]

Writes benchmarks/results/rtx/audit.json and prints the table. What is compiled to what does not depend on the values of
weights and ranges: a recipe whose checkpoint is not shipped gets seeded random weights and made-up ranges, and the
result says so. Times are those of one build each on a machine that may do other things: read them as upper bounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch

from edgesam_deploy.contract import contracts
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.images import list_images
from edgesam_deploy.measure.audit import audit
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.measure.layers import layers_from_log
from edgesam_deploy.models import build_model
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import PACKAGE, Recipe, load_recipe
from edgesam_deploy.runtime.bindings import use
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.build import PHOTOS
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.calibrate import Ranges, calibrate
from edgesam_deploy.stages.compile import CompileOptions, compile_graph
from edgesam_deploy.stages.export import export_model
from edgesam_deploy.stages.fp16 import convert_to_fp16
from edgesam_deploy.stages.quantize import quantize
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.typed_nodes import operators, wanted_precisions

OUTPUT = Path("benchmarks/results/rtx/audit.json")


def ranges_of(graph: Path, recipe: Recipe, folder: Path) -> Ranges:
    """Calibrated for shipped weights, made up for random ones."""
    if recipe.checkpoint.file is not None:
        images = list_images(PHOTOS / "calibration")
        return calibrate(graph, images, folder / "ranges.json", recipe.pixels, recipe.int8.percentile)
    model = onnx.shape_inference.infer_shapes(graphs.load(graph))
    ones = {v.name: 1.0 for v in (*model.graph.value_info, *model.graph.output)}
    return Ranges(0, "made up", 100.0, sha256_file(graph), ones, ones)


def typed_graphs(recipe: Recipe, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(graph name, precision, typed graph): both graphs in FP32 and FP16, the encoder in INT8."""
    torch.manual_seed(0)
    shipped = recipe.checkpoint.file
    model = load_model(recipe, PACKAGE / shipped) if shipped is not None else build_model(recipe)
    for name, proto in export_model(model, recipe).items():
        graphs.save(proto, folder / f"{name}.onnx", {})
    del model
    for name in ("encoder", "decoder"):
        fp32, fp16 = folder / f"{name}.fp32.onnx", folder / f"{name}.fp16.onnx"
        simplify(folder / f"{name}.onnx", fp32)
        yield name, "fp32", fp32
        convert_to_fp16(fp32, recipe.fp16, fp16)
        yield name, "fp16", fp16
        if name == "encoder":
            int8 = folder / "encoder.int8.onnx"
            quantize(fp32, ranges_of(fp32, recipe, folder), recipe.int8, int8)
            yield name, "int8", int8


def examine(recipe: Recipe, capability: str) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, precision, graph in typed_graphs(recipe, folder):
            options = CompileOptions(compute_capabilities=(capability,))
            contract = contracts(recipe.geometry)[name]
            built = compile_graph(graph, folder / "plan.engine", contract, options, use("tensorrt_rtx"), verbose=True)
            listing = next(m.text for m in built.log if m.text.startswith("Layers:"))
            found = audit(layers_from_log(listing), wanted_precisions(graph), operators(graph))
            rows.append(
                {
                    "recipe": recipe.name,
                    "weights": "shipped" if recipe.checkpoint.file else "random, seed 0; ranges made up",
                    "graph": name,
                    "precision": precision,
                    "onnx_nodes": len(graphs.load(graph).graph.node),
                    "wanted": dict(Counter(row.wanted for row in found.rows)),
                    "compiled": found.nodes,
                    "mismatched": [f"{r.node}: {r.reason}" for r in found.mismatched],
                    "folded": len(found.missing),
                    "layers": sum(sum(kinds.values()) for kinds in found.layers.values()),
                    "overhead_layers": len(found.overhead),
                    "seconds": round(built.seconds, 2),
                    "onnx_mb": round(graph.stat().st_size / 1e6, 1),
                    "plan_mb": round(built.size_bytes / 1e6, 1),
                }
            )
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["compiled"].items())
    print(
        f"{row['recipe']:10s} {row['graph']:8s} {row['precision']:5s} {kinds:34s} "
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
