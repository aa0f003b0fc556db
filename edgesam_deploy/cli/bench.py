"""sam-export bench: latency, memory and power of a bundle."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import (
    backend_option,
    json_option,
    plain,
    print_json,
    print_table,
    say,
    threads_option,
    track,
)

if TYPE_CHECKING:
    from edgesam_deploy.bundle import Bundle
    from edgesam_deploy.measure.bench import BenchResult
    from edgesam_deploy.measure.compare import BackendRow, CompareResult
    from edgesam_deploy.measure.engine_latency import EngineLatencyOptions

NOISY_CV = 0.1


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--image", type=click.Path(path_type=Path), help="Default: a shipped photograph.")
@click.option("--runs", default=50, show_default=True, type=click.IntRange(min=1), help="Timed runs.")
@click.option("--warmup", default=10, show_default=True, type=click.IntRange(min=0), help="Runs before timing.")
@click.option(
    "--cuda", type=click.Choice(["ctypes", "pycuda"]), default="ctypes", show_default=True, help="CUDA through."
)
@click.option(
    "--like-trtexec", type=click.Choice(["10", "11"]), default="10", show_default=True, help="Engine timing's defaults."
)
@click.option("--transfers/--no-transfers", default=None, help="Engines: copy inputs and outputs with every query.")
@click.option("--cuda-graph/--no-cuda-graph", default=None, help="Launch the encoder as a recorded CUDA graph.")
@click.option("--spin-wait/--no-spin-wait", default=None, help="Engines: the host asks instead of sleeping.")
@click.option("--export-times", type=click.Path(path_type=Path), help="Folder for each engine's times, as trtexec's.")
@backend_option
@click.option("--compare", is_flag=True, help="Time both graphs on every CPU backend, in turn, and measure the masks.")
@threads_option
@json_option
def command(
    bundle: Path | None,
    image: Path | None,
    runs: int,
    warmup: int,
    cuda: str,
    like_trtexec: str,
    transfers: bool | None,
    cuda_graph: bool | None,
    spin_wait: bool | None,
    export_times: Path | None,
    backend: str | None,
    compare: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time BUNDLE [default: the shipped INT8 reference] on one image and one click.

    Encoder, decoder and what surrounds them are timed apart, then what an application waits for; engines also by CUDA
    events, as trtexec does.
    """
    from edgesam_deploy.bundle import load_bundle, shipped_bundle
    from edgesam_deploy.measure.bench import BenchOptions, bench
    from edgesam_deploy.recipe import PACKAGE

    if compare and (backend is not None or export_times is not None):
        raise click.UsageError("--compare runs every CPU backend: leave out --backend and --export-times")
    loaded = load_bundle(bundle or shipped_bundle()).on(backend)
    photo = image or PACKAGE / "assets" / "photos" / "verify" / "duck.jpg"
    if compare:
        _compare(loaded, photo, runs, warmup, threads, as_json)
        return
    if export_times is not None:
        _check_export(loaded, export_times)
    given = {"transfers": transfers, "cuda_graph": cuda_graph, "spin_wait": spin_wait}
    options = BenchOptions(runs, warmup, threads, cuda, _engine_options(int(like_trtexec), given))
    result = bench(
        loaded,
        photo,
        options,
        lambda items: track("bench", items, runs + warmup),
    )
    if export_times is not None:
        _export(result, export_times)
    if as_json:
        print_json(answer(result))
    else:
        _show(result)


def answer(result: BenchResult) -> dict[str, Any]:
    """The result as JSON: the parts at the top, and of engines the summaries without every single query."""
    from dataclasses import replace

    engines = {name: plain(replace(e, samples=())) for name, e in (result.engines or {}).items()}
    rest = {
        "pipeline": plain(result.pipeline),
        "camera_fps": result.camera_fps,
        "clocks": plain(result.clocks),
        "power": plain(result.power),
        "power_note": result.power_note,
        "engines": engines or None,
        "device_memory_bytes": result.device_memory_bytes,
    }
    return {**plain(result.parts), **rest}


def _compare(bundle: Bundle, photo: Path, runs: int, warmup: int, threads: int | None, as_json: bool) -> None:
    from edgesam_deploy.images import read_image
    from edgesam_deploy.measure.compare import CompareOptions, compare_backends

    options = CompareOptions(runs, warmup, threads)
    result = compare_backends(bundle, read_image(photo), options, lambda items: track("bench", items, runs + warmup))
    if as_json:
        print_json(result)
        return
    measured = f"mask IoU on {result.images} images" if result.images else "mask IoU"
    print_table(
        f"{result.bundle} ({result.precision}), {result.threads} threads, {result.machine}, median (p90) in ms",
        ("backend", "encoder", "of the first", "decoder", "of the first", measured),
        [_compared(row) for row in result.rows],
    )
    _tell(result)


