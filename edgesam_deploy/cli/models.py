"""sam-export models: the models there are, by family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import json_option, plain, print_json, print_table

if TYPE_CHECKING:
    from edgesam_deploy.recipe import Recipe

# Variant of the contract (``contract.Geometry.variant``) -> what the exported decoder takes.
VARIANTS = {
    "sam": "points, boxes and a mask",
    "points": "points and boxes",
    "high-res": "points, boxes and a mask, with two finer feature maps of the encoder",
}
COLUMNS = ("recipe", "family", "M params", "GMAC", "pixels", "contract", "MB", "licence", "accuracy, as published")


@click.command("models")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the models by family; with NAME, a recipe or the path of one, every figure of it with its source."""
    from edgesam_deploy.recipe import available_recipes, load_recipe

    if name is not None:
        recipe = load_recipe(name)
        if as_json:
            print_json(describe(recipe))
        else:
            _print_model(recipe)
        return
    recipes = [load_recipe(known) for known in available_recipes()]
    if as_json:
        print_json([describe(recipe) for recipe in recipes])
        return
    _print_models(recipes)


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe with what follows from it: contract (its variant), counts, download_bytes (None where unknown)."""
    from edgesam_deploy.counts import counts_of

    facts: dict[str, Any] = plain(recipe)
    return facts | {
        "contract": recipe.geometry.variant,
        "counts": plain(counts_of(recipe)),
        "download_bytes": _download_bytes(recipe),
    }


def _print_models(recipes: list[Recipe]) -> None:
    """One line each; families by their smallest model, those yet to be trained last. Sources are numbered below."""
    sources: dict[str, int] = {}
    rows = []
    for recipe in _by_family(recipes):
        accuracy = "–"
        if recipe.published.accuracy:
            first = recipe.published.accuracy[0]
            number = sources.setdefault(first.source, len(sources) + 1)
            accuracy = f"{first.value:g} {first.metric} [{number}]"
        rows.append(
            (
                recipe.name,
                recipe.family,
                *_counted(recipe),
                str(recipe.geometry.image_size),
                recipe.geometry.variant,
                _megabytes(recipe),
                _licence(recipe),
                accuracy,
            )
        )
    print_table("models (everything of one: sam-export models NAME)", COLUMNS, rows)
    click.echo("M params, GMAC: counted from the network, an image and one prompt")
    click.echo("MB: the download; with ~, which nobody states, 4 bytes a parameter")
    for variant, takes in VARIANTS.items():
        click.echo(f"contract {variant}: the decoder takes {takes}")
    for source, number in sources.items():
        click.echo(f"[{number}] {source}")


def _by_family(recipes: Iterable[Recipe]) -> list[Recipe]:
    from edgesam_deploy.counts import counts_of

    def size(recipe: Recipe) -> float:
        counts = counts_of(recipe)
        return counts.params_m if counts else 0.0

    smallest: dict[str, tuple[bool, float]] = {}
    for recipe in recipes:
        untrained = not (recipe.checkpoint.file or recipe.checkpoint.files)
        rank = (untrained, size(recipe))
        smallest[recipe.family] = min(rank, smallest.get(recipe.family, rank))
    return sorted(recipes, key=lambda recipe: (smallest[recipe.family], recipe.family, size(recipe), recipe.name))


def _counted(recipe: Recipe) -> tuple[str, str]:
    from edgesam_deploy.counts import counts_of

    counts = counts_of(recipe)
    return ("–", "–") if counts is None else (f"{counts.params_m:.1f}", f"{counts.macs_g:.1f}")


def _megabytes(recipe: Recipe) -> str:
    from edgesam_deploy.counts import counts_of

    if recipe.checkpoint.file is not None:
        return "shipped"
    if not recipe.checkpoint.files:
        return "untrained"
    size, counts = _download_bytes(recipe), counts_of(recipe)
    if size is not None:
        return f"{size / 1e6:.0f}"
    return "?" if counts is None else f"~{4 * counts.params_m:.0f}"


def _download_bytes(recipe: Recipe) -> int | None:
    sizes = [file.size_bytes for file in recipe.checkpoint.files]
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None


def _licence(recipe: Recipe) -> str:
    """Every licence that the weights come under; marked where one of them forbids commercial use."""
    checkpoint = recipe.checkpoint
    licences = dict.fromkeys(file.licence or "" for file in checkpoint.files) or {checkpoint.licence or "–": None}
    forbidden = any(file.commercial is False for file in checkpoint.files) or not checkpoint.commercial
    return ", ".join(licences) + (" (non-commercial)" if forbidden else "")


def _print_model(recipe: Recipe) -> None:
    geometry = recipe.geometry
    click.echo(f"{recipe.name}: {recipe.summary}")
    click.echo(f"family {recipe.family}, architecture {recipe.architecture}, opset {recipe.opset}")
    click.echo(
        f"contract {geometry.variant}: the decoder takes {VARIANTS[geometry.variant]}; image {geometry.image_size} "
        f"({geometry.resize}), prompts in {geometry.prompt_size}, embedding {geometry.embedding_channels} × "
        f"{geometry.embedding_size}², {geometry.num_masks} masks, single answer: {geometry.single_mask}"
    )
    print_table("figures", ("figure", "value", "source"), _figures(recipe))
    for note in recipe.published.notes:
        click.echo(f"note: {note}")
    _print_weights(recipe)
    print_table("precision", ("rule", "value"), _rules(recipe))


def _figures(recipe: Recipe) -> list[tuple[str, str, str]]:
    from edgesam_deploy.counts import counts_of

    rows, published = [], recipe.published
    if counts := counts_of(recipe):
        ours = "counted from this network"
        rows = [
            ("encoder", f"{counts.encoder_params / 1e6:.2f} M params, {counts.encoder_macs / 1e9:.2f} GMAC", ours),
            ("decoder", f"{counts.decoder_params / 1e6:.2f} M params, {counts.decoder_macs / 1e9:.2f} GMAC", ours),
        ]
    for figure, unit in (("params_m", "M params"), ("macs_g", "GMAC")):
        if (value := getattr(published, figure)) is not None:
            rows.append(("as published", f"{value:g} {unit}", published.sources[figure]))
    rows += [(quote.metric, f"{quote.value:g}", quote.source) for quote in published.accuracy]
    return rows + [(quote.metric, f"{quote.value:g} ms", quote.source) for quote in published.latency_ms]


def _print_weights(recipe: Recipe) -> None:
    checkpoint = recipe.checkpoint
    if checkpoint.file is not None:
        click.echo(f"weights: shipped, {checkpoint.file}, sha256 {checkpoint.sha256}, licence {_licence(recipe)}")
    elif not checkpoint.files:
        click.echo("weights: none published; give yours with --checkpoint FILE")
    for file in checkpoint.files:
        rows = [
            ("url", file.url),
            ("size", "not known" if file.size_bytes is None else f"{file.size_bytes} bytes"),
            ("sha256", file.sha256 or "not known: downloading it takes --accept-unverified"),
            ("sha256 stated by", file.sha256_source or "–"),
            ("licence", f"{file.licence}{'' if file.commercial else ' (non-commercial)'}"),
            ("licence text", file.licence_url or "–"),
            *([("gives", ", ".join(file.takes))] if file.takes else []),
        ]
        print_table("weights", ("entry", "value"), rows)


def _rules(recipe: Recipe) -> list[tuple[str, str]]:
    """What each precision must reach and may touch; INT8 entries that the recipe leaves open are the target's."""
    rows = [(f"{name}: mask IoU at least", f"{value:g}") for name, value in recipe.min_mask_iou.items()]
    rows += [("fp16: kept in FP32", pattern) for pattern in recipe.fp16.keep]
    for entry, value in recipe.int8_entries.items():
        values = value if isinstance(value, list | tuple) else [value]
        rows += [(f"int8: {'kept out' if entry == 'keep' else entry}", str(v)) for v in values]
    return rows
