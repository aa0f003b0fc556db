"""EfficientSAM against upstream's own code, which is not needed to run this.

``data/efficient_sam_outputs.npz`` holds what https://github.com/yformer/EfficientSAM at commit
d525f622e6f640acf5a0fc37c7ca1f243da5bde0 answered, in eval mode, with the weights and inputs of
``deterministic_weights.py``: EfficientSAM-Ti at its 1024 pixels, EfficientSAM-S with ``img_size = 256``. Names and
shapes of the state dicts, a strided part of the image embeddings and of the three low-resolution masks of each prompt,
and the IoU predictions. Tolerance: 2e-5 of the largest upstream value, in float32. Measured when the file was made:
1.5e-6; the rest is room for other BLAS libraries and vector widths.

Also the mask of a photograph, (480,640) packed bits: the best candidate of Ti for one point, brought to the original
size bilinearly as upstream's own ONNX decoder does (``onnx_models.py``); its PyTorch code does it bicubically. Random
weights make masks of pixel noise, in which the last bit of a colour counts: ours have 0.9983 mask IoU with upstream's
where upstream resizes in float32 ("own_pixels"), and more than 0.9999 where it gets our uint8 pixels ("our_pixels").
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from edgesam_deploy.errors import PromptError, RecipeError
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.models import architecture, build_model, reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import PACKAGE, Recipe, load_recipe

from .deterministic_weights import deterministic_state, smooth_image
from .upstream_error import error

DATA = Path(__file__).parent / "data" / "efficient_sam_outputs.npz"
PHOTO = PACKAGE / "assets" / "photos" / "verify" / "dog.jpg"
EMBEDDING_PART = np.s_[:, ::8, ::3, ::3]
MASK_PART = np.s_[:, :, ::7, ::7]
TOLERANCE = 2e-5
PADDING = ([0.0, 0.0], -1)
# name: points in the frame of 1024 pixels, each with its label
PROMPTS: dict[str, list[tuple[list[float], int]]] = {
    "point": [([300.0, 500.0], 1)],
    "points": [([300.0, 500.0], 1), ([900.5, 40.25], 0)],
    "box": [([120.0, 200.0], 2), ([800.0, 930.0], 3)],
    "points_box": [([300.0, 500.0], 1), ([900.5, 40.25], 0), ([120.0, 200.0], 2), ([800.0, 930.0], 3)],
    "six": [([100.0 * i + 50.0, 900.0 - 120.0 * i], label) for i, label in enumerate((1, 1, 0, 1, 1, 1))],
}


def small(name: str) -> Recipe:
    recipe = load_recipe(name)
    return replace(recipe, geometry=replace(recipe.geometry, image_size=256, prompt_size=256, embedding_size=16))


RECIPES = {"ti": load_recipe("efficient_sam_ti"), "s": small("efficient_sam_s")}


@pytest.fixture(scope="module")
def upstream() -> dict[str, npt.NDArray[Any]]:
    with np.load(DATA) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loaded as published: the weights under "model"."""
    loaded = {}
    for tag, recipe in RECIPES.items():
        path = tmp_path_factory.mktemp("weights") / f"{tag}.pt"
        torch.save({"model": deterministic_state(build_model(recipe).state_dict())}, path)
        loaded[tag] = load_model(recipe, path)
    return loaded


@pytest.fixture(scope="module")
def embeddings(models: dict[str, Any]) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {t: models[t].image_encoder(smooth_image(r.geometry.image_size)) for t, r in RECIPES.items()}


def feeds(name: str, size: int) -> tuple[Tensor, Tensor]:
    """point_coords (1,N,2) and point_labels (1,N) as the runtime gives them: a padding point where there is no box."""
    points = PROMPTS[name] + ([] if any(label == 2 for _, label in PROMPTS[name]) else [PADDING])
    coords = torch.tensor([[xy for xy, _ in points]]) * (size / 1024)
    return coords, torch.tensor([[float(label) for _, label in points]])


@pytest.mark.parametrize("tag", RECIPES)
def test_names_and_shapes_are_upstreams(
    tag: str, models: dict[str, Any], upstream: dict[str, npt.NDArray[Any]]
) -> None:
    ours = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in models[tag].state_dict().items()]
    assert sorted(ours) == sorted(upstream[f"{tag}.state"].tolist())


