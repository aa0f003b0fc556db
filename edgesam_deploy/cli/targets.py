"""sam-export targets: the devices there are, and which of them this machine is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import json_option, plain, print_json, print_table

if TYPE_CHECKING:
    from edgesam_deploy.target import Device, Target

# Figure of a device -> its unit.
UNITS = {
    "compute_capability": "",
    "memory_gb": "GB",
    "memory_bandwidth_gb_s": "GB/s",
    "fp16_dense_tflops": "TFLOPS",
    "int8_dense_tops": "TOPS",
}


@click.command("targets")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the devices that bundles are built for; with NAME, one target's figures, each with its source."""
    from edgesam_deploy.target import available_targets, load_target

    if name is not None:
        target = load_target(name)
        if as_json:
            print_json(target)
        else:
            _print_target(target)
        return
    targets = [load_target(known) for known in available_targets()]
    here = detect()
    if as_json:
        print_json({"targets": targets, **here})
        return
    _print_targets(targets)
    click.echo(describe(here))


def detect() -> dict[str, Any]:
    """``machine``: what is known of this one; ``target``: which fits, None if none may be used; ``why``: a sentence."""
    from edgesam_deploy.device import choose_target, examine_machine
    from edgesam_deploy.errors import TargetError

    machine = examine_machine()
    try:
        target, why = choose_target(machine)
    except TargetError as error:
        return {"machine": plain(machine), "target": None, "why": f"{error}."}
    return {"machine": plain(machine), "target": target, "why": why}


def describe(here: dict[str, Any]) -> str:
    """One line of what ``detect`` found."""
    return f"this machine: {here['target'] or 'no target'}: {here['why']}"


def _print_targets(targets: list[Target]) -> None:
    rows = []
    for target in targets:
        software = (_tensorrt(target), " ".join(release.jetpack for release in target.releases) or "–")
        if not target.devices:
            rows.append((target.name, target.summary.partition(";")[0], *["–"] * 5, *software))
        rows += [
            (target.name, device.name, *(_number(getattr(device, figure)) for figure in UNITS), *software)
            for device in target.devices
        ]
    columns = ("target", "device", "compute cap.", "GB", "GB/s", "FP16 TFLOPS", "INT8 TOPS", "TensorRT", "JetPack")
    print_table("targets (FP16 and INT8: dense peaks; sources: sam-export targets NAME)", columns, rows)


def _print_target(target: Target) -> None:
    click.echo(f"{target.name}: {target.summary}")
    click.echo(f"backend {target.backend}, INT8 encoding {target.int8_encoding}, precision {target.precision}")
    if target.workspace_mb is not None:
        click.echo(f"TensorRT {_tensorrt(target)}, builder workspace {target.workspace_mb} MB")
    for device in target.devices:
        print_table(device.name, ("figure", "value", "source"), _figures(device))
    if target.releases:
        print_table(
            "JetPack releases",
            ("JetPack", "Jetson Linux", "TensorRT", "CUDA", "Python", "source"),
            [(r.jetpack, r.l4t, r.tensorrt, r.cuda, r.python, r.source) for r in target.releases],
        )
    for note in target.notes:
        click.echo(f"note: {note}")


def _figures(device: Device) -> list[tuple[str, str, str]]:
    rows = [
        (figure, f"{_number(getattr(device, figure))} {unit}".strip(), device.sources[figure])
        for figure, unit in UNITS.items()
    ]
    modes = []
    for mode in device.power_modes:
        limits = [f"{_number(mode.watts)} W"] if mode.watts else ["no limit"]
        limits += [f"{_number(mode.max_gpu_mhz)} MHz"] if mode.max_gpu_mhz else []
        modes.append(f"{mode.name}: {', '.join(limits)}")
    return [*rows, ("power_modes", "\n".join(modes), device.sources["power_modes"])]


def _tensorrt(target: Target) -> str:
    if target.tensorrt_min is None:
        return "–"
    kind = "RTX " if target.backend == "tensorrt_rtx" else ""
    return f"{kind}{target.tensorrt_min} to below {target.tensorrt_below}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
