"""The encoders of ``cpu_int8.py``, and their export as samexporter does it, in our words."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.contract import IMAGE_EMBEDDINGS
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.models import build_model
from edgesam_deploy.models.checkpoint import checkpoint_path, load_model
from edgesam_deploy.models.tiny_vit import TinyVitBlock
from edgesam_deploy.recipe import PACKAGE, Recipe, load_recipe
from edgesam_deploy.transforms import to_encoder_input

PHOTOS = PACKAGE / "assets" / "photos"
SEED = 0
# Random weights: their ranges only have to be finite and of the right order.
STATISTICS_PHOTOS, RANDOM_PHOTOS = 3, 6
# samexporter, export_encoder.py at 8d7844347a3a: TorchScript exporter, opset 18, constants folded, nothing simplified;
# convert_mobile_sam.sh puts the normalisation and the padding into the graph.
SAMEXPORTER_OPSET = 18
SHIPPED, RANDOM = "shipped", f"random, seed {SEED}, batch statistics of {STATISTICS_PHOTOS} photographs"


@dataclass(frozen=True, slots=True)
class Subject:
    """One encoder. weights: where they come from. bar: how many times faster than the baseline INT8 must be."""

    name: str
    recipe: Recipe
    model: Sam
    weights: str
    bar: float


def upstream_layout(block: TinyVitBlock, x: Tensor) -> Tensor:
    """``TinyVitBlock.forward`` with channels last except in its convolution, as MobileSAM's own code has it.

    The same function; on ONNX Runtime it is a tenth faster, and samexporter exports that code.
    """
    y, side = x.permute(0, 2, 3, 1), block.window
    batch, height, width, channels = y.shape
    padded = F.pad(y, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = padded.shape[1] // side, padded.shape[2] // side
    windows = padded.reshape(batch, rows, side, columns, side, channels).permute(0, 1, 3, 2, 4, 5)
    windows = block.attn(windows.reshape(batch * rows * columns, side * side, channels))
    windows = windows.reshape(batch, rows, columns, side, side, channels).permute(0, 1, 3, 2, 4, 5)
    y = y + windows.reshape(batch, rows * side, columns * side, channels)[:, :height, :width]
    y = block.local_conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return cast(Tensor, y + block.mlp(y)).permute(0, 3, 1, 2)


class SamexporterEncoder(nn.Module):
    """What samexporter traces with --use-preprocess: pixels (H,W,3) float32 RGB -> image_embeddings (1,C,E,E)."""

    def __init__(self, sam: Sam, recipe: Recipe) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(sam.image_encoder)
        for module in self.encoder.modules():
            if isinstance(module, TinyVitBlock):
                module.forward = partial(upstream_layout, module)  # type: ignore[method-assign]
        self.size = recipe.geometry.image_size
        self.mean, self.std = torch.tensor(recipe.pixels.mean), torch.tensor(recipe.pixels.std)

    def forward(self, pixels: Tensor) -> Tensor:
        image = ((pixels - self.mean) / self.std).permute(2, 0, 1)
        image = F.pad(image, (0, self.size - image.shape[2], 0, self.size - image.shape[1]))
        return cast(Tensor, self.encoder(image[None]))


def reference() -> Subject:
    recipe = load_recipe("reference")
    return Subject(recipe.name, recipe, cast(Sam, load_model(recipe, checkpoint_path(recipe))), SHIPPED, 2.7)


def mobile_sam() -> Subject:
    recipe = load_recipe("mobile_sam")
    torch.manual_seed(SEED)
    return _random(Subject(recipe.name, recipe, cast(Sam, build_model(recipe)), RANDOM, 2.8))


def nanosam_resnet18() -> Subject:
    recipe = load_recipe("nanosam_resnet18")
    torch.manual_seed(SEED)
    return _random(Subject(recipe.name, recipe, cast(Sam, build_model(recipe)), RANDOM, 2.7))


def student(name: str) -> Subject:
    """The encoder of any recipe of SAM's family, a student's above all, with seeded weights.

    Its batch statistics are those of a batch of three: noise, blocks of colour (on which graphs are compared at every
    stage) and a photograph. A random EfficientNetV2 that has seen one kind alone amplifies another until two equal sums
    differ by a tenth; so does no trained one.
    """
    recipe = load_recipe(name)
    torch.manual_seed(SEED)
    model = cast(Sam, build_model(recipe))
    size = recipe.geometry.image_size
    blocks = torch.randint(0, 256, (1, 3, 8, 8)).repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3)
    photograph = to_encoder_input(
        read_image(list_images(PHOTOS / "calibration")[0]), size, recipe.pixels.padding, recipe.geometry.resize
    )
    images = torch.cat([torch.randint(0, 256, (1, 3, size, size)), blocks, torch.from_numpy(photograph)])
    settle(model, [(images.float() - model.pixel_mean) / model.pixel_std])
    return Subject(recipe.name, recipe, model, f"random, seed {SEED}, batch statistics of three images", 1.0)


SUBJECTS = (reference, mobile_sam, nanosam_resnet18)


def _random(subject: Subject) -> Subject:
    set_statistics(subject.model, subject.recipe)
    return subject


def set_statistics(model: Sam, recipe: Recipe) -> None:
    """Give batch normalisations the mean and variance of real activations, as training would have."""
    images = []
    for path in list_images(PHOTOS / "calibration")[:STATISTICS_PHOTOS]:
        pixels = to_encoder_input(read_image(path), recipe.geometry.image_size, recipe.pixels.padding)
        images.append((torch.from_numpy(pixels).float() - model.pixel_mean) / model.pixel_std)
    settle(model, images)


def settle(model: Sam, images: Iterable[Tensor]) -> None:
    """Batch statistics of normalised images (1,3,S,S)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average over what it sees
    model.train()
    with torch.no_grad():
        for image in images:
            model.image_encoder(image)
    model.eval()


def export_as_samexporter(subject: Subject, output: Path) -> Path:
    """The encoder by TorchScript tracing, normalisation inside, height and width dynamic, not simplified."""
    size = subject.recipe.geometry.image_size
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer and of the old exporter's age
        torch.onnx.export(
            SamexporterEncoder(subject.model, subject.recipe).eval(),
            (torch.randn(size, size, 3),),
            output,
            dynamo=False,
            opset_version=SAMEXPORTER_OPSET,
            do_constant_folding=True,
            input_names=["input_image"],
            output_names=[IMAGE_EMBEDDINGS],
            dynamic_axes={"input_image": {0: "image_height", 1: "image_width"}},
        )
    return output
