"""Every student: a timm backbone under the project's own neck, at a small image size.

There is no upstream to agree with. What is held: each recipe names the backbone it says, and takes its features at
strides 8, 16 and 32, whose channels are those that the backbones' authors print; weights save and load strictly; the
exported module computes what the unmerged network computes. ``test_timm_fpn_export.py`` exports some of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgesam_deploy.errors import CheckpointError, RecipeError
from edgesam_deploy.models import architecture, build_model, graph_modules
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.models.timm_fpn import TimmFpnEncoder
from edgesam_deploy.recipe import Recipe, available_recipes, load_recipe

from .deterministic_weights import smooth_image

# The smallest that leaves more than one position at stride 32: batch norms of a single one would be 0.
SIZE = 64
# recipe: (timm's name, channels at strides 8, 16 and 32)
STUDENTS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "student_efficientvit_b0": ("efficientvit_b0", (32, 64, 128)),
    "student_hgnetv2_b0": ("hgnetv2_b0", (256, 512, 1024)),
    "student_hgnetv2_b1": ("hgnetv2_b1", (256, 512, 1024)),
    "student_hgnetv2_b2": ("hgnetv2_b2", (384, 768, 1536)),
    "student_mobilenetv4_conv_medium": ("mobilenetv4_conv_medium", (80, 160, 960)),
    "student_mobilenetv4_conv_small": ("mobilenetv4_conv_small", (64, 96, 960)),
    "student_mobilenetv4_hybrid_medium": ("mobilenetv4_hybrid_medium", (80, 160, 960)),
    "student_repvit_m1": ("repvit_m1", (96, 192, 384)),
    "student_resnet18": ("resnet18", (128, 256, 512)),
    "student_resnet34": ("resnet34", (128, 256, 512)),
    "student_tf_efficientnetv2_b0": ("tf_efficientnetv2_b0", (48, 112, 192)),
    "student_tf_efficientnetv2_s": ("tf_efficientnetv2_s", (64, 160, 256)),
    "student_tiny_vit_5m": ("tiny_vit_5m_224", (128, 160, 320)),
}


def small(name: str, size: int = SIZE) -> Recipe:
    recipe = load_recipe(name)
    sizes = {"image_size": size, "prompt_size": size, "embedding_size": size // 16}
    return replace(recipe, geometry=replace(recipe.geometry, **sizes))


def settled(recipe: Recipe) -> Any:
    """An untrained network whose batch norms have seen something: else deep ones amplify the last bit without end."""
    torch.manual_seed(0)
    model: Any = build_model(recipe)
    model.image_encoder.train()
    with torch.no_grad():
        for scale in (1.0, 0.7):
            model.image_encoder(scale * smooth_image(SIZE) + 0.3 * torch.randn(2, 3, SIZE, SIZE))
    return model.eval()


def test_every_student_recipe_is_here() -> None:
    assert {name for name in available_recipes() if name.startswith("student_")} == set(STUDENTS)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_reads_strides_8_16_and_32(name: str) -> None:
    recipe, (backbone, channels) = small(name), STUDENTS[name]
    assert recipe.options == {"backbone": backbone}
    with torch.device("meta"):
        encoder = TimmFpnEncoder(backbone, 256)
    assert tuple(layer.in_channels for layer in encoder.lateral) == channels


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_saves_loads_and_is_exported_as_it_is(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    model = settled(recipe)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(recipe, tmp_path / "weights.pt")
    pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    family = architecture(recipe)
    with torch.inference_mode():
        expected = family.reference_encoder(model, recipe).eval()(pixels)
        assert tuple(expected.shape) == (1, 256, SIZE // 16, SIZE // 16)
        assert torch.equal(family.reference_encoder(loaded, recipe).eval()(pixels), expected)
        ours = graph_modules(loaded, recipe)[0](pixels)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_student_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    recipe = small("student_mobilenetv4_conv_small")
    state = build_model(recipe).state_dict()
    del state["image_encoder.lateral.2.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match=r"1 missing \(image_encoder.lateral.2.weight\)"):
        load_model(recipe, tmp_path / "less.pt")


def test_a_backbone_without_these_strides_is_refused() -> None:
    recipe = small("student_resnet18")
    with pytest.raises(RecipeError, match="strides 8, 16, 32, gives none at 8, 32"):
        build_model(replace(recipe, options={"backbone": "vit_tiny_patch16_224"}))
