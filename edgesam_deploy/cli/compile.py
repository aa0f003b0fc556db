"""sam-export compile: a kit -> engines, on the device they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import json_option, plain, print_json, print_table, say

if TYPE_CHECKING:
    from edgesam_deploy.bundle import Bundle
    from edgesam_deploy.stages.compile import CompileOptions, Progress
    from edgesam_deploy.stages.finish import FinishResult
    from edgesam_deploy.target import Target


@click.command("compile")
@click.argument("kit", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Another folder. Default: the kit becomes it.")
@click.option("--workspace-mb", type=click.IntRange(min=1), help="Memory for tactics. Default: the target's.")
@click.option("--max-prompts", default=16, show_default=True, type=click.IntRange(min=1), help="Prompts in one call.")
@click.option(
    "--max-points",
    default=16,
    show_default=True,
    type=click.IntRange(min=2),
    help="Points of one prompt; a box counts 2, and points without a box 1 more.",
)
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    help="For tensorrt_rtx, such as 8.9. Repeatable. Default: portable.",
)
@click.option("--version-compatible", is_flag=True, help="Runs on later releases of the same major version; slower.")
@click.option("--hardware-compatible", is_flag=True, help="Runs on other GPUs from Ampere on, not Jetson; slower.")
@click.option("--tf32/--no-tf32", default=True, show_default=True, help="FP32 layers may multiply in TF32.")
@click.option("--audit", is_flag=True, help="List the data type that each ONNX node was compiled to.")
@json_option
def command(
    kit: Path,
    output: Path | None,
    workspace_mb: int | None,
    max_prompts: int,
    max_points: int,
    capabilities: tuple[str, ...],
    version_compatible: bool,
    hardware_compatible: bool,
    tf32: bool,
    audit: bool,
    as_json: bool,
) -> None:
    """Compile the typed graphs of KIT here, verify the engines on this GPU, and make it a bundle that runs.

    On a Jetson this takes the base install and JetPack's TensorRT, neither PyTorch nor ONNX. TensorRT for RTX compiles
    without a GPU; its engines are then verified where they run, by `sam-export verify`.
    """
    from edgesam_deploy.bundle import check_replaceable, load_bundle
    from edgesam_deploy.errors import ThresholdError
    from edgesam_deploy.stages.compile import CompileOptions, ShapeProfile
    from edgesam_deploy.target import load_target

    # Resolved, and without its old engines: they may be cut or missing, and are about to be replaced.
    bundle = load_bundle(kit.resolve(), plans=False)
    target = load_target(bundle.target)
    if output is not None:
        check_replaceable(output)
    options = CompileOptions(
        workspace_mb=workspace_mb or target.workspace_mb or None,
        shape_profile=ShapeProfile(prompts=(1, 1, max_prompts), points=(0, 2, max_points)),
        compute_capabilities=capabilities,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        tf32=tf32,
    )
    result = _finish(bundle, target, options, output, audit)
    if as_json:
        print_json(_answer(result))
    else:
        _show(result)
    if result.passed is False and result.accuracy is not None:
        raise ThresholdError(
            f"mask IoU {result.accuracy.mask_iou.mean:.4f} of the engines is below the threshold "
            f"{result.min_mask_iou:g}; the bundle is marked unverified. Compare with the kit's own results in "
            "manifest.json, and compile with --no-tf32 or another precision"
        )


def _finish(bundle: Bundle, target: Target, options: CompileOptions, output: Path | None, audit: bool) -> FinishResult:
    from edgesam_deploy.stages.finish import finish

    with _progress() as bars:
        return finish(bundle, target, options, output, bars, audit)


def _answer(result: FinishResult) -> dict[str, object]:
    engines = {
        name: {
            "file": f"{name}.engine",
            "seconds": r.seconds,
            "size_bytes": r.size_bytes,
            "timing_cache": r.timing_cache_read,
        }
        for name, r in result.engines.items()
    }
    return {**plain(result), "engines": engines}


def _show(result: FinishResult) -> None:
    record = result.record
    rows = [
        (name, f"{r.seconds:.1f}", f"{r.size_bytes / 1e6:.1f}", "yes" if r.timing_cache_read else "no")
        for name, r in result.engines.items()
    ]
    where = " and ".join(record.compute_capabilities) or "any GPU it supports"
    print_table(
        f"{record.library} {record.version} for compute capability {where}",
        ("engine", "seconds", "MB", "timing cache read"),
        rows,
    )
    if result.accuracy is None:
        say(f"the engines were not run: {result.unverified}. Where they run: sam-export verify BUNDLE")
    else:
        iou = result.accuracy.mask_iou
        click.echo(
            f"mask IoU against PyTorch FP32: mean {iou.mean:.4f}, p5 {iou.p5:.4f} over {iou.count} prompts "
            f"(threshold {result.min_mask_iou:g})"
        )
    if result.audits:
        _show_audits(result)
    click.echo(f"bundle: {result.bundle}")


def _show_audits(result: FinishResult) -> None:
    """How many nodes were compiled to each type, and every node that was not compiled as meant."""
    rows = [
        (
            name,
            ", ".join(f"{count} {kind}" for kind, count in a.nodes.items()),
            str(len(a.mismatched)),
            str(len(a.missing)),
            str(sum(sum(kinds.values()) for kinds in a.layers.values())),
            str(len(a.overhead)),
        )
        for name, a in result.audits.items()
    ]
    print_table(
        "audit", ("engine", "nodes by compiled type", "not as meant", "folded", "layers", "only moving data"), rows
    )
    for name, a in result.audits.items():
        for row in a.mismatched:
            click.echo(f"{name}: {row.node} is meant {row.wanted}, compiled {row.compiled}: {row.reason}")


@contextmanager
def _progress() -> Iterator[Callable[[str], Progress]]:
    """Bars on stderr for what TensorRT's builder does, one per phase and graph."""
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    console = Console(stderr=True)
    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def of(graph: str) -> Progress:
            def step(phase: str, done: int, total: int) -> None:
                name = f"{graph}: {phase}"
                if name not in tasks:
                    tasks[name] = bars.add_task(name)
                bars.update(tasks[name], completed=done, total=total)

            return step

        yield of
