"""sam-export eval: a model's masks against true ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import (
    Weights,
    backend_option,
    checkpoint_options,
    json_option,
    plain,
    print_json,
    print_table,
    say,
    threads_option,
    track,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgesam_deploy.measure.datasets import Dataset, DatasetOptions
    from edgesam_deploy.measure.evaluate import EvalOptions, ImageResult
    from edgesam_deploy.measure.quality import Quality
    from edgesam_deploy.stages.evaluate import Model


def words(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


@click.command("eval")
@click.argument("model", metavar="[BUNDLE|RECIPE]", required=False)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    required=True,
    metavar="LAYOUT:PATH",
    help="coco:FILE, lvis:FILE, sa1b:DIR, labels:DIR, masks:DIR, davis:DIR or cityscapes:DIR. Can be given again.",
)
@click.option("--images", type=click.Path(path_type=Path), help="Folder of the images, where they lie elsewhere.")
@click.option(
    "--prompts", default="box,click", show_default=True, callback=words, help="Of box, click, clicks (1, 3 and 5)."
)
@click.option("--baselines", is_flag=True, help="Also the true box filled, and the ellipse in it.")
@click.option("--against", metavar="BUNDLE|RECIPE", help="A teacher: how far MODEL gives its masks, kept apart.")
@click.option("--against-checkpoint", type=click.Path(path_type=Path), help="The teacher's weights, if a recipe.")
@checkpoint_options
@click.option("--limit", type=click.IntRange(min=1), help="Images of each dataset, from the first on. Default: all.")
@click.option("--crowds", is_flag=True, help="Take crowd annotations, too.")
@click.option("--tight-boxes", is_flag=True, help="Prompt with boxes tight around the masks, not the annotations' own.")
@click.option("--skip-empty", is_flag=True, help="Leave out targets without a pixel, which are an error otherwise.")
@click.option(
    "--min-share",
    default=0.005,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="labels: the smallest target, as a share of the image.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for all masks' records and a picture.")
@click.option("--min-iou", type=click.FloatRange(0, 1), help="Exit with 3 if the first mIoU is below.")
@backend_option
@threads_option
@json_option
def command(
    model: str | None,
    datasets: tuple[str, ...],
    images: Path | None,
    prompts: tuple[str, ...],
    baselines: bool,
    against: str | None,
    against_checkpoint: Path | None,
    weights: Weights,
    limit: int | None,
    crowds: bool,
    tight_boxes: bool,
    skip_empty: bool,
    min_share: float,
    workers: int,
    output: Path | None,
    min_iou: float | None,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Mask quality of a bundle, or of a recipe in PyTorch FP32, on images with true masks [default: the shipped INT8
    reference].

    mIoU at the images' own size by size class and source, with a 95 % interval, DAVIS's boundary F, and how far the
    predicted IoU is right. Prompts are made from the true masks: the box; one click where the mask is deepest; or up to
    five clicks, each where the answer is most wrong. --min-iou looks at the first dataset and prompt: the single mask
    for a box, the one ranked first for a click, that after 5 clicks.
    """
    from edgesam_deploy.measure.datasets import DatasetOptions
    from edgesam_deploy.measure.evaluate import EvalOptions

    if images is not None and len(datasets) > 1:
        raise click.UsageError("--images is of one dataset: evaluate the others by a command of their own")
    if against_checkpoint is not None and against is None:
        raise click.UsageError("--against-checkpoint goes with --against RECIPE")
    if against is not None and set(prompts) <= {"clicks"}:
        raise click.UsageError("--against compares answers to box and click: add one of them to --prompts")
    if min_iou is not None and min_iou != min_iou:
        raise click.BadParameter("nan is not in the range 0<=x<=1.", param_hint="'--min-iou'")
    taken = DatasetOptions(images, crowds, min_share, tight_boxes, skip_empty, limit)
    asked = EvalOptions(prompts, baselines, workers, threads)
    evaluated = _model(model, weights, backend)
    teacher = None if against is None else _model(against, _of_teacher(weights, against_checkpoint), None)
    _run(evaluated, teacher, datasets, taken, asked, output, min_iou, as_json)


def _run(
    model: Model,
    teacher: Model | None,
    names: Sequence[str],
    taken: DatasetOptions,
    asked: EvalOptions,
    output: Path | None,
    min_iou: float | None,
    as_json: bool,
) -> None:
    from dataclasses import replace

    from edgesam_deploy.files import check_writable
    from edgesam_deploy.measure.datasets import open_dataset
    from edgesam_deploy.measure.evaluate import evaluate
    from edgesam_deploy.measure.quality import summarize
    from edgesam_deploy.measure.quality_files import RESULT, Worst, check_folder, write_files

    if output is not None:
        check_folder(output)
        check_writable(output.resolve().with_name(f"{output.resolve().name}.tmp"))
    _check_model(model, teacher, asked)
    opened = [open_dataset(name, taken) for name in names]
    _check_extras(opened)
    count = sum(len(dataset.images) for dataset in opened)
    results, worst = [], Worst()
    for result in evaluate(
        model.open,
        opened,
        asked,
        None if teacher is None else teacher.open,
        lambda items: track("eval", items, count),
    ):
        if result.dataset == opened[0].name:
            worst.add(result)
        # Its masks are large, and only those of the worst are drawn.
        results.append(replace(result, worst=None))
    _check_targets(opened, results)
    by_group = {dataset.name: dataset.by_group for dataset in opened}
    qualities = summarize((r for result in results for r in result.records), by_group.__getitem__)
    answer = _answer(model, teacher, opened, taken, results, qualities)
    if output is not None:
        write_files(output, answer, results, worst.cases)
        say(f"wrote {output / RESULT} and every mask's record beside it")
    if as_json:
        print_json(answer)
    else:
        _show(model, qualities)
    _check_threshold(qualities, opened[0].name, asked, min_iou)


