"""sam-export targets: the devices there are."""

from __future__ import annotations

import click

from edgesam_deploy.cli.terminal import json_option, print_json, print_table


@click.command("targets")
@json_option
def command(as_json: bool) -> None:
    """List the devices that bundles are built for."""
    from edgesam_deploy.target import available_targets, load_target

    targets = [load_target(name) for name in available_targets()]
    if as_json:
        print_json(targets)
        return
    print_table(
        "targets",
        ("target", "backend", "INT8 encoding", "what it is"),
        [(t.name, t.backend, t.int8_encoding, t.summary) for t in targets],
    )
