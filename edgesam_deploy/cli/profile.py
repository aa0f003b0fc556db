"""sam-export profile: what models and graphs cost, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesam_deploy.cli.terminal import json_option, plain, print_json, print_table, say, threads_option

if TYPE_CHECKING:
    from edgesam_deploy.measure.profile import GraphProfile, ModelProfile, Table
    from edgesam_deploy.stages.profile import ProfileOptions


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Positive integers between commas; none where the option is not given."""
    if value is None:
        return ()
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(f"expected positive integers between commas, such as 512,1024, got '{value}'")
    return found


@click.command("profile")
@click.argument("models", nargs=-1)
@click.option(
    "--image-size", metavar="N,N,…", callback=numbers, help="Encoder inputs, pixels a side. Default: the recipe's."
)
@click.option(
    "--batch",
    metavar="N,N,…",
    default="1",
    show_default=True,
    callback=numbers,
    help="Images, and prompts of the decoder.",
)
@click.option(
    "--latency/--no-latency", default=True, help="Time it and weigh its process, or only count. [default: do]"
)
@click.option("--check", is_flag=True, help="Count again with FlopCounterMode, torch.profiler and calflops.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights. Default: random ones, which cost the same."
)
@click.option("--runs", default=10, show_default=True, type=click.IntRange(min=1), help="Timed runs.")
@click.option("--top", default=10, show_default=True, type=click.IntRange(min=0), help="How many layers to name.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables to this file, too.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw all models: parameters, MACs, latency (SVG).")
@threads_option
@json_option
def command(
    models: tuple[str, ...],
    image_size: tuple[int, ...],
    batch: tuple[int, ...],
    latency: bool,
    check: bool,
    checkpoint: Path | None,
    runs: int,
    top: int,
    markdown: Path | None,
    chart: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Count parameters, multiply-adds (MACs) and activation memory of MODELS, and time them with PyTorch.

    MODELS are recipes [default: reference], ONNX files or bundles. Recipes: encoder, prompt encoder, mask decoder and
    the encoder's stages. No weights are needed; with --no-latency they take no memory either.
    """
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.files import check_writable

    graphs = [name for name in models if name.endswith(".onnx") or Path(name).is_dir()]
    recipes = [name for name in models or ("reference",) if name not in graphs]
    _check_request(graphs, recipes, image_size, batch, checkpoint)
    for file in (markdown, chart):
        if file is not None:
            check_writable(file)
    try:
        from edgesam_deploy.stages.profile import ProfileOptions

        how = ProfileOptions(image_size, batch, latency, check, threads, runs, top=top, checkpoint=checkpoint)
        counted = _profile_recipes(recipes, how)
        drawn = _profile_graphs(graphs, top)
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    if chart is not None:
        _draw(counted, chart)
    _answer(counted, drawn, markdown, as_json)


def _check_request(
    graphs: list[str],
    recipes: list[str],
    image_size: tuple[int, ...],
    batch: tuple[int, ...],
    checkpoint: Path | None,
) -> None:
    if graphs and (image_size or batch != (1,)):
        raise click.UsageError(f"--image-size and --batch are for recipes: the sizes of {graphs[0]} are fixed")
    if checkpoint is not None and len(recipes) != 1:
        raise click.UsageError(f"--checkpoint is of one recipe, got {len(recipes)}")


def _profile_recipes(names: Sequence[str], how: ProfileOptions) -> list[ModelProfile]:
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.stages.profile import profile

    # All of them first: a misspelt name must not show after minutes.
    recipes = [load_recipe(name) for name in names]
    return [found for recipe in recipes for found in profile(recipe, how, say)]


def _profile_graphs(paths: Sequence[str], top: int) -> list[GraphProfile]:
    if not paths:
        return []
    from edgesam_deploy.stages.profile_graph import profile_graphs

    return [found for path in paths for found in profile_graphs(Path(path), top)]


def _draw(models: Sequence[ModelProfile], file: Path) -> None:
    from edgesam_deploy.files import write_bytes
    from edgesam_deploy.measure.profile_chart import Bubble, chart

    several = len({(m.image_size, m.batch) for m in models}) > 1
    bubbles = [
        Bubble(
            f"{m.recipe} {m.image_size} px × {m.batch}" if several else m.recipe,
            m.family,
            m.parameters / 1e6,
            m.macs / 1e9,
            m.latency_ms,
        )
        for m in models
    ]
    run = next((m.run for m in models if m.run is not None), None)
    label = f"latency, {run.threads} threads, {run.machine}" if run is not None else ""
    write_bytes(file, chart(bubbles, label).encode())
    say(f"chart: {file}")


def _answer(
    models: Sequence[ModelProfile], graphs: Sequence[GraphProfile], markdown: Path | None, as_json: bool
) -> None:
    from edgesam_deploy.files import write_bytes
    from edgesam_deploy.measure.profile import CONVENTION
    from edgesam_deploy.measure.profile import markdown as as_markdown

    tables = _tables(models, graphs)
    if markdown is not None:
        write_bytes(markdown, as_markdown(tables).encode())
        say(f"tables: {markdown}")
    if as_json:
        print_json({"convention": CONVENTION, "models": [_flat(m) for m in models], "graphs": plain(list(graphs))})
        return
    for title, columns, rows in tables:
        print_table(title, columns, rows)
        click.echo("")
    click.echo(CONVENTION)


def _tables(models: Sequence[ModelProfile], graphs: Sequence[GraphProfile]) -> list[Table]:
    """One row for each model; its parts and layers where it is the only one."""
    from edgesam_deploy.measure.profile import checks_table, graphs_table, models_table, parts_table, top_table

    found = [models_table(models)] if models else []
    if len(models) == 1:
        found += [parts_table(models[0])]
        found += [top_table(models[0].recipe, models[0].top, models[0].macs)] if models[0].top else []
    found += [checks_table(models)] if any(model.checks for model in models) else []
    found += [graphs_table(graphs)] if graphs else []
    if len(models) + len(graphs) <= 2:
        found += [top_table(graph.file, graph.top, graph.total_macs) for graph in graphs if graph.top]
    return found


def _flat(model: ModelProfile) -> dict[str, object]:
    """With its sums, which are properties."""
    return {**plain(model), "parameters": model.parameters, "macs": model.macs, "latency_ms": model.latency_ms}