def _model(name: str | None, weights: Weights, backend: str | None) -> Model:
    """A bundle's folder, or a recipe by name or file, with the weights that it is to have."""
    from edgesam_deploy.bundle import shipped_bundle
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.stages.evaluate import BundleModel, RecipeModel, check_weights

    path = shipped_bundle() if name is None else Path(name)
    if name is None or path.is_dir() or (os.sep in name and path.suffix != ".toml"):
        if weights.files:
            raise click.UsageError(f"weights are for a recipe: the bundle {path} has its own")
        return BundleModel(path, backend)
    if backend is not None:
        raise click.UsageError(f"--backend is for a bundle: the recipe {name} runs in PyTorch")
    recipe = load_recipe(name)
    try:
        found = RecipeModel(name, weights.find(recipe))
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    check_weights(found)
    return found


def _of_teacher(weights: Weights, checkpoint: Path | None) -> Weights:
    from dataclasses import replace

    return replace(weights, files=() if checkpoint is None else (checkpoint,))


def _check_model(model: Model, teacher: Model | None, asked: EvalOptions) -> None:
    from edgesam_deploy.measure.protocol import check_model

    check_model(model.geometry, asked.prompts, "this model")
    if teacher is not None:
        check_model(teacher.geometry, [p for p in asked.prompts if p != "clicks"], "the teacher")


def _check_extras(datasets: Sequence[Dataset]) -> None:
    """Raise MissingExtraError now, rather than in a worker process."""
    from importlib.util import find_spec

    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.stages.evaluate import needed

    for name, wanted in needed(datasets).items():
        if wanted and find_spec(name) is None:
            raise MissingExtraError(name, "eval")


def _check_targets(datasets: Sequence[Dataset], results: Sequence[ImageResult]) -> None:
    """Raise InputError for a dataset of which nothing was compared: a summary would leave it out unsaid."""
    from edgesam_deploy.errors import InputError

    found = {result.dataset for result in results if result.records}
    for dataset in datasets:
        if dataset.name not in found:
            raise InputError(
                f"{dataset.name} has no target left (images: {len(dataset.images)}): expected at least one true mask "
                "to compare with; take more images (--limit), smaller targets (--min-share) or crowds (--crowds), or "
                "leave this dataset out"
            )


def _answer(
    model: Model,
    teacher: Model | None,
    datasets: Sequence[Dataset],
    taken: DatasetOptions,
    results: Sequence[ImageResult],
    qualities: Sequence[Quality],
) -> dict[str, Any]:
    from edgesam_deploy.measure.evaluate import TRUTH
    from edgesam_deploy.stages.evaluate import dataset_origin, origin

    measured_on = [
        dataset_origin(d, (r for result in results if result.dataset == d.name for r in result.records), taken)
        for d in datasets
    ]
    return {
        "origin": {**origin(model, teacher), "datasets": measured_on},
        "truth": [plain(q) for q in qualities if q.against == TRUTH],
        "agreement": [plain(q) for q in qualities if q.against != TRUTH],
    }


def _show(model: Model, qualities: Sequence[Quality]) -> None:
    from edgesam_deploy.measure.evaluate import TRUTH

    ran = model.origin()
    columns = [*("dataset", "prompt", "answer", "masks", "mIoU", "95 % interval"), *("small", "medium", "large")]
    columns += ["from 0.5", "from 0.75", "from 0.9", "boundary F", "predicted IoU", "off by"]
    titles = {True: "mask quality against true masks", False: "agreement with the teacher (not quality)"}
    for truth, title in titles.items():
        rows = [_row(q) for q in qualities if (q.against == TRUTH) == truth]
        if rows:
            print_table(f"{title}: {ran['recipe']['name']} {ran['precision']}, {ran['runs_on']}", columns, rows)
    for q in qualities:
        if len(q.by_source) > 1:
            shares = ", ".join(f"{name} {share.miou:.4f} ({share.count})" for name, share in q.by_source.items())
            click.echo(f"{q.dataset}, {q.prompt}, {q.answer}, by source: {shares}")


def _row(q: Quality) -> tuple[str, ...]:
    sizes = (q.by_size[name].miou if name in q.by_size else None for name in ("small", "medium", "large"))
    said = ("–", "–") if q.calibration is None else (f"{q.calibration.predicted:.3f}", f"{q.calibration.error:.3f}")
    return (
        q.dataset,
        q.prompt,
        q.answer,
        str(q.count),
        f"{q.miou:.4f}",
        f"{q.interval[0]:.3f}–{q.interval[1]:.3f}",
        *("–" if miou is None else f"{miou:.3f}" for miou in sizes),
        *(f"{share:.3f}" for share in q.above.values()),
        f"{q.boundary_f:.3f}",
        *said,
    )


def _check_threshold(qualities: Sequence[Quality], dataset: str, asked: EvalOptions, min_iou: float | None) -> None:
    from edgesam_deploy.errors import ThresholdError
    from edgesam_deploy.measure.evaluate import TRUTH
    from edgesam_deploy.measure.protocol import headline

    prompt = asked.prompts[0]
    first = next(
        q for q in qualities if (q.dataset, q.against, q.prompt, q.answer) == (dataset, TRUTH, prompt, headline(prompt))
    )
    if min_iou is not None and first.miou < min_iou:
        raise ThresholdError(f"mIoU {first.miou:.4f} of {dataset}, {prompt}, {first.answer}, is below {min_iou:g}")
