"""What a network that learns begins with: weights of all of it, of its backbone alone, or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from edgesam_deploy.errors import InputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.models import build_model
from edgesam_deploy.models.backbone import load_backbone
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FirstWeights:
    """init: a checkpoint of the network. backbone: see ``models.backbone``. Raises InputError for both."""

    init: Path | None = None
    backbone: Path | None = None

    def __post_init__(self) -> None:
        if self.init is not None and self.backbone is not None:
            raise InputError("--init holds the backbone's weights, too: give --init or --backbone")

    def build(self, recipe: Recipe) -> nn.Module:
        """Raises CheckpointError and InputError for weights that do not fit."""
        if self.init is not None:
            return load_model(recipe, self.init)
        model = build_model(recipe)
        if self.backbone is not None:
            load_backbone(model, recipe, self.backbone)
        return model

    def hashes(self) -> dict[str, str | None]:
        """sha256 of what was given, as runs record it."""
        given = {"init_sha256": self.init}
        if self.backbone is not None:  # absent otherwise: runs from before there was such a file go on
            given["backbone_sha256"] = self.backbone
        return {name: sha256_file(path) if path is not None else None for name, path in given.items()}
