"""sam-export doctor: what this machine can do, and the command that adds the rest."""

from __future__ import annotations

from typing import Any

import click

from edgesam_deploy.cli.targets import describe, detect
from edgesam_deploy.cli.terminal import json_option, print_json, print_table

# What the user wants to do -> the packages it takes, and the command that brings them.
ABILITIES = (
    ("run bundles on the CPU", ("onnxruntime",), "pip install 'edgesam-deploy[cpu]'"),
    ("run them on OpenVINO, often faster", ("openvino",), "pip install 'edgesam-deploy[openvino]'"),
    (
        "export, quantize and build",
        (
            "torch",
            "torchvision",
            "timm",
            "segment-anything",
            "onnx",
            "onnxscript",
            "onnxsim",
            "onnxslim",
            "onnxruntime",
        ),
        "pip install 'edgesam-deploy[export]'",
    ),
)
# A runtime for engines: what it does, its package, its module, a target that states its versions, and the extra.
ENGINE_RUNTIMES = (
    ("run TensorRT engines", "tensorrt", "tensorrt", "x86-gpu", "gpu"),
    ("run TensorRT for RTX engines", "tensorrt-rtx", "tensorrt_rtx", "rtx", "rtx"),
)


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine can export, build and run."""
    report = examine()
    if as_json:
        print_json(report)
        return
    rows = [
        (
            a["what"],
            "yes" if a["ready"] else "no",
            ", ".join(f"{k} {v}" for k, v in a["packages"].items()),
            "" if a["ready"] else a["cure"],
        )
        for a in report["abilities"]
    ]
    print_table("what this machine can do", ("to", "ready", "with", "if not, run"), rows)
    click.echo(f"Python {report['python']}, {report['machine']}, {report['cores']} cores, {report['memory_gb']:.1f} GB")
    if report["cpu_features"] is not None:
        click.echo(f"this CPU's instructions for INT8 and bfloat16: {', '.join(report['cpu_features']) or 'none'}")
    click.echo(describe(report["here"]))
    click.echo(f"shipped bundle: {report['shipped_bundle']}")
    for note in report["notes"]:
        click.echo(f"note: {note}")


def examine() -> dict[str, Any]:
    """Versions, abilities and notes about this machine, as plain JSON values."""
    import os
    import platform

    from edgesam_deploy.bundle import load_bundle, shipped_bundle
    from edgesam_deploy.device import cpu_features
    from edgesam_deploy.errors import BundleError
    from edgesam_deploy.measure.latency import machine

    here, features = detect(), cpu_features()
    abilities = []
    for what, packages, cure in ABILITIES:
        found = {name: _version(name) for name in packages}
        abilities.append({"what": what, "ready": "missing" not in found.values(), "packages": found, "cure": cure})
    abilities += _engine_abilities(here)
    try:
        bundle = f"{load_bundle(shipped_bundle()).path}, intact"
    except BundleError as error:
        bundle = str(error)
    return {
        "python": platform.python_version(),
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": features,
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "here": here,
        "abilities": abilities,
        "shipped_bundle": bundle,
        "notes": _notes(here, features),
    }


def _engine_abilities(here: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether engines can run here: a package of a version we support, and a GPU. Neither package is imported."""
    from importlib.util import find_spec

    from edgesam_deploy.target import load_target

    machine = here["machine"]
    abilities = []
    for what, package, module, target, extra in ENGINE_RUNTIMES:
        version = _version(package)
        if version == "missing" and find_spec(module) is not None:
            version = "of unknown version"  # JetPack's, or a package under another name
        supported = version[0].isdigit() and load_target(target).accepts_tensorrt(version)
        ready = (supported or version == "of unknown version") and bool(machine["gpu_names"])
        cure = f"pip install 'edgesam-deploy[{extra}]'"
        if machine["l4t"] and package == "tensorrt":
            cure = "sudo apt install nvidia-jetpack && python3 -m venv --system-site-packages .venv"
        elif not machine["gpu_names"]:
            cure = f"on a machine with an NVIDIA GPU: {cure}"
        gpu = machine["gpu_names"][0] if machine["gpu_names"] else "missing"
        abilities.append({"what": what, "ready": ready, "packages": {package: version, "GPU": gpu}, "cure": cure})
    return abilities


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _notes(here: dict[str, Any], features: tuple[str, ...] | None) -> list[str]:
    import sys

    notes = []
    if here["machine"]["l4t"]:
        notes.append("this is a Jetson: create environments with --system-site-packages to see JetPack's tensorrt")
    if features is not None and not {"avx512_vnni", "avx_vnni", "asimddp"} & set(features):
        notes.append(
            "this CPU has no VNNI: INT8 is slower here, and sums of uint8 x int8 can saturate (see the README)"
        )
    if sys.version_info < (3, 11):
        notes.append("exporting and quantizing need Python 3.11 or newer; running bundles does not")
    return notes
