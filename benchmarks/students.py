"""Which backbones INT8 pays for on this CPU: every timm student, FP32 against INT8, one run each, alternating.

    python benchmarks/students.py [--prepare] [--recipes NAME ...] [--threads 2] [--runs 11]

Writes benchmarks/results/students/students.json and students.svg. The students have no published weights: theirs are
random (seed 0) with INT8 ranges of photographs; how long a graph takes hardly depends on them, what its masks are worth
does, and is not told here. --prepare makes the graphs only, into engines/.students, and may run beside other work;
without it they are timed, which must not. FP32 and INT8 each run on ONNX Runtime and on OpenVINO; the table takes the
faster backend of each, but not OpenVINO's INT8 on a CPU whose sums saturate: it computes them in FP32. Peak memory is
that of a process which loads and runs one graph.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgesam_deploy.contract import IMAGE
from edgesam_deploy.device import int8_saturates
from edgesam_deploy.files import sha256_file, write_bytes, write_json
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.compare import alternate, versions
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.measure.memory import peak_rss_mb
from edgesam_deploy.recipe import PACKAGE, available_recipes, load_recipe
from edgesam_deploy.runtime import SessionOptions, open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.node_work import node_macs
from edgesam_deploy.transforms import to_encoder_input

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "engines" / ".students"
OUTPUT = ROOT / "benchmarks" / "results" / "students"
PHOTO = PACKAGE / "assets" / "photos" / "verify" / "dog.jpg"
WARMUP = 2
# name -> (graph, backend)
VARIANTS = {
    "fp32, onnxruntime": ("fp32", "onnxruntime"),
    "fp32, openvino": ("fp32", "openvino"),
    "int8, onnxruntime": ("int8.cpu", "onnxruntime"),
    "int8, openvino": ("int8.tensorrt", "openvino"),
}


def prepare(name: str) -> None:
    """The encoder in FP32 and in both INT8 encodings, and its counts, into the student's folder."""
    from cpu_int8 import export_as_ours, quantize_as_ours
    from int8_encoders import student

    own = FOLDER / name
    if (own / "counts.json").is_file():
        return
    own.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(own / "work", ignore_errors=True)  # of a run that was interrupted
    subject = student(name)
    encoder, _ = export_as_ours(subject, own / "work")
    int8, names = quantize_as_ours(subject, encoder, own / "work")
    macs = node_macs(encoder)
    encoder.replace(own / "fp32.onnx")
    for encoding, path in int8.items():
        path.replace(own / f"int8.{encoding}.onnx")
    counts = {
        "macs": sum(macs.values()),
        "int8_macs_share": sum(macs.get(n, 0) for n in names) / sum(macs.values()),
        "parameters": sum(p.numel() for p in subject.model.image_encoder.parameters()),
        "nodes": len(graphs.load(own / "fp32.onnx").graph.node),
    }
    write_json(own / "counts.json", counts)


def image_of(name: str) -> dict[str, Any]:
    recipe = load_recipe(name)
    geometry = recipe.geometry
    pixels = to_encoder_input(read_image(PHOTO), geometry.image_size, recipe.pixels.padding, geometry.resize)
    return {IMAGE: pixels}


