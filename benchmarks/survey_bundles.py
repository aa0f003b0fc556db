"""The bundles that ``survey.py`` measures: made by `sam-export build`, and told apart by what they are made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from survey_entries import BF16, BUILDS, FP32, INT8, ORT, Entry, Way

from edgesam_deploy.bundle import load_bundle
from edgesam_deploy.cli.terminal import plain
from edgesam_deploy.errors import BundleError
from edgesam_deploy.files import sha256_file, writing
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.stages.evaluate import BundleModel


def make_random(entry: Entry) -> None:
    """Seeded weights, for an entry without others."""
    if entry.random_weights and not entry.random_file.is_file():
        import torch
        from families import initial

        torch.manual_seed(0)
        with writing(entry.random_file) as temporary:
            torch.save(initial(entry.recipe).state_dict(), temporary)


def make_bundle(entry: Entry, recipe: Recipe, name: str, again: bool) -> None:
    """One of BUILDS, unless it is there already, from the stages of those that were made before."""
    from families import run

    folder, weights = entry.folder / name, entry.weights()
    if again or not up_to_date(folder, recipe, weights):
        stages = entry.folder / ".stages"
        for other in (f"{INT8}-{ORT}", FP32):
            if not (stages / name).exists() and name.startswith((INT8, BF16)) and (stages / other).is_dir():
                shutil.copytree(stages / other, stages / name)
        run("build", entry.recipe, *BUILDS[name], "--checkpoint", weights, "-o", folder)


def up_to_date(folder: Path, recipe: Recipe, weights: Path) -> bool:
    """Whether it is of this recipe, these weights and the tools installed."""
    try:
        manifest = load_bundle(folder).manifest
    except BundleError:  # not there, or broken
        return False
    made_of = (manifest["recipe"]["digest"], manifest["checkpoint_sha256"], manifest["tools"])
    return made_of == (recipe.digest, sha256_file(weights), tool_versions())


def row(entry: Entry, way: Way) -> dict[str, Any]:
    """What is run in one way, without what is measured of it. verified: None where nothing is built."""
    model = entry.model(way)
    return {
        "precision": way.precision,
        "backend": way.backend,
        "note": way.note,
        "verified": model.bundle.verified if isinstance(model, BundleModel) else None,
        "origin": model.origin(),
    }


def facts(entry: Entry, recipe: Recipe) -> dict[str, Any]:
    """What does not depend on precision and backend. macs: of an image and one prompt, as `sam-export profile`."""
    from edgesam_deploy.stages.profile import ProfileOptions, profile

    (counted,) = profile(recipe, ProfileOptions(latency=False))
    return {
        "recipe": recipe.name,
        "summary": recipe.summary,
        "recipe_digest": recipe.digest,
        "weights": "random" if entry.random_weights else "trained",
        "checkpoint_sha256": sha256_file(entry.weights()),
        "image_size": recipe.geometry.image_size,
        "parameters": counted.parameters,
        "macs": counted.macs,
        "encoder_macs": counted.encoder.total_macs,
        "teacher": None if entry.teacher is None else Path(entry.teacher).stem,
        "published": plain(list(recipe.published.accuracy)),
        "built_on": machine(),
        "tools": tool_versions(),
    }
