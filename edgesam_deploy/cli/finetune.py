"""sam-export finetune: a network learns from images with true masks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import json_option, print_json, print_table
from edgesam_deploy.cli.training import NAMES, records, share, training_options, watching

if TYPE_CHECKING:
    from edgesam_deploy.distill.finetune import FinetuneResult, TruthScore
    from edgesam_deploy.measure.datasets import Dataset


@click.command("finetune")
@click.argument("student")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    required=True,
    metavar="LAYOUT:PATH[@IMAGES]",
    help="As in eval, with the folder of its images where that is not the layout's own. Given twice, seen twice.",
)
@click.option("--learn", type=click.Choice(["all", "encoder", "decoder"]), default="all", show_default=True)
@click.option("--image-size", type=click.IntRange(0), default=0, help="Of the views. Default: the recipe's.")
@click.option("--fit", type=share, default=0.5, show_default=True, help="Share of views of the whole image.")
@click.option("--box", type=share, default=0.65, show_default=True, help="Share of boxes, the others are clicks.")
@click.option(
    "--exact",
    type=share,
    default=0.5,
    show_default=True,
    help="Share of boxes that fit their masks exactly; the others are a little off, as a detector's are.",
)
@click.option(
    "--small",
    type=share,
    default=0.0,
    show_default=True,
    help="Boxes ask for a mask less often by this power of its area. 0: small and large ones equally often.",
)
@click.option("--paste", type=share, default=0.2, show_default=True, help="Share with objects of another image.")
@click.option("--flat", type=share, default=0.2, show_default=True, help="Share with every region in one colour.")
@click.option("--shapes", type=share, default=0.2, show_default=True, help="Share of ellipses, for the decoder alone.")
@click.option(
    "--windows",
    type=share,
    default=0.0,
    show_default=True,
    help="Share whose boxes are decoded in a part of the embedding around them: more prompts in the same time.",
)
@click.option(
    "--half-clicks",
    type=share,
    default=0.0,
    show_default=True,
    help="Share of updates with clicks alone on views of half the size, which cost a quarter.",
)
@click.option(
    "--axes",
    type=click.FloatRange(0),
    default=0.0,
    help="Encode points along x and y apart, by frequencies up to this, instead of as the weights do.",
)
@training_options
@json_option
def command(
    student: str, datasets: tuple[str, ...], output: Path, threads: int | None, as_json: bool, **given: Any
) -> None:
    """Teach STUDENT, a recipe with SAM's mask decoder, from images with true masks.

    Start it from a distilled student (--init); without, it learns from random weights, which takes many more images.
    Views are random crops and whole images, with boxes, clicks and both as prompts.

    A run that was stopped goes on when the same command is given again. For several GPUs:
    torchrun --nproc-per-node N -m edgesam_deploy finetune ...
    """
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.recipe import load_recipe

    try:
        import torch

        from edgesam_deploy.distill.distributed import join
        from edgesam_deploy.distill.finetune import FinetuneJob, finetune
        from edgesam_deploy.distill.first_weights import FirstWeights
        from edgesam_deploy.distill.labelled import Labelled
        from edgesam_deploy.distill.options import FinetuneOptions
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    what = ("learn", "image_size", "fit", "box", "exact", "small")
    how = ("paste", "flat", "shapes", "windows", "half_clicks", "axes")
    options = FinetuneOptions(**{name: given[name] for name in (*NAMES, *what, *how)})
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        world = stack.enter_context(join(given["device"]))
        job = FinetuneJob(
            recipe=load_recipe(student),
            images=Labelled([_open(text) for text in datasets]),
            options=options,
            records=records(output, given),
            first=FirstWeights(given["init"], given["backbone"]),
        )
        result = finetune(job, world, stack.enter_context(watching("finetune", world.first, _describe)))
    if world.first:
        _print(result, student, as_json)


def _open(text: str) -> Dataset:
    from edgesam_deploy.errors import InputError
    from edgesam_deploy.measure.datasets import DatasetOptions, open_dataset

    where, mark, images = text.rpartition("@")
    if not mark or Path(text.partition(":")[2]).exists():  # a path may have an @ of its own
        where, images = text, ""
    # Small regions of label maps are what small objects are learnt from.
    how = DatasetOptions(images=Path(images) if images else None, min_share=0.0, skip_empty=True)
    try:
        return open_dataset(where, how)
    except InputError as error:  # eval has one folder of images for all, and an option for it
        raise InputError(str(error).replace("--images", "LAYOUT:PATH@IMAGES")) from error


def _describe(found: TruthScore) -> str:
    return f"{found.images} held-out images: clicks {found.click_iou:.4f} (best of three), boxes {found.box_iou:.4f}"


def _print(result: FinetuneResult, student: str, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    found = result.held_out
    print_table(
        f"{student} on {found.images} held-out images, update {result.step} of {result.total}",
        ("mask IoU, clicks (best of three)", "mask IoU, boxes"),
        [(f"{found.click_iou:.4f}", f"{found.box_iou:.4f}")],
    )
    if not result.finished:
        click.echo("stopped at the time limit: the same command goes on")
    click.echo(f"checkpoint: {result.checkpoint} (sha256 {result.sha256[:12]}…)")
    click.echo(f"build it: sam-export build {student} --checkpoint {result.checkpoint}")
