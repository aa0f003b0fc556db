"""sam-export distill: a small encoder learns a large one's embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgesam_deploy.cli.terminal import (
    Weights,
    checkpoint_options,
    json_option,
    print_json,
    print_table,
    say,
    track,
)
from edgesam_deploy.cli.training import NAMES, folder, positive, records, share, training_options, watching

if TYPE_CHECKING:
    from edgesam_deploy.distill.agreement import Agreement
    from edgesam_deploy.distill.corpus import Corpus
    from edgesam_deploy.distill.distill import DistillResult
    from edgesam_deploy.distill.distributed import World
    from edgesam_deploy.distill.teacher import Teacher
    from edgesam_deploy.recipe import Recipe

# In the run's folder: the images that --skip-damaged leaves out, and why.
DAMAGED = "damaged.json"
# Of DistillOptions, what TrainOptions has not.
OWN = ("loss", "colours", "views", "rounds", "embedding_weight", "decoder_learns")


@click.command("distill")
@click.argument("student")
@click.option("--teacher", required=True, help="A recipe (PyTorch), or a bundle whose encoder answers.")
@checkpoint_options
@click.option("--images", type=folder, multiple=True, required=True, help="Folders and .tar files of images.")
@click.option("--skip-damaged", is_flag=True, help="Read every image once before the run; leave out what fails.")
@click.option("--cache", type=folder, help="Folder of the teacher's embeddings. Default: in -o.")
@click.option("--on-the-fly", is_flag=True, help="No cache: the teacher answers again in every epoch.")
@click.option("--loss", type=click.Choice(["huber", "l1", "mse", "cosine"]), default="huber", show_default=True)
@click.option("--colours", type=share, default=0.0, show_default=True, help="Share of recoloured.")
@click.option("--views", type=share, default=0.0, show_default=True, help="Share of random crops.")
@click.option("--rounds", type=click.IntRange(0, 8), default=0, show_default=True, help="Of prompts in the loop.")
@click.option("--embedding-weight", type=click.FloatRange(0), default=1.0, show_default=True, help="With --rounds.")
@click.option("--decoder-learns", is_flag=True, help="With --rounds: the mask decoder too.")
@click.option("--teacher-batch", type=positive, default=4, show_default=True)
@click.option("--shard-size", type=positive, default=64, show_default=True, help="Images per shard of the cache.")
@training_options
@json_option
def command(
    student: str,
    teacher: str,
    weights: Weights,
    images: tuple[Path, ...],
    output: Path,
    cache: Path | None,
    on_the_fly: bool,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Teach STUDENT, a recipe, the image embeddings of a teacher, whose mask decoder it keeps.

    Needs nothing but images. With --rounds, masks are compared too: for random clicks and boxes, and then with a click
    more in each round, where student and teacher disagree; start it from an earlier run's student.pt (--init).

    A run that was stopped goes on when the same command is given again. For several GPUs:
    torchrun --nproc-per-node N -m edgesam_deploy distill ...
    """
    if on_the_fly and cache is not None:
        raise click.UsageError("--on-the-fly keeps no cache: give one of the two")
    from edgesam_deploy.errors import MissingExtraError
    from edgesam_deploy.recipe import load_recipe

    try:
        import torch

        from edgesam_deploy.distill.corpus import Corpus
        from edgesam_deploy.distill.distill import Job, distill
        from edgesam_deploy.distill.distributed import join
        from edgesam_deploy.distill.first_weights import FirstWeights
        from edgesam_deploy.distill.options import DistillOptions
        from edgesam_deploy.distill.teacher import check_pair
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    options = DistillOptions(**{name: given[name] for name in (*NAMES, *OWN)})
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        world = stack.enter_context(join(given["device"]))
        who, model, recipe = stack.enter_context(_teacher(teacher, weights, world.device, threads))
        learner, corpus = load_recipe(student), Corpus(images)
        check_pair(learner, who)  # before every image is read
        corpus = _readable(corpus, output, threads, world) if given["skip_damaged"] else corpus
        job = Job(
            student=learner,
            teacher=who,
            model=model,
            recipe=recipe,
            corpus=corpus,
            options=options,
            records=records(output, given),
            cache=None if on_the_fly else cache or output / "cache",
            shard_size=given["shard_size"],
            teacher_batch=given["teacher_batch"],
            first=FirstWeights(given["init"], given["backbone"]),
        )
        result = distill(job, world, stack.enter_context(watching("distill", world.first, _describe)))
    if world.first:
        _print(result, student, as_json)


def _readable(corpus: Corpus, output: Path, threads: int | None, world: World) -> Corpus:
    """The images that can be read. The first process finds the others; all leave them out."""
    from edgesam_deploy.distill.corpus import find_damaged

    if not world.first:
        world.wait()
    record = output / DAMAGED
    damaged = find_damaged(corpus, record, threads, lambda items, total: iter(track("reading", items, total)))
    if world.first:
        world.wait()
        say(f"{len(damaged)} of {len(corpus)} images cannot be read and are left out: {record} names them")
    return corpus.without(damaged)


@contextmanager
def _teacher(name: str, weights: Weights, device: Any, threads: int | None) -> Iterator[tuple[Teacher, Any, Recipe]]:
    """Who answers, its network (whose decoder the student gets) and its recipe."""
    from edgesam_deploy.bundle import MANIFEST, load_bundle
    from edgesam_deploy.distill.teacher import BundleTeacher, TorchTeacher
    from edgesam_deploy.errors import CheckpointError
    from edgesam_deploy.files import sha256_file
    from edgesam_deploy.models.checkpoint import load_model
    from edgesam_deploy.recipe import load_recipe

    if not (Path(name) / MANIFEST).is_file():
        recipe = load_recipe(name)
        path = weights.find(recipe)
        model = load_model(recipe, path)
        yield TorchTeacher(model, recipe, sha256_file(path), device), model, recipe
        return
    bundle = load_bundle(name)
    recipe = load_recipe(bundle.recipe)
    path = weights.find(recipe)
    if (found := sha256_file(path)) != (wanted := bundle.manifest.get("checkpoint_sha256")):
        raise CheckpointError(
            f"{path} (sha256 {found}) is not the checkpoint that {bundle.path} was built from (sha256 {wanted}): give "
            "that one with --checkpoint, the student gets its mask decoder"
        )
    with bundle.open(threads, embedding_on_device=False) as predictor:
        yield BundleTeacher(bundle, predictor.encoder, bundle.pixels), load_model(recipe, path), recipe


def _describe(found: Agreement) -> str:
    return (
        f"agreement with the teacher on {found.images} held-out images: clicks {found.click_iou:.4f}, boxes "
        f"{found.box_iou:.4f}, cosine {found.cosine:.4f}"
    )


def _print(result: DistillResult, student: str, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    if (found := result.agreement) is not None:
        print_table(
            f"{student} against its teacher on {found.images} held-out images, update {result.step} of {result.total}",
            ("mask IoU, clicks", "mask IoU, boxes", "cosine", "mean difference"),
            [(f"{found.click_iou:.4f}", f"{found.box_iou:.4f}", f"{found.cosine:.4f}", f"{found.l1:.4f}")],
        )
    if not result.finished:
        click.echo("stopped at the time limit: the same command goes on")
    if result.checkpoint is not None:
        click.echo(f"checkpoint: {result.checkpoint} (sha256 {str(result.sha256)[:12]}…)")
        click.echo(f"build it: sam-export build {student} --checkpoint {result.checkpoint}")
