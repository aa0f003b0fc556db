"""The network to learn from: in PyTorch, or a bundle's encoder on whatever runs it (ONNX Runtime, TensorRT)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgesam_deploy.bundle import Bundle
from edgesam_deploy.contract import IMAGE, IMAGE_EMBEDDINGS, Geometry
from edgesam_deploy.errors import InputError
from edgesam_deploy.models import architecture
from edgesam_deploy.recipe import Pixels, Recipe
from edgesam_deploy.runtime import Session
from edgesam_deploy.transforms import to_encoder_input


class Teacher(Protocol):
    """name, digest: which weights, for the record and for the cache. embed: (B,3,S,S) uint8 -> (B,C,E,E) float32."""

    name: str
    digest: str
    geometry: Geometry
    pixels: Pixels

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]: ...


@dataclass
class TorchTeacher:
    """A recipe's network in PyTorch, a batch at a time. digest: of its weights."""

    model: nn.Module
    recipe: Recipe
    digest: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        check_teachable(self.recipe.geometry, self.recipe.name)
        self.name, self.geometry, self.pixels = self.recipe.name, self.recipe.geometry, self.recipe.pixels
        self._encoder: Any = encoder_of(self.model, self.recipe).eval().to(self.device)

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            found: Tensor = self._encoder(torch.from_numpy(images).to(self.device))
        embeddings: npt.NDArray[np.float32] = found.float().cpu().numpy()
        return embeddings


@dataclass
class BundleTeacher:
    """A bundle's encoder, one image at a time, as engines take them."""

    bundle: Bundle
    session: Session
    pixels: Pixels

    def __post_init__(self) -> None:
        self.geometry = self.bundle.geometry
        self.name = f"{self.bundle.recipe}-{self.bundle.precision} on {self.bundle.runs_on}"
        check_teachable(self.geometry, self.name)
        files = self.bundle.manifest["files"]
        self.digest = str(files[self.bundle.graph("encoder").name]["sha256"])

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        rows = [self.session.run({IMAGE: image[None]})[IMAGE_EMBEDDINGS] for image in images]
        return np.concatenate(rows).astype(np.float32)


def encoder_of(model: nn.Module, recipe: Recipe) -> nn.Module:
    """(B,3,S,S) uint8 -> image_embeddings (B,C,E,E): the network's own encoder behind its own normalisation."""
    return architecture(recipe).reference_encoder(model, recipe)


def check_teachable(geometry: Geometry, name: str) -> None:
    """Raises InputError for a network whose decoder reads more than one embedding."""
    if geometry.high_res_channels:
        raise InputError(
            f"'{name}' gives its decoder finer feature maps beside the embedding, which decoupled distillation does "
            "not teach: choose a teacher without them (sam-export models)"
        )


def check_pair(student: Recipe, teacher: Teacher) -> None:
    """Raises InputError unless the student's embedding can stand in for the teacher's in the teacher's decoder."""
    check_teachable(student.geometry, student.name)
    wanted, found = ((g.embedding_channels, g.embedding_size, g.resize) for g in (teacher.geometry, student.geometry))
    if wanted != found:
        raise InputError(
            f"the teacher '{teacher.name}' has embeddings of {wanted[0]} channels, {wanted[1]} x {wanted[1]}, of "
            f"images fitted by {wanted[2]}; the student '{student.name}' has {found[0]}, {found[1]} x {found[1]}, "
            f"{found[2]}: choose a student recipe with the teacher's"
        )


def encoder_input(image: npt.NDArray[np.uint8], geometry: Geometry, pixels: Pixels) -> npt.NDArray[np.uint8]:
    """(H,W,3) uint8 -> (3,S,S) uint8, as the network that ``geometry`` and ``pixels`` describe takes it."""
    square: npt.NDArray[np.uint8] = to_encoder_input(image, geometry.image_size, pixels.padding, geometry.resize)[0]
    return square
