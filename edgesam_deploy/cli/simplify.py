"""sam-export simplify: fold what can be folded in an ONNX graph."""

from __future__ import annotations

from pathlib import Path

import click

from edgesam_deploy.cli.terminal import json_option, print_json, say


@click.command("simplify")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The simplified graph.")
@json_option
def command(source: Path, output: Path, as_json: bool) -> None:
    """Simplify the ONNX graph SOURCE; the result is accepted only if it computes the same."""
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.files import check_writable

    try:
        from edgesam_deploy.stages.simplify import simplify
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export") from error
    check_writable(output)
    result = simplify(source, output)
    if as_json:
        print_json(result)
        return
    for reason in result.rejected:
        say(f"rejected: {reason}")
    click.echo(f"wrote {result.output}: {result.nodes_before} -> {result.nodes_after} nodes by {result.tool}")
