"""sam-export selfcheck: build, verify and measure on this machine; one report to keep or to send."""

from __future__ import annotations

from pathlib import Path

import click

from edgesam_deploy.cli.terminal import json_option, print_json, say, threads_option


@click.command("selfcheck")
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option("--target", help="Default: the one that this machine is.")
@click.option("--recipe", default="reference", show_default=True, help="What to build where no bundle is given.")
@click.option("--runs", default=50, show_default=True, type=click.IntRange(min=1), help="Timed runs.")
@click.option(
    "-o",
    "--output",
    default="selfcheck",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for selfcheck.json and selfcheck.md.",
)
@threads_option
@json_option
def command(
    bundles: tuple[Path, ...],
    target: str | None,
    recipe: str,
    runs: int,
    output: Path,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check BUNDLES, or kits of this machine's target; without any, build RECIPE here in every precision.

    A Jetson checks kits that a PC built: sam-export selfcheck KIT... Takes minutes; measures best with nothing else at
    work.
    """
    from edgesam_deploy import device
    from edgesam_deploy.errors import EdgeSAMError, MissingExtraError, ThresholdError
    from edgesam_deploy.files import check_writable, write_bytes, write_json
    from edgesam_deploy.measure.bench import BenchOptions
    from edgesam_deploy.recipe import PRECISIONS
    from edgesam_deploy.stages.selfcheck import SelfCheck, check_bundle, packages, report
    from edgesam_deploy.stages.selfcheck import as_json as plain_result
    from edgesam_deploy.target import load_target

    machine = device.examine_machine()
    chosen, why = (load_target(target).name, "asked for") if target else device.choose_target(machine)
    check_writable(output / "selfcheck.json")
    paths = list(bundles)
    if not paths:
        try:
            from edgesam_deploy.stages.selfcheck import build_all

            paths = build_all(recipe, chosen, PRECISIONS, output / "bundles", say)
        except ImportError as error:
            raise MissingExtraError(error.name or "torch", "export") from error
    options = BenchOptions(runs=runs, threads=threads)
    checks = tuple(check_bundle(path, options, say) for path in paths)
    result = SelfCheck(machine, chosen, why, packages(), checks)
    write_json(output / "selfcheck.json", plain_result(result))
    write_bytes(output / "selfcheck.md", report(result).encode())
    if as_json:
        print_json(plain_result(result))
    else:
        click.echo(report(result), nl=False)
        click.echo(f"wrote {output / 'selfcheck.json'} and {output / 'selfcheck.md'}")
    if result.failed:
        raise EdgeSAMError(f"{len(result.failed)} of {len(checks)} bundles failed: {', '.join(result.failed)}")
    if result.missed:
        raise ThresholdError(f"below their thresholds: {', '.join(result.missed)}")
