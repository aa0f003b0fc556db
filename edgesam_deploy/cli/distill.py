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
    threads_option,
    track,
)

if TYPE_CHECKING:
    from edgesam_deploy.distill.agreement import Agreement
    from edgesam_deploy.distill.distill import DistillResult
    from edgesam_deploy.distill.teacher import Teacher
    from edgesam_deploy.distill.training import StepResult
    from edgesam_deploy.recipe import Recipe

positive = click.IntRange(1)


@click.command("distill")
@click.argument("student")
@click.option("--teacher", required=True, help="A recipe (PyTorch), or a bundle whose encoder answers.")
@checkpoint_options
@click.option(
    "--images", type=click.Path(path_type=Path), multiple=True, required=True, help="Folders and .tar files of images."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of the teacher's embeddings. Default: in -o.")
@click.option("--on-the-fly", is_flag=True, help="No cache: the teacher answers again in every epoch.")
@click.option("--init", type=click.Path(path_type=Path), help="First weights of the student. Default: random.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True)
@click.option("--batch", type=positive, default=8, show_default=True, help="Images per process and micro-step.")
@click.option("--accumulate", type=positive, default=1, show_default=True, help="Micro-steps per update.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=100, show_default=True, help="Updates.")
@click.option("--loss", type=click.Choice(["huber", "l1", "mse", "cosine"]), default="huber", show_default=True)
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True)
@click.option("--weight-decay", type=click.FloatRange(0), default=0.02, show_default=True)
@click.option("--ema", type=click.FloatRange(0, 1), default=0.999, show_default=True)
@click.option("--amp", type=click.Choice(["off", "bf16", "fp16"]), default="off", show_default=True)
@click.option("--colours", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of recoloured.")
@click.option("--views", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share of random crops.")
@click.option("--freeze-norm", is_flag=True, help="Keep batch statistics as they are.")
@click.option("--held", type=click.IntRange(1), default=32, show_default=True, help="Images kept out to validate.")
@click.option("--rounds", type=click.IntRange(0, 8), default=0, show_default=True, help="Of prompts in the loop.")
@click.option("--prompts", type=positive, default=8, show_default=True, help="Per image, with --rounds.")
@click.option("--embedding-weight", type=click.FloatRange(0), default=1.0, show_default=True, help="With --rounds.")
@click.option("--decoder-learns", is_flag=True, help="With --rounds: the mask decoder too.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--max-hours", type=click.FloatRange(0, min_open=True), help="Stop then; the same command goes on.")
@click.option("--save-every", type=click.FloatRange(0), default=600.0, show_default=True, help="Seconds.")
@click.option("--log-every", type=positive, default=20, show_default=True, help="Updates.")
@click.option("--check-every", type=positive, default=500, show_default=True, help="Updates.")
@click.option("--teacher-batch", type=positive, default=4, show_default=True)
@click.option("--shard-size", type=positive, default=64, show_default=True, help="Images per shard of the cache.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that load images.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU where there is one.")
@threads_option
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
        from edgesam_deploy.distill.options import DistillOptions
        from edgesam_deploy.distill.training import Pause
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "export") from error
    names = ("epochs", "batch", "accumulate", "lr", "warmup", "weight_decay", "optimizer", "loss", "ema", "amp",
             "colours", "views", "freeze_norm", "held", "seed", "rounds", "prompts", "embedding_weight",
             "decoder_learns")  # fmt: skip
    options = DistillOptions(**{name: given[name] for name in names})
    if threads is not None:
        torch.set_num_threads(threads)
    limit = given["max_hours"] * 3600 if given["max_hours"] else None
    with ExitStack() as stack:
        world = stack.enter_context(join(given["device"]))
        who, model, recipe = stack.enter_context(_teacher(teacher, weights, world.device, threads))
        job = Job(
            student=load_recipe(student),
            teacher=who,
            model=model,
            recipe=recipe,
            corpus=Corpus(images),
            output=output,
            options=options,
            cache=None if on_the_fly else cache or output / "cache",
            shard_size=given["shard_size"],
            teacher_batch=given["teacher_batch"],
            init=given["init"],
            every=given["log_every"],
            check=given["check_every"],
            workers=given["workers"],
            pause=Pause(given["save_every"], limit),
        )
        result = distill(job, world, stack.enter_context(_watching(world.first)))
    if world.first:
        _print(result, student, as_json)


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


@contextmanager
def _watching(first: bool) -> Iterator[Any]:
    """The listener of the first process; others are silent."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not (first and console.is_terminal),
    )  # fmt: skip

    class Listener:
        def say(self, message: str) -> None:
            if first:
                say(message)

        def cached(self, items: Any, total: int) -> Any:
            return track("teacher", items, total) if first else items

        def begin(self, step: int, total: int) -> None:
            self._task = bar.add_task("distill", total=total, completed=step)

        def update(self, result: StepResult) -> None:
            bar.update(self._task, advance=1, description=f"loss {result.loss:.5f}, cosine {result.cosine:.4f}")

        def check(self, step: int, found: Agreement) -> None:
            say(
                f"update {step}: agreement with the teacher on {found.images} held-out images: clicks "
                f"{found.click_iou:.4f}, boxes {found.box_iou:.4f}, cosine {found.cosine:.4f}"
            )

    with bar:
        yield Listener()


def _print(result: DistillResult, student: str, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    found = result.agreement
    print_table(
        f"{student} against its teacher on {found.images} held-out images, update {result.step} of {result.total}",
        ("mask IoU, clicks", "mask IoU, boxes", "cosine", "mean difference"),
        [(f"{found.click_iou:.4f}", f"{found.box_iou:.4f}", f"{found.cosine:.4f}", f"{found.l1:.4f}")],
    )
    if not result.finished:
        click.echo("stopped at the time limit: the same command goes on")
    click.echo(f"checkpoint: {result.checkpoint} (sha256 {result.sha256[:12]}…)")
    click.echo(f"build it: sam-export build {student} --checkpoint {result.checkpoint}")
