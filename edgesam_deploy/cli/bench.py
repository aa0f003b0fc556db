"""sam-export bench: latency of a bundle, part by part."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import click

from edgesam_deploy.cli.terminal import json_option, print_json, print_table, say, threads_option, track

NOISY_CV = 0.1


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--image", type=click.Path(path_type=Path), help="Default: a shipped photograph.")
@click.option("--runs", default=50, show_default=True, type=click.IntRange(min=1), help="Timed runs.")
@click.option("--warmup", default=10, show_default=True, type=click.IntRange(min=0), help="Runs before timing.")
@threads_option
@json_option
def command(
    bundle: Path | None, image: Path | None, runs: int, warmup: int, threads: int | None, as_json: bool
) -> None:
    """Time BUNDLE [default: the shipped INT8 reference] on one image and one click."""
    from edgesam_deploy.bundle import load_bundle, shipped_bundle
    from edgesam_deploy.images import read_image
    from edgesam_deploy.measure.latency import measure_latency
    from edgesam_deploy.recipe import PACKAGE

    loaded = load_bundle(bundle or shipped_bundle())
    pixels = read_image(image or PACKAGE / "assets" / "photos" / "verify" / "duck.jpg")
    result = measure_latency(loaded, pixels, runs, warmup, threads, lambda items: track("bench", items, runs + warmup))
    if as_json:
        print_json(result)
        return
    rows = [(name, *(f"{v:.2f}" for v in astuple(t)[:7])) for name, t in result.parts.items()]
    print_table(
        f"{loaded.recipe} {result.precision}, {result.provider}, {result.threads} threads, {result.machine}",
        ("part (ms)", "min", "mean", "median", "p90", "p95", "p99", "per second"),
        rows,
    )
    click.echo(
        f"{result.runs} runs after {result.warmup} for warm-up, image {result.image_hw[1]}x{result.image_hw[0]}, "
        f"peak memory {result.peak_rss_mb:.0f} MB"
    )
    if result.parts["total"].cv > NOISY_CV:
        say(f"noisy: times vary by {result.parts['total'].cv:.0%}; stop other work, or read ratios only")
