"""Fit the shares of a device's peaks that engines reach to published latencies, and write them into the package.

    python benchmarks/estimate_fit.py [--graphs DIR] [--output edgesam_deploy/assets/efficiency.json]

The latencies are those of the five EfficientViT-SAMs on a Jetson AGX Orin with TensorRT in FP16 at batch 1. Their
README calls them end-to-end, which is taken to mean encoder and decoder; data transfers are included and not modelled
apart. Only shapes and types count, so that the graphs have initial weights. --graphs keeps them for another run: they
take minutes to make. Rows that were tried on the factors (``estimate_try.py``) are dropped when they are fitted again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgesam_deploy.bundle import GRAPHS
from edgesam_deploy.files import write_json
from edgesam_deploy.measure.efficiency import FILE, Row
from edgesam_deploy.measure.roofline import Kernel, price
from edgesam_deploy.recipe import load_recipe
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.fit_efficiency import Sample, fit
from edgesam_deploy.stages.node_work import kernels
from edgesam_deploy.stages.skeleton import simplified_graphs, typed_graphs
from edgesam_deploy.target import load_target

TARGET, PRECISION = "agx-orin-64gb", "fp16"
SOURCE = "github.com/mit-han-lab/efficientvit, applications/efficientvit_sam/README.md, table of models"
MEASURED_MS = {
    "efficientvit_sam_l0": 8.2,
    "efficientvit_sam_l1": 10.2,
    "efficientvit_sam_l2": 12.9,
    "efficientvit_sam_xl0": 22.5,
    "efficientvit_sam_xl1": 37.2,
}


def typed(name: str, target: str, precision: str, folder: Path) -> dict[str, Path]:
    """Both typed graphs of a recipe, kept in ``folder``."""
    own = folder / name
    kept = {graph: own / f"{graph}.{precision}.onnx" for graph in GRAPHS}
    if not all(path.is_file() for path in kept.values()):
        own.mkdir(parents=True, exist_ok=True)
        recipe = load_recipe(name)
        made = typed_graphs(simplified_graphs(recipe, own), recipe, load_target(target), precision, own)
        for graph, path in made.items():
            if path != kept[graph]:
                path.replace(kept[graph])
    return kept


def work(paths: Iterable[Path]) -> list[Kernel]:
    """The kernels of several graphs, one after another."""
    return [kernel for path in paths for kernel in kernels(graphs.load(path))]


def sample(name: str, measured_ms: float, folder: Path) -> Sample:
    print(f"{name} …", file=sys.stderr)
    found = work(typed(name, TARGET, PRECISION, folder).values())
    return Sample(name, load_target(TARGET).devices[0], found, measured_ms)


def rows(samples: Sequence[Sample]) -> list[Row]:
    factors = fit(samples)
    found = []
    for one in samples:
        without = fit([other for other in samples if other is not one])
        ms, left_out = (price(one.kernels, one.device, used).ms for used in (factors, without))
        found.append(Row(one.name, one.device.name, PRECISION, one.measured_ms, ms, SOURCE, left_out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=Path, default=Path("engines/.estimate"))
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()
    samples = [sample(name, ms, arguments.graphs) for name, ms in MEASURED_MS.items()]
    factors, fitted = fit(samples), rows(samples)
    result = {
        "efficiency": dataclasses.asdict(factors),
        "fitted": [dataclasses.asdict(row) for row in fitted],
        "tried": [],
        "origin": {"script": "benchmarks/estimate_fit.py", "recipes": {n: load_recipe(n).digest for n in MEASURED_MS}},
    }
    write_json(arguments.output, result)
    print(factors)
    for row in fitted:
        print(f"{row.name}: measured {row.measured_ms} ms, model {row.model_ms:.2f}, left out {row.left_out_ms:.2f} "
              f"({row.error:+.0%})")  # fmt: skip


if __name__ == "__main__":
    main()