def _compared(row: BackendRow) -> tuple[str, ...]:
    times = [row.graphs.get(name) for name in ("encoder", "decoder")]
    cells = [(f"{t.median_ms:.2f} ({t.p90_ms:.2f})", f"{t.ratio:.2f}") if t else ("–", "–") for t in times]
    iou = "–" if row.mask_iou is None else f"{row.mask_iou.mean:.4f}"
    return (row.label, *(cell for pair in cells for cell in pair), iou)


def _tell(result: CompareResult) -> None:
    for row in result.rows:
        if row.note is not None:
            click.echo(f"{row.label}: {row.note}")
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    click.echo(f"{result.runs} runs in turn after {result.warmup} for warm-up, {versions}")
    click.echo(f"the bundle itself runs on {result.runs_on}")


def _engine_options(major: int, given: dict[str, bool | None]) -> EngineLatencyOptions:
    from dataclasses import replace

    from edgesam_deploy.measure.engine_latency import EngineLatencyOptions

    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(EngineLatencyOptions.like_trtexec(major), **chosen)


def _check_export(bundle: Bundle, folder: Path) -> None:
    """Raise now, rather than after all runs, if there will be nothing to export or nowhere to put it."""
    from edgesam_deploy.bundle import ENGINE_BACKENDS, GRAPHS
    from edgesam_deploy.errors import InputError
    from edgesam_deploy.files import check_writable

    if bundle.backend not in ENGINE_BACKENDS:
        raise InputError(f"--export-times is for engines; {bundle.path} runs on {bundle.backend}")
    for name in GRAPHS:
        check_writable(folder / f"{name}.json")


def _export(result: BenchResult, folder: Path) -> None:
    from edgesam_deploy.files import write_json
    from edgesam_deploy.measure.engine_latency import export_times

    for name, engine in (result.engines or {}).items():
        write_json(folder / f"{name}.json", export_times(engine))
        say(f"wrote {folder / f'{name}.json'}")


def _show(result: BenchResult) -> None:
    parts = result.parts
    rows = [(name, *(f"{v:.2f}" for v in astuple(t)[:7])) for name, t in parts.parts.items()]
    print_table(
        f"{parts.bundle} ({parts.precision}), {parts.provider}, {parts.threads} threads, {parts.machine}",
        ("part (ms)", "min", "mean", "median", "p90", "p95", "p99", "per second"),
        rows,
    )
    waits = [
        (name.replace("_", " "), *(f"{v:.2f}" for v in (s.median_ms, s.p90_ms, s.p99_ms)))
        for name, s in result.pipeline.items()
    ]
    print_table("what an application waits for", ("(ms)", "median", "p90", "p99"), waits)
    click.echo(
        f"{parts.runs} runs after {parts.warmup} for warm-up, image {parts.image_hw[1]}x{parts.image_hw[0]}, "
        f"{result.camera_fps:.1f} frames per second in a camera loop, peak memory {parts.peak_rss_mb:.0f} MB"
    )
    _show_engines(result)
    if result.power is not None:
        energy = result.power.energy_per_inference_mj
        click.echo(
            f"power ({result.power.scope}): {result.power.total_mean_w:.2f} W"
            + (f", {energy:.0f} mJ per prediction" if energy is not None else "")
        )
    if result.clocks.power_mode is not None:
        click.echo(f"power mode {result.clocks.power_mode}, clocks locked: {result.clocks.locked}")
    if parts.parts["total"].cv > NOISY_CV:
        say(f"noisy: times vary by {parts.parts['total'].cv:.0%}; stop other work, or read ratios only")


def _show_engines(result: BenchResult) -> None:
    for name, engine in (result.engines or {}).items():
        phases = {"H2D": engine.h2d, "GPU compute": engine.gpu_compute, "D2H": engine.d2h, "latency": engine.latency}
        rows = [
            (phase, *(f"{v:.3f}" for v in (s.mean_ms, s.median_ms, s.p90_ms, s.p95_ms, s.p99_ms)))
            for phase, s in {**phases, "enqueue": engine.enqueue}.items()
            if s is not None
        ]
        flags = engine.options.trtexec_flags(10)
        title = f"{name} engine, {engine.queries} queries, one stream; as trtexec --loadEngine={name}.engine {flags}"
        print_table(title, ("(ms)", "mean", "median", "p90", "p95", "p99"), rows)
        for warning in engine.warnings:
            say(f"{name}: {warning}")
