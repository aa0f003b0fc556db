"""INT8 against FP32 on ONNX Runtime, and start-up times: one run, alternating, medians and spread.

    python benchmarks/speed.py [--threads 1] [--runs 40] [--output benchmarks/results/cpu/speed.json]

Run it with nothing else at work. Figures are ratios first: milliseconds of a shared machine are upper bounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgesam_deploy.bundle import shipped_bundle
from edgesam_deploy.contract import IMAGE
from edgesam_deploy.files import sha256_file, write_json
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.recipe import PACKAGE, load_recipe
from edgesam_deploy.runtime import SessionOptions, open_session
from edgesam_deploy.stages.build import BuildOptions, build
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.target import load_target
from edgesam_deploy.transforms import to_encoder_input

PHOTO = PACKAGE / "assets" / "photos" / "verify" / "duck.jpg"
WARMUP = 5


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_ms": median, "q1_ms": low, "q3_ms": high, "runs": len(samples)}


def encoders(threads: int, runs: int) -> dict[str, Any]:
    """The FP32 encoder and its INT8 CPU twin, alternating in one process."""
    recipe = load_recipe("reference")
    feeds = {IMAGE: to_encoder_input(read_image(PHOTO), recipe.geometry.image_size, recipe.pixels.padding)}
    samples: dict[str, list[float]] = {"fp32": [], "int8": []}
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for precision in samples:
            output = Path(folder) / f"reference-{precision}"
            build(BuildOptions(recipe, load_target("cpu"), precision, output, backend="onnxruntime"))
            graphs[precision] = output / "encoder.onnx"
        sessions = {name: open_session(path, options=SessionOptions(threads=threads)) for name, path in graphs.items()}
        for run in range(WARMUP + runs):
            for name, session in sessions.items():
                started = time.perf_counter()
                session.run(feeds)
                if run >= WARMUP:
                    samples[name].append((time.perf_counter() - started) * 1e3)
        hashes = {name: sha256_file(path) for name, path in graphs.items()}
    ratios = [a / b for a, b in zip(samples["fp32"], samples["int8"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "threads": threads,
        **{name: spread(values) for name, values in samples.items()},
        "speedup_median": median,
        "speedup_q1": low,
        "speedup_q3": high,
        "encoder_sha256": hashes,
    }


def processes(runs: int) -> dict[str, Any]:
    """Whole processes: `sam-export --help`, and from start to a written mask with the shipped bundle."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "help": ["--help"],
            "first_mask": ["predict", str(PHOTO), "--point", "300,350", "-o", str(Path(folder) / "mask.png")],
        }
        samples: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, arguments in commands.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, "-m", "edgesam_deploy", *arguments], check=True, capture_output=True)
                samples[name].append((time.perf_counter() - started) * 1e3)
    return {name: spread(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/speed.json"))
    options = parser.parse_args()
    rows = [encoders(threads, options.runs) for threads in options.threads]
    for row in rows:
        print(
            f"encoder, {row['threads']} threads: FP32 {row['fp32']['median_ms']:.1f} ms, INT8 "
            f"{row['int8']['median_ms']:.1f} ms, {row['speedup_median']:.2f}x "
            f"(quartiles {row['speedup_q1']:.2f}-{row['speedup_q3']:.2f}, {options.runs} runs)"
        )
    started = processes(10)
    print(
        f"sam-export --help: {started['help']['median_ms']:.0f} ms; process start to mask: "
        f"{started['first_mask']['median_ms']:.0f} ms"
    )
    write_json(
        options.output,
        {
            "command": "python benchmarks/speed.py --threads " + " ".join(map(str, options.threads)),
            "machine": machine(),
            "encoder": rows,
            "processes": started,
            "bundle_manifest_sha256": sha256_file(shipped_bundle() / "manifest.json"),
            "tools": tool_versions(),
        },
    )


if __name__ == "__main__":
    main()
