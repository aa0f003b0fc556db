"""sam-export verify: a bundle's masks against the PyTorch FP32 model's."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import (
    Weights,
    backend_option,
    checkpoint_options,
    json_option,
    print_json,
    print_table,
    threads_option,
    track,
)

if TYPE_CHECKING:
    from edgesam_deploy.bundle import Bundle
    from edgesam_deploy.measure.accuracy import AccuracyResult


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--images", type=click.Path(path_type=Path), help="Verify on these instead (a fresh reference: needs torch)."
)
@checkpoint_options
@click.option("--min-iou", type=click.FloatRange(0, 1), help="Threshold for the mean. Default: the bundle's own.")
@backend_option
@threads_option
@json_option
def command(
    bundle: Path | None,
    images: Path | None,
    weights: Weights,
    min_iou: float | None,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check BUNDLE [default: the shipped INT8 reference] and exit with 3 if it is below its threshold."""
    if weights.mentioned and images is None:
        raise click.UsageError("--checkpoint goes with --images: a bundle's own answers need no weights")
    if min_iou is not None and isnan(min_iou):
        raise click.BadParameter("nan is not in the range 0<=x<=1.", param_hint="'--min-iou'")
    from edgesam_deploy.bundle import load_bundle, shipped_bundle
    from edgesam_deploy.errors import ThresholdError

    loaded = load_bundle(bundle or shipped_bundle()).on(backend)
    result = _on_images(loaded, images, weights, threads) if images else _on_recorded(loaded, threads)
    threshold = float(loaded.manifest["min_mask_iou"]) if min_iou is None else min_iou
    passed = result.mask_iou.mean >= threshold
    if as_json:
        from edgesam_deploy.cli.terminal import plain

        print_json({"bundle": str(loaded.path), **plain(result), "threshold": threshold, "passed": passed})
    else:
        groups = {"all": result.mask_iou, **result.by_size, **result.by_prompt}
        rows = [
            (name, *(f"{v:.4f}" for v in (s.mean, s.median, s.p5, s.min)), str(s.count)) for name, s in groups.items()
        ]
        title = f"mask IoU against PyTorch FP32 ({result.images} images, {result.witness})"
        print_table(title, ("prompts", "mean", "median", "p5", "min", "count"), rows)
        click.echo(f"embedding cosine: mean {result.embedding_cosine_mean:.5f}, min {result.embedding_cosine_min:.5f}")
        click.echo(f"threshold {threshold:g}: {'passed' if passed else 'missed'}")
    if not passed:
        raise ThresholdError(f"mask IoU {result.mask_iou.mean:.4f} of {loaded.path} is below {threshold:g}")


def _on_recorded(bundle: Bundle, threads: int | None) -> AccuracyResult:
    from edgesam_deploy.stages.verify import verify

    return verify(bundle, threads=threads, progress=lambda items: track("verify", items, None))


def _on_images(bundle: Bundle, images: Path, given: Weights, threads: int | None) -> AccuracyResult:
    import tempfile

    from edgesam_deploy.errors import CheckpointError, MissingExtraError
    from edgesam_deploy.files import sha256_file
    from edgesam_deploy.images import list_images
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.stages.verify import verify

    paths = list_images(images)
    try:
        from edgesam_deploy.stages.reference import record_answers
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    recipe = load_recipe(bundle.recipe)
    weights = given.find(recipe)
    if not weights.is_file():
        raise CheckpointError(f"checkpoint {weights} does not exist")
    if sha256_file(weights) != bundle.manifest.get("checkpoint_sha256"):
        raise CheckpointError(
            f"{weights} is not the checkpoint that {bundle.path} was built from (sha256 "
            f"{bundle.manifest.get('checkpoint_sha256')}): give that one with --checkpoint"
        )
    with tempfile.TemporaryDirectory() as folder:
        answers = record_answers(
            recipe, weights, paths, Path(folder) / "answers.npz", lambda items: track("reference", items, len(paths))
        )
    return verify(bundle, answers, images, threads, lambda items: track("verify", items, len(paths)))
