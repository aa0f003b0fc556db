"""sam-export estimate: what a model would take on a device that is not here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import json_option, print_json, print_table, say, track

if TYPE_CHECKING:
    from edgesam_deploy.measure.efficiency import Fit
    from edgesam_deploy.stages.estimate import Estimate
    from edgesam_deploy.target import Target


@click.command("estimate")
@click.argument("recipe", default="reference")
@click.option("--target", "targets", multiple=True, help="Device to estimate for; may be repeated.")
@click.option("--all-targets", is_flag=True, help="Every target that states its peaks.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "fp16", "int8"]),
    multiple=True,
    help="May be repeated. Default: fp16 and int8.",
)
@click.option("--layers", is_flag=True, help="Also list the longest kernels.")
@json_option
def command(
    recipe: str, targets: tuple[str, ...], all_targets: bool, precisions: tuple[str, ...], layers: bool, as_json: bool
) -> None:
    """Estimate latency, memory and energy of RECIPE [default: reference], a bundle or an .onnx file, on devices.

    From the typed graphs alone: per kernel the longer of arithmetic and memory traffic at the device's peaks, at shares
    fitted to published latencies. No weights are needed. Measure on the device before you decide.
    """
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.measure.efficiency import load_fit
    from edgesam_deploy.target import available_targets, load_target

    if all_targets == bool(targets):
        raise click.UsageError("give --target NAME (repeat it for several) or --all-targets")
    known = [load_target(name) for name in (available_targets() if all_targets else targets)]
    chosen = [target for target in known if target.devices] if all_targets else known
    fit = load_fit()
    try:
        found = _estimates(recipe, chosen, precisions, fit)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    if as_json:
        print_json({"estimates": found, "efficiency": fit.efficiency, "factor": fit.factor, "fitted": fit.fitted,
                    "tried": fit.tried})  # fmt: skip
        return
    _show(found, fit)
    if layers:
        _show_layers(found)


def _estimates(subject: str, targets: Sequence[Target], precisions: Sequence[str], fit: Fit) -> list[Estimate]:
    import tempfile

    from edgesam_deploy.stages.estimate import estimate

    path = Path(subject)
    given = path.suffix == ".onnx" or (path / "manifest.json").is_file()
    if given:
        if precisions:
            raise click.UsageError("--precision goes with a recipe: a bundle or a graph has its own")
        graphs, precision = _given(path)
        return [e for target in targets for e in estimate(path.name, graphs, precision, target, fit)]
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.stages.skeleton import simplified_graphs, typed_graphs

    recipe = load_recipe(subject)
    found: list[Estimate] = []
    with tempfile.TemporaryDirectory() as folder:
        say(f"exporting {recipe.name} with initial weights; minutes for large models")
        sources = simplified_graphs(recipe, Path(folder))
        jobs = [(target, precision) for target in targets for precision in precisions or ("fp16", "int8")]
        for target, precision in track("estimate", jobs, len(jobs)):
            typed = typed_graphs(sources, recipe, target, precision, Path(folder))
            found += estimate(recipe.name, typed, precision, target, fit)
    return found


def _given(path: Path) -> tuple[dict[str, Path], str]:
    """(graphs by name, their precision as it is called)."""
    if path.suffix == ".onnx":
        return {path.stem: path}, "as typed"
    from edgesam_deploy.bundle import GRAPHS, load_bundle

    bundle = load_bundle(path, plans=False)
    return {name: bundle.graph(name) for name in GRAPHS}, bundle.precision


def _show(found: Iterable[Estimate], fit: Fit) -> None:
    rows = []
    for e in found:
        parts = [f"{part.ms:.2f}" for part in e.graphs]
        rows.append(
            (
                e.device,
                e.precision,
                f"{e.ms:.2f}" + ("" if e.seen else " *"),
                f"{e.low_ms:.2f}–{e.high_ms:.2f}",
                " + ".join(parts),
                f"{e.memory_mb:.0f}" + ("" if e.fits else " does not fit"),
                f"{e.energy_mj:.0f} ({e.power_mode})" if e.energy_mj is not None else "–",
            )
        )
    columns = ("device", "precision", "ms", "range", "encoder + decoder", "MB", "mJ at most")
    name = next((e.name for e in found), "")
    print_table(f"{name}: estimated, not measured; one image, one click", columns, rows)
    click.echo(
        f"range: 9 of 10 published latencies that the model had not seen lie within a factor of {fit.factor:.2f} "
        f"({len(fit.fitted)} left out in turn, {len(fit.tried)} others; median error {fit.median_error:.0%})"
    )
    if any(not e.seen for e in found):
        click.echo("*: no published latency of this device in this precision was at hand; the same shares are assumed")


def _show_layers(found: Iterable[Estimate]) -> None:
    for e in found:
        for part in e.graphs:
            waits = ", ".join(f"{bound} {ms / part.ms:.0%}" for bound, ms in part.bound_ms.items())
            rows = [(n.node, n.precision, f"{n.ms:.3f}", n.bound, f"{n.operations / 2e9:.3f}", f"{n.bytes / 1e6:.1f}")
                    for n in part.top]  # fmt: skip
            title = f"{e.device}, {e.precision}, {part.graph}: {part.kernels} kernels; {waits}"
            print_table(title, ("longest kernels", "precision", "ms", "waits for", "GMACs", "MB moved"), rows)