def peak_memory(name: str, variant: str, threads: int) -> float:
    """10⁶ bytes, of a fresh process that runs one graph once."""
    command = [sys.executable, __file__, "--peak", name, variant, "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def print_peak(name: str, variant: str, threads: int) -> None:
    graph, backend = VARIANTS[variant]
    with open_session(FOLDER / name / f"{graph}.onnx", backend, SessionOptions(threads)) as session:
        session.run(image_of(name))
    print(peak_rss_mb())


def measure(name: str, threads: int, runs: int) -> dict[str, Any]:
    own, feeds = FOLDER / name, image_of(name)
    with ExitStack() as stack:
        sessions = {
            label: stack.enter_context(open_session(own / f"{graph}.onnx", backend, SessionOptions(threads)))
            for label, (graph, backend) in VARIANTS.items()
        }
        samples = alternate({label: partial(s.run, feeds) for label, s in sessions.items()}, runs, WARMUP)
    medians = {label: statistics.median(times) for label, times in samples.items()}
    usable = {v for v in VARIANTS if not (v.startswith("int8") and "openvino" in v and int8_saturates())}
    fp32, int8 = (min((v for v in usable if v.startswith(kind)), key=lambda v: medians[v]) for kind in ("fp32", "int8"))
    ratios = np.array(samples[fp32]) / np.array(samples[int8])
    low, middle, high = (float(v) for v in np.percentile(ratios, (25, 50, 75)))
    return {
        "recipe": name,
        "backbone": str(load_recipe(name).options["backbone"]),
        "image_size": load_recipe(name).geometry.image_size,
        **json.loads((own / "counts.json").read_text(encoding="utf-8")),
        "variants": {
            label: {
                "median_ms": medians[label],
                "q1_ms": float(np.percentile(times, 25)),
                "q3_ms": float(np.percentile(times, 75)),
                "peak_rss_mb": peak_memory(name, label, threads),
                "graph_sha256": sha256_file(own / f"{VARIANTS[label][0]}.onnx"),
            }
            for label, times in samples.items()
        },
        "best_fp32": fp32,
        "best_int8": int8,
        "speedup": {"q1": low, "median": middle, "q3": high},
    }


def picture(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Bars of how many times faster INT8 is, the backbone it pays most for first, as an SVG file."""
    ordered = sorted(rows, key=lambda row: -row["speedup"]["median"])
    left, width, line = 210, 760, 26
    scale = (width - left - 150) / max(2.0, *(row["speedup"]["q3"] for row in ordered))
    height = 64 + line * len(ordered)
    parts = []
    for index, row in enumerate(ordered):
        y, speedup = 44 + line * index, row["speedup"]
        x = left + scale * speedup["median"]
        before, after = (row["variants"][row[f"best_{kind}"]]["median_ms"] for kind in ("fp32", "int8"))
        colour = "#009e73" if speedup["q1"] > 1.0 else "#d55e00" if speedup["q3"] < 1.0 else "#999"
        ends = [left + scale * speedup[q] for q in ("q1", "q3")]
        parts.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{row["backbone"]}</text>'
            f'<rect x="{left}" y="{y}" width="{x - left:.1f}" height="18" fill="{colour}" fill-opacity=".75"/>'
            f'<line x1="{ends[0]:.1f}" y1="{y + 9}" x2="{ends[1]:.1f}" y2="{y + 9}" stroke="#333"/>'
            f'<text x="{max(x, ends[1]) + 6:.1f}" y="{y + 13}">{speedup["median"]:.2f}×  '
            f"{before:.0f} → {after:.0f} ms</text>"
        )
    one = left + scale
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{title}"><style>text{{font:12px sans-serif;fill:#333}}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="12" y="22" style="font-size:13px">{title}</text>'
        f'<line x1="{one:.1f}" y1="36" x2="{one:.1f}" y2="{height - 16}" stroke="#333" stroke-dasharray="3 3"/>'
        f"{''.join(parts)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=[n for n in available_recipes() if n.startswith("student_")])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], options.peak[1], options.threads)
        return
    if options.one:
        prepare(options.one)
        return
    for name in options.recipes:  # each in a process of its own, which gives its memory back
        subprocess.run([sys.executable, __file__, "--one", name], check=True)
        print(f"{name}: ready", flush=True)
    if options.prepare:
        return
    rows = []
    for name in options.recipes:
        rows.append(measure(name, options.threads, options.runs))
        print(f"{name}: {rows[-1]['speedup']}", flush=True)
    title = f"INT8 against FP32, image encoders, {options.threads} threads: {machine()}"
    result = {
        "machine": machine(),
        "threads": options.threads,
        "runs": options.runs,
        "versions": versions({"onnxruntime", "openvino"}),
        "tools": tool_versions(),
        "rows": rows,
    }
    write_json(options.output / "students.json", result)
    write_bytes(options.output / "students.svg", picture(rows, title).encode())


if __name__ == "__main__":
    main()