@pytest.mark.parametrize(("tag", "encoder"), [("ti", 6_163_840), ("s", 22_353_664)])
def test_parameter_count(tag: str, encoder: int, models: dict[str, Any]) -> None:
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in models[tag].named_children()}
    assert counts == {"image_encoder": encoder, "prompt_encoder": 1_024, "mask_decoder": 4_058_340}


@pytest.mark.parametrize("tag", RECIPES)
def test_image_embeddings_agree(tag: str, embeddings: dict[str, Tensor], upstream: dict[str, npt.NDArray[Any]]) -> None:
    assert error(embeddings[tag].numpy()[EMBEDDING_PART], upstream[f"{tag}.image_embeddings"]) < TOLERANCE


@pytest.mark.parametrize("part", ["reference_decoder", "decoder_graph"])
@pytest.mark.parametrize("tag", RECIPES)
@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(
    name: str,
    tag: str,
    part: str,
    models: dict[str, Any],
    embeddings: dict[str, Tensor],
    upstream: dict[str, npt.NDArray[Any]],
) -> None:
    decoder = getattr(architecture(RECIPES[tag]), part)(models[tag], RECIPES[tag])
    with torch.inference_mode():
        masks, iou = decoder(embeddings[tag], *feeds(name, RECIPES[tag].geometry.prompt_size))
    assert error(masks.numpy()[MASK_PART], upstream[f"{tag}.{name}.low_res_masks"]) < TOLERANCE
    assert error(iou, upstream[f"{tag}.{name}.iou_predictions"]) < TOLERANCE


def test_prompts_of_one_call_do_not_mix(models: dict[str, Any], embeddings: dict[str, Tensor]) -> None:
    decoder = architecture(RECIPES["s"]).decoder_graph(models["s"], RECIPES["s"])
    calls = [feeds(name, 256) for name in ("point", "box")]
    with torch.inference_mode():
        together = decoder(embeddings["s"], *(torch.cat(column) for column in zip(*calls, strict=True)))
        alone = [decoder(embeddings["s"], *call) for call in calls]
    for i, answer in enumerate(alone):
        for ours, expected in zip(together, answer, strict=True):
            assert error(ours[i : i + 1], expected.numpy()) < TOLERANCE


def test_the_mask_of_a_photograph_agrees(models: dict[str, Any], upstream: dict[str, npt.NDArray[Any]]) -> None:
    predictor = reference_predictor(models["ti"], RECIPES["ti"])
    image = np.array(Image.open(PHOTO).convert("RGB"))
    height, width = image.shape[:2]
    predictor.set_image(image)
    answer = predictor.predict([[width * 0.5, height * 0.5]], [1], multimask_output=False)
    assert answer.masks.shape == (1, *upstream["photo.shape"])
    for pixels, least in (("own_pixels", 0.997), ("our_pixels", 0.9995)):
        expected = np.unpackbits(upstream[f"photo.{pixels}"]).reshape(height, width).astype(bool)
        assert mask_iou(answer.masks[0].astype(bool), expected) >= least
    assert answer.iou_predictions[0] == pytest.approx(upstream["photo.iou_predictions"][1].max(), abs=1e-4)


def test_more_points_than_upstream_takes_are_refused(models: dict[str, Any]) -> None:
    predictor = reference_predictor(models["s"], RECIPES["s"])
    predictor.set_image(np.zeros((30, 40, 3), dtype=np.uint8))
    points = [[x, 5] for x in range(7)]
    assert predictor.predict(points[:6], [1] * 6).masks.shape == (3, 30, 40)
    with pytest.raises(PromptError, match="at most 6 points"):
        predictor.predict(points, [1] * 7)
    with pytest.raises(PromptError, match="a box being two, got 7"):
        predictor.predict(points[:5], [1] * 5, box=[1, 1, 20, 20])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"embedding_size": 8}, "stride of 16"),
        ({"mask_input": True}, "takes no mask as a prompt"),
        ({"num_masks": 4}, "num_masks = 3"),
        ({"max_points": None}, "max_points = 6"),
    ],
)
def test_another_geometry_is_refused(entries: dict[str, Any], message: str) -> None:
    recipe = RECIPES["s"]
    with pytest.raises(RecipeError, match=message):
        build_model(replace(recipe, geometry=replace(recipe.geometry, **entries)))
