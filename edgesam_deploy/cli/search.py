"""sam-export search: which blocks can be INT8 within a mask-IoU budget, and whether that pays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import (
    Weights,
    checkpoint_options,
    json_option,
    print_json,
    print_table,
    say,
    threads_option,
    track,
)

if TYPE_CHECKING:
    from edgesam_deploy.stages.sensitivity import TuneResult


@click.command("search")
@click.argument("recipe", default="reference")
@click.option("--target", default="cpu", show_default=True, help="Device; see `sam-export targets`.")
@click.option("--min-iou", type=click.FloatRange(0, 1, min_open=True), help="Mask IoU to reach. Default: the recipe's.")
@checkpoint_options
@click.option("--calibration", type=click.Path(path_type=Path), help="Folder of at least 32 images. Default: shipped.")
@click.option("--images", type=click.IntRange(1), help="Measure masks on this many of them. Default: 12.")
@click.option("--backend", default="auto", show_default=True, help="CPU targets: auto (the faster one), or its name.")
@threads_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for search.json and frontier.svg.")
@json_option
def command(
    recipe: str,
    target: str,
    min_iou: float | None,
    weights: Weights,
    calibration: Path | None,
    images: int | None,
    backend: str,
    threads: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Find the fastest choice of INT8 blocks of RECIPE [default: reference] whose masks stay good enough.

    Exit code 3 if none that pays does. A build with --search goes on from what was measured here.
    """
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.target import load_target

    loaded, device = load_recipe(recipe), load_target(target)
    folder = Path("engines") / device.name / f"{loaded.name}-int8"
    try:
        from edgesam_deploy.stages.build import BuildOptions
        from edgesam_deploy.stages.search_run import find_int8
        from edgesam_deploy.stages.sensitivity import TuneOptions

        chosen = None if backend == "auto" else backend
        default = TuneOptions(min_iou=min_iou, backend=chosen)
        options = TuneOptions(min_iou=min_iou, backend=chosen, threads=threads, images=images or default.images)
        build = BuildOptions(
            loaded,
            device,
            "int8",
            folder,
            weights.given(loaded),
            calibration,
            min_iou=min_iou,
            search=options,
            backend=chosen,
            consent=weights.consent(),
        )
        result, found_in = find_int8(build, track)
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("search.json", "frontier.svg"):
            shutil.copyfile(found_in / name, output / name)
    if as_json:
        print_json(result.summary())
    else:
        _show(result, f"{loaded.name} for {device.name}", output or found_in)
    if result.search.verdict == "keep":
        say(f"build it:  sam-export build {recipe} --target {target} --precision {result.rest}")
    elif result.search.verdict == "int8":
        say(f"build it:  sam-export build {recipe} --target {target} --precision int8 --search")
    result.demand()


def _show(result: TuneResult, title: str, folder: Path) -> None:
    found = result.search
    chosen = found.chosen.int8 if found.chosen is not None else frozenset()
    blocks = [
        (
            block,
            str(layers),
            f"{found.alone[block]:.4f}" if block in found.alone else "–",
            f"{found.gain_ms[block]:.3f}",
            "int8" if block in chosen else result.rest,
        )
        for block, layers in result.layers.items()
    ]
    print_table(f"{title}: blocks", ("block", "layers", "IoU lost alone", "ms gained", "precision"), blocks)
    points = [
        (
            f"{point.cost_ms:.3f}",
            f"{point.mask_iou:.4f}",
            f"{found.rest.cost_ms / point.cost_ms:.2f}×",
            str(len(point.int8)),
            "chosen" if point == found.chosen else "",
        )
        for point in found.frontier
    ]
    print_table(
        f"frontier ({result.cost_source})", ("ms", "mask IoU", f"against {result.rest}", "INT8 blocks", ""), points
    )
    if found.verdict != "unmet":
        click.echo(result.sentence())
    click.echo(
        f"{found.evaluations} assignments measured on {result.images} images in {result.minutes:.1f} minutes; "
        f"{folder / 'frontier.svg'}"
    )
