"""The PyTorch FP32 model's answers to the verification prompts: what every backend is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edgesam_deploy.measure.accuracy import Answers, answer, save_answers
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import Recipe


def record_answers(
    recipe: Recipe,
    checkpoint: Path,
    images: Sequence[Path],
    output: Path,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Answers:
    """Ask the model the default prompts on ``images`` and write its answers (npz)."""
    answers = answer(reference_predictor(load_model(recipe, checkpoint), recipe), images, progress=progress)
    save_answers(answers, output)
    return answers
