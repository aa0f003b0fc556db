"""Weights of a timm model become those of a student's backbone, and nothing else does."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.models import build_model
from edgesam_deploy.models.backbone import load_backbone
from edgesam_deploy.models.timm_fpn import STRIDES, TimmFpnEncoder
from edgesam_deploy.recipe import Recipe, available_recipes, load_recipe

from .deterministic_weights import smooth_image
from .test_timm_fpn import SIZE, small

FAMILIES = ("efficientvit_b0", "hgnetv2_b0", "mobilenetv4_conv_small", "repvit_m1", "resnet18", "tf_efficientnetv2_b0",
            "tiny_vit_5m")  # fmt: skip


def taught(recipe: Recipe) -> Any:
    """The whole timm model, with weights that no other has."""
    torch.manual_seed(11)
    model = timm.create_model(str(recipe.options["backbone"]), pretrained=False)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def saved(state: dict[str, Any], path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_features_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """As timm itself gives them on the way through the model that knows its classes."""
    recipe = small(f"student_{family}")
    whole, model = taught(recipe), build_model(recipe)
    before = {k: v.clone() for k, v in model.state_dict().items() if "image_encoder.backbone." not in k}
    load_backbone(model, recipe, saved(whole.state_dict(), tmp_path / "model.pt"))
    encoder = model.image_encoder
    assert isinstance(encoder, TimmFpnEncoder)
    image = smooth_image(SIZE)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = whole.forward_intermediates(image, intermediates_only=True)
        features = encoder.backbone(image)
    for stride, taken in zip(STRIDES, encoder.taken, strict=True):
        alike = [one for one in maps if one.shape == features[taken].shape]
        assert alike, f"stride {stride}"
        assert any(torch.allclose(one, features[taken], rtol=1e-4, atol=1e-5) for one in alike), f"stride {stride}"
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_safetensors_and_a_model_without_its_classifier(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    recipe = small("student_resnet18")
    state = taught(recipe).state_dict()
    model = build_model(recipe)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, file)
    load_backbone(model, recipe, file)
    name = "layer3.0.conv1.weight"
    assert torch.equal(model.state_dict()[f"image_encoder.backbone.{name}"], state[name])


def test_more_classes_than_imagenets_do_not_matter(tmp_path: Path) -> None:
    recipe = small("student_resnet18")
    state = taught(recipe).state_dict()
    state["fc.weight"], state["fc.bias"] = torch.zeros(21841, 512), torch.zeros(21841)
    load_backbone(build_model(recipe), recipe, saved(state, tmp_path / "model.pt"))


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    recipe = small("student_resnet18")
    state = taught(recipe).state_dict()
    name = "layer1.0.conv1.weight"
    wrong = {
        f"lacks {name} \\(1 of them\\)": {k: v for k, v in state.items() if k != name},
        "holds besides stem.weight \\(1 of them\\)": {**state, "stem.weight": torch.zeros(1)},
        f"has another shape of {name}": {**state, name: torch.zeros(64, 64, 1, 1)},
        f"damaged: {name} holds inf or NaN": {**state, name: torch.full((64, 64, 3, 3), torch.nan)},
        "lacks conv1.weight": taught(small("student_hgnetv2_b0")).state_dict(),
    }
    for says, tensors in wrong.items():
        model = build_model(recipe)
        with pytest.raises(CheckpointError, match=says):
            load_backbone(model, recipe, saved(tensors, tmp_path / "model.pt"))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_backbone(build_model(recipe), recipe, tmp_path / "cut.pt")


def test_other_pixels_than_the_backbones_are_refused(tmp_path: Path) -> None:
    recipe = small("student_resnet18")
    other = replace(recipe, pixels=replace(recipe.pixels, mean=(127.5, 127.5, 127.5)))
    with pytest.raises(InputError, match=r"taught pixels of mean \[123.675, 116.28, 103.53\].*write timm's mean"):
        load_backbone(build_model(other), other, tmp_path / "not read.pt")


def test_networks_without_a_whole_backbone_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe("mobile_sam")
    with pytest.raises(InputError, match="'mobile_sam' has no timm backbone of full width"):
        load_backbone(build_model(recipe), recipe, tmp_path / "not read.pt")


@pytest.mark.parametrize("name", [n for n in available_recipes() if n.startswith("student_")])
def test_students_take_pixels_as_their_backbone_was_taught_them(name: str) -> None:
    recipe = load_recipe(name)
    published = timm.create_model(str(recipe.options["backbone"]), pretrained=False).pretrained_cfg
    for key in ("mean", "std"):
        assert [255 * v for v in published[key]] == pytest.approx(getattr(recipe.pixels, key), abs=0.5)
