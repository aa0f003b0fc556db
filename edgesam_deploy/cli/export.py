"""sam-export export: checkpoint -> encoder.onnx and decoder.onnx."""

from __future__ import annotations

from pathlib import Path

import click

from edgesam_deploy.cli.terminal import Weights, checkpoint_options, json_option, print_json


@click.command("export")
@click.argument("recipe", default="reference")
@checkpoint_options
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the two graphs.")
@json_option
def command(recipe: str, weights: Weights, output: Path, as_json: bool) -> None:
    """Export RECIPE's image encoder and mask decoder to FP32 ONNX [default: reference]."""
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.files import check_writable
    from edgesam_deploy.recipe import load_recipe

    loaded = load_recipe(recipe)
    try:
        from edgesam_deploy.stages.export import export
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    check_writable(output / "encoder.onnx")
    result = export(loaded, weights.find(loaded), output)
    if as_json:
        print_json(result)
        return
    click.echo(f"wrote {result.encoder} ({result.encoder_nodes} nodes)")
    click.echo(f"wrote {result.decoder} ({result.decoder_nodes} nodes)")
    click.echo(f"largest difference to PyTorch: {result.max_error:.2g} of the largest output")
