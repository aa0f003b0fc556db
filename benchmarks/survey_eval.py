"""Mask quality for ``survey.py``: `sam-export eval`, and whether what it said still holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure.protocol import BOX, CLICK, check_model
from edgesam_deploy.stages.evaluate import BundleModel, Model, origin

SHOWN = ("prompt", "answer", "count", "miou", "interval", "by_size", "boundary_f")


def is_current(found: Mapping[str, Any] | None, model: Model, against: Model | None, images: int) -> bool:
    """Whether the same models were evaluated with the same tools on as many images."""
    if found is None:
        return False
    (dataset,) = found["origin"]["datasets"]
    same = {name: value for name, value in found["origin"].items() if name != "datasets"} == origin(model, against)
    return same and dataset["images"] == images


def evaluate(model: Model, against: Model | None, dataset: str, output: Path, *words: str) -> dict[str, Any]:
    """What `sam-export eval` answers, without its bins. output: folder of all records. words: more of its options."""
    from families import run

    options = ["--dataset", dataset, "--prompts", ",".join(prompts_of(model)), "--tight-boxes", "-o", str(output)]
    options += words_of(against, "--against", "--against-checkpoint") if against is not None else []
    answer = run("eval", *words_of(model, "", "--checkpoint"), *options, *words)
    result = {"origin": answer["origin"]}
    for part in ("truth", "agreement"):
        result[part] = [{key: found[key] for key in SHOWN} for found in answer[part]]
    return result


def prompts_of(model: Model) -> list[str]:
    """Those of box and click that the model can be asked."""
    taken = []
    for prompt in (BOX, CLICK):
        try:
            check_model(model.geometry, [prompt], "the model")
            taken.append(prompt)
        except InputError:
            pass
    return taken


def words_of(model: Model, option: str, weights_option: str) -> list[str]:
    """A model on the command line. option: what names it, "" for the argument."""
    named = [option] if option else []
    if isinstance(model, BundleModel):
        return [*named, str(model.path), *(["--backend", model.backend] if model.backend is not None else [])]
    return [*named, model.recipe, weights_option, str(model.weights)]
