"""sam-export build: all stages, from a checkpoint to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import (
    Weights,
    checkpoint_options,
    json_option,
    plain,
    print_json,
    print_table,
    say,
    track,
)

if TYPE_CHECKING:
    from edgesam_deploy.stages.build import BuildResult
    from edgesam_deploy.target import Target


@click.command("build")
@click.argument("recipe", default="reference")
@click.option("--precision", default="int8", show_default=True, help="fp32, fp16 or int8.")
@click.option("--target", default="cpu", show_default=True, help="Device; see `sam-export targets`.")
@checkpoint_options
@click.option("--calibration", type=click.Path(path_type=Path), help="Folder of at least 32 images. Default: shipped.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images to verify on. Default: shipped.")
@click.option("--min-iou", type=click.FloatRange(0, 1, min_open=True), help="Mask IoU to reach. Default: the recipe's.")
@click.option("--search", is_flag=True, help="int8: find the fastest choice of INT8 layers that reaches it.")
@click.option("--backend", default="auto", show_default=True, help="CPU targets: auto (the faster one), or its name.")
@click.option("--bf16", is_flag=True, help="CPU targets: let floats be bfloat16 where the CPU has it and gains by it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: engines/TARGET/RECIPE-PRECISION.")
@click.option("--force", is_flag=True, help="Redo stages that are up to date.")
@json_option
def command(
    recipe: str,
    precision: str,
    target: str,
    weights: Weights,
    calibration: Path | None,
    images: Path | None,
    min_iou: float | None,
    search: bool,
    backend: str,
    bf16: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build and verify a bundle for RECIPE, a name or a .toml file [default: reference]."""
    from edgesam_deploy.bundle import check_replaceable
    from edgesam_deploy.errors import MissingExtraError, ThresholdError
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.target import load_target

    loaded, device = load_recipe(recipe), load_target(target)
    folder = output or Path("engines") / device.name / f"{loaded.name}-{precision}"
    check_replaceable(folder)
    try:
        from edgesam_deploy.stages.build import BuildOptions, build
        from edgesam_deploy.stages.sensitivity import TuneOptions

        chosen = None if backend == "auto" else backend
        options = BuildOptions(
            loaded,
            device,
            precision,
            folder,
            weights.given(loaded),
            calibration,
            images,
            force,
            min_iou,
            TuneOptions(min_iou=min_iou, backend=chosen) if search else None,
            chosen,
            bf16,
            weights.consent(),
        )
        result = build(options, track)
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    if as_json:
        print_json({**plain(result), "mask_iou": plain(result.accuracy.mask_iou)})
    else:
        _show(result, f"{loaded.name} {precision} for {device.name}", device)
    if any(r.reused for r in result.stages):
        say("stages marked 'reused' were up to date; --force redoes them")
    if not result.passed:
        raise ThresholdError(
            f"mask IoU {result.accuracy.mask_iou.mean:.4f} is below the threshold {result.min_mask_iou:g} of recipe "
            f"'{loaded.name}' for {precision}; the bundle is marked unverified. Let a search keep what INT8 harms "
            "(--search), calibrate on images like yours (--calibration), or name layers in precision.int8.keep"
        )


def _show(result: BuildResult, title: str, device: Target) -> None:
    rows = [(r.name, "reused" if r.reused else "done", f"{r.seconds:.1f}", _note(r.detail)) for r in result.stages]
    print_table(title, ("stage", "state", "seconds", "what"), rows)
    iou = result.accuracy.mask_iou
    click.echo(
        f"mask IoU against PyTorch FP32: mean {iou.mean:.4f}, median {iou.median:.4f}, p5 {iou.p5:.4f}, "
        f"min {iou.min:.4f} over {iou.count} prompts (threshold {result.min_mask_iou:g})"
    )
    click.echo(f"bundle: {result.bundle}")
    from edgesam_deploy.bundle import ENGINE_BACKENDS

    if device.backend in ENGINE_BACKENDS:
        click.echo(
            f"this is a kit for {device.name}: copy the folder there and run  sam-export compile {result.bundle.name}"
        )


def _note(detail: object) -> str:
    skip = {"output", "encoder", "decoder", "images_digest", "rejected"}
    if not isinstance(detail, dict):
        return ""
    if isinstance(detail.get("kept"), dict):
        detail = {**detail, "kept": f"{len(detail['kept'])} in FP32"}
    return ", ".join(
        f"{k.replace('_', ' ')} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in detail.items() if k not in skip
    )
