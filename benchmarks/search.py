"""The precision search on the reference model and on a graph of MobileSAM's size: what it finds, and how long it takes.

    python benchmarks/search.py [--runs reference:cpu reference:orin-nano-8gb mobile_sam:cpu] [--min-iou 0.98]
                                [--images 12] [--evaluations 120] [--timings 15] [--output benchmarks/results/search]

A run is RECIPE:TARGET. Times of a CPU target are measured on this machine, so run it with nothing else at work; those
of a device come from operations and bytes (``measure.roofline``). MobileSAM gets seeded random weights, whose masks
mean nothing: it is there for the minutes. Each run writes RECIPE-TARGET.json and RECIPE-TARGET.svg.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from edgesam_deploy.files import write_json
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.models import build_model
from edgesam_deploy.recipe import Recipe, load_recipe
from edgesam_deploy.stages.build import BuildOptions
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.search_run import find_int8
from edgesam_deploy.stages.sensitivity import TuneOptions
from edgesam_deploy.target import load_target

RUNS = ["reference:cpu", "reference:orin-nano-8gb", "mobile_sam:cpu"]


def checkpoint(recipe: Recipe, folder: Path) -> Path | None:
    """None for weights that the package carries; seeded random ones where they would have to be downloaded."""
    if recipe.checkpoint.file is not None:
        return None
    torch.manual_seed(0)
    path = folder / f"{recipe.name}.pt"
    torch.save(build_model(recipe).state_dict(), path)
    return path


def run(recipe: Recipe, target: str, options: TuneOptions, output: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = checkpoint(recipe, folder)
        build = BuildOptions(recipe, load_target(target), "int8", folder / "bundle", weights, search=options)
        found, stage = find_int8(build, lambda _, items, __: items)
        name = f"{recipe.name}-{target}"
        output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stage / "frontier.svg", output / f"{name}.svg")
    print(
        f"{name}: {found.search.verdict}; {found.sentence()}; {found.search.evaluations} in {found.minutes:.1f} minutes"
    )
    return {
        "weights": "shipped" if weights is None else "random, seed 0: read the minutes, not the masks",
        "int8": found.int8,
        **found.summary(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--min-iou", type=float, default=0.98)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--timings", type=int, default=15, help="runs of each graph that is timed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/search"))
    options = parser.parse_args()
    for name in options.runs:
        recipe, _, target = name.partition(":")
        tuning = TuneOptions(options.min_iou, options.images, options.evaluations, runs=options.timings)
        result = run(load_recipe(recipe), target, tuning, options.output)
        origin = {
            "command": f"python benchmarks/search.py --runs {name} --min-iou {options.min_iou} "
            f"--images {options.images} --evaluations {options.evaluations} --timings {options.timings}",
            "machine": machine(),
            "tools": tool_versions(),
        }
        write_json(options.output / f"{recipe}-{target}.json", {**origin, **result})


if __name__ == "__main__":
    main()
