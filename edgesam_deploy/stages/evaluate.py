"""What ``sam-export eval`` can evaluate: a bundle as its device computes it, or a recipe in PyTorch FP32.

Both say how they are opened, also in another process, and where their numbers come from. Of a bundle nothing here
imports torch.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgesam_deploy import __version__
from edgesam_deploy.bundle import GRAPHS, Bundle, load_bundle
from edgesam_deploy.contract import Geometry
from edgesam_deploy.errors import CheckpointError, MissingExtraError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.measure.datasets import Dataset, DatasetOptions
from edgesam_deploy.measure.evaluate import MaskRecord
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Recipe, load_recipe
from edgesam_deploy.stages.verify import witness, witness_name

PYTORCH = "PyTorch FP32"


@dataclass(frozen=True, slots=True)
class BundleModel:
    """backend: another for a CPU's bundle (``Bundle.on``), None for its own."""

    path: Path
    backend: str | None = None

    @property
    def bundle(self) -> Bundle:
        return load_bundle(self.path).on(self.backend)

    @property
    def geometry(self) -> Geometry:
        return self.bundle.geometry

    @contextmanager
    def open(self, threads: int | None) -> Iterator[Predictor]:
        """With the arithmetic of its device: FP16 for a GPU is emulated on a CPU (``stages.verify.witness``)."""
        with witness(self.bundle, threads) as (predictor, _):
            yield predictor

    def origin(self) -> dict[str, Any]:
        bundle = self.bundle
        names = [name for name in bundle.manifest["files"] if Path(name).stem in GRAPHS]
        return {
            "recipe": dict(bundle.manifest["recipe"]),
            "precision": bundle.precision,
            "target": bundle.target,
            "runs_on": witness_name(bundle),
            "checkpoint_sha256": bundle.manifest.get("checkpoint_sha256"),
            "files": {name: bundle.manifest["files"][name]["sha256"] for name in sorted(names)},
        }


@dataclass(frozen=True, slots=True)
class RecipeModel:
    """recipe: a name or the path of a TOML. weights: a checkpoint that fits it."""

    recipe: str
    weights: Path

    @property
    def geometry(self) -> Geometry:
        return load_recipe(self.recipe).geometry

    @contextmanager
    def open(self, threads: int | None) -> Iterator[Predictor]:
        try:
            import torch

            from edgesam_deploy.models import reference_predictor
            from edgesam_deploy.models.checkpoint import load_model
        except ImportError as error:
            raise MissingExtraError(error.name or "torch", "export") from error
        before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            recipe = load_recipe(self.recipe)
            yield reference_predictor(load_model(recipe, self.weights), recipe)
        finally:
            torch.set_num_threads(before)

    def origin(self) -> dict[str, Any]:
        recipe: Recipe = load_recipe(self.recipe)
        return {
            "recipe": {"name": recipe.name, "digest": recipe.digest},
            "precision": "fp32",
            "runs_on": PYTORCH,
            "checkpoint_sha256": sha256_file(self.weights),
        }


Model = BundleModel | RecipeModel


def check_weights(model: RecipeModel) -> None:
    """Raise CheckpointError now, rather than in a worker process."""
    if not model.weights.is_file():
        raise CheckpointError(f"checkpoint {model.weights} does not exist")


def origin(model: Model, teacher: Model | None) -> dict[str, Any]:
    """Where the numbers are from; the same for the same numbers, whatever the command line and the folders were."""
    return {
        "model": model.origin(),
        "teacher": teacher.origin() if teacher is not None else None,
        "versions": versions(model, *([teacher] if teacher is not None else [])),
        "machine": machine(),
    }


def dataset_origin(dataset: Dataset, records: Iterable[MaskRecord], options: DatasetOptions) -> dict[str, Any]:
    """What was measured on. targets_sha256: over image, id and area of every target, in order."""
    targets = list(dict.fromkeys((r.image, r.target, r.area) for r in records if r.against == "truth"))
    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "images": len(dataset.images),
        "targets": len(targets),
        "targets_sha256": hashlib.sha256(json.dumps(targets).encode()).hexdigest(),
        "boxes": "tight" if options.tight_boxes or dataset.layout not in ("coco", "lvis", "sa1b") else "annotation",
        "crowds": options.crowds,
        "mean_over": "groups" if dataset.by_group else "masks",
    }


def versions(*models: Model) -> dict[str, str]:
    """Of what shapes the numbers."""
    names = ["numpy", "pillow", "pycocotools", "scipy"]
    names += ["onnxruntime", "openvino"] if any(isinstance(m, BundleModel) for m in models) else []
    names += ["torch"] if any(isinstance(m, RecipeModel) for m in models) else []
    found: dict[str, str] = {"edgesam-deploy": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def needed(datasets: Sequence[Dataset]) -> Mapping[str, bool]:
    """Optional packages by whether these datasets need them."""
    return {"scipy": True, "pycocotools": any(d.layout in ("coco", "lvis", "sa1b") for d in datasets)}
