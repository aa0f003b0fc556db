"""sam-export prune: a student's encoder with fewer channels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import Weights, checkpoint_options, json_option, print_json, print_table

if TYPE_CHECKING:
    from edgesam_deploy.distill.prune import PruneResult


@click.command("prune")
@click.argument("recipe")
@checkpoint_options
@click.option("--ratio", type=float, default=0.3, show_default=True, help="Of the encoder's MACs that go, up to 0.9.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the new recipe.")
@click.option(
    "--importance",
    type=click.Choice(["magnitude", "bn-scale", "random"]),
    default="magnitude",
    show_default=True,
    help="Of a channel; those of least go.",
)
@click.option("--round-to", type=int, default=8, show_default=True, help="Left channels are a multiple of this.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random importance.")
@json_option
def command(
    recipe: str,
    weights: Weights,
    ratio: float,
    output: Path,
    importance: str,
    round_to: int,
    seed: int,
    as_json: bool,
) -> None:
    """Take the least important channels out of the image encoder of RECIPE, a student with a convolutional backbone.

    Writes a recipe and its weights, to be recovered by sam-export distill and then built like any other.
    """
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.files import check_writable
    from edgesam_deploy.recipe import load_recipe, recipe_path

    try:
        from edgesam_deploy.distill.prune import PruneOptions, check_prunable, prune
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "torch_pruning":
            raise MissingExtraError("torch-pruning", "prune") from error
        raise MissingExtraError(error.name or "torch", "export") from error
    options = PruneOptions(ratio, importance, round_to, seed)
    source = recipe_path(recipe)
    loaded = load_recipe(source)
    check_prunable(loaded)
    check_writable(output / f"{loaded.name}.toml")
    result = prune(source, weights.find(loaded), output, options)
    _print(result, recipe, weights, as_json)


def _print(result: PruneResult, recipe: str, weights: Weights, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    fewer = 1 - result.parameters_after / result.parameters_before
    print_table(
        f"{result.name}: image encoder, {result.layers} layers narrower",
        ("", "before", "after", "fewer"),
        [
            ("parameters, M", f"{result.parameters_before / 1e6:.3f}", f"{result.parameters_after / 1e6:.3f}",
             f"{100 * fewer:.1f} %"),
            ("MACs, G", f"{result.macs_before / 1e9:.3f}", f"{result.macs_after / 1e9:.3f}",
             f"{100 * result.reduction:.1f} %"),
        ],
    )  # fmt: skip
    click.echo(f"recipe: {result.recipe}")
    click.echo(f"checkpoint: {result.checkpoint} (sha256 {result.sha256[:12]}…)")
    own = "".join(f" --checkpoint {path}" for path in weights.files)
    click.echo(
        f"recover it: sam-export distill {result.recipe} --teacher {recipe}{own} --init {result.checkpoint} "
        "--images FOLDER -o FOLDER"
    )
