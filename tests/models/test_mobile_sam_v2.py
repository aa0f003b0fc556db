"""MobileSAMv2 against upstream's own code, which is not needed to run this.

``data/mobile_sam_v2_outputs.npz`` holds what the MobileSAMv2 folder of https://github.com/ChaoningZhang/MobileSAM at
commit 34bbbfdface3c18e5221aa7de6032d7220c6c6a1 answered, with its TinyViT encoder, in eval mode, with the weights and
inputs of ``deterministic_weights.py`` and ``parity.py``: the names of its two checkpoints, a strided part of the four
low-resolution masks of each prompt and of the single masks of five boxes in one batch, the IoU predictions, and two
masks of a photograph by its predictor. Tolerance: 2e-5 of the largest upstream value, in float32. Measured when the
file was made: 1.5e-6; photograph: mask IoU 0.9999 and more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from edgesam_deploy.models import architecture, graph_modules
from edgesam_deploy.models.checkpoint import join, load_model
from edgesam_deploy.recipe import Recipe, load_recipe

from .deterministic_weights import deterministic_state, uniform
from .parity import PROMPTS, answer, empty_state, outputs, photo_iou
from .upstream_error import error

TOLERANCE = 2e-5

# xyxy in the model frame, (5,4): as a detector gives them, overlapping, one on the border, one small.
BOXES = torch.tensor(
    [
        [120.0, 200.0, 800.0, 930.0],
        [0.0, 0.0, 1023.0, 700.0],
        [512.5, 300.25, 640.0, 420.0],
        [30.0, 600.0, 400.0, 760.0],
        [700.0, 100.0, 1000.0, 900.0],
    ]
)


@pytest.fixture(scope="module")
def upstream() -> dict[str, npt.NDArray[Any]]:
    return outputs("mobile_sam_v2")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("mobile_sam_v2")


@pytest.fixture(scope="module")
def model(recipe: Recipe, upstream: dict[str, npt.NDArray[Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From two files, as published: MobileSAM's, whose decoder is not taken, and the prompt-guided decoder's."""
    folder = tmp_path_factory.mktemp("mobile_sam_v2")
    state = deterministic_state(empty_state(upstream["published_state"]))
    encoder = {k: v for k, v in state.items() if k.startswith("image_encoder.")}
    torch.save({**encoder, "mask_decoder.iou_token.weight": torch.ones(1, 256)}, folder / "mobile_sam.pt")
    parts = ("PromtEncoder", "MaskDecoder")
    guided = {p: {k.removeprefix(f"{p}."): v for k, v in state.items() if k.startswith(f"{p}.")} for p in parts}
    torch.save(guided, folder / "Prompt_guided_Mask_Decoder.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESAM_CACHE", str(folder / "cache"))
        joined: Path = join(recipe, [folder / "mobile_sam.pt", folder / "Prompt_guided_Mask_Decoder.pt"])
        return load_model(recipe, joined)


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    """(1,256,64,64), not of an image: the encoder is MobileSAM's, which has its own test."""
    return torch.from_numpy(uniform("image_embeddings", (1, 256, 64, 64)).astype(np.float32))


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(name: str, model: Any, embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]) -> None:
    low_res_masks, iou_predictions = answer(model, embeddings, name)
    assert error(low_res_masks[:, :, ::7, ::7], upstream[f"{name}.low_res_masks"]) < TOLERANCE
    assert error(iou_predictions, upstream[f"{name}.iou_predictions"]) < TOLERANCE


def test_a_batch_of_boxes_is_answered_in_one_call(
    model: Any, recipe: Recipe, embeddings: Tensor, upstream: dict[str, npt.NDArray[Any]]
) -> None:
    """The decoder that is exported, against upstream's ``simple_type``, which repeats embeddings for each box."""
    decoder = graph_modules(model, recipe)[1]
    labels = torch.tensor([[2.0, 3.0]]).expand(len(BOXES), -1)
    no_mask = torch.zeros(len(BOXES), 1, 256, 256)
    with torch.inference_mode():
        masks, iou = decoder(embeddings, BOXES.reshape(-1, 2, 2), labels, no_mask, torch.zeros(1))
    assert error(masks[:, :1, ::7, ::7], upstream["boxes.low_res_masks"]) < TOLERANCE
    assert error(iou[:, :1], upstream["boxes.iou_predictions"]) < TOLERANCE


def test_masks_of_a_photograph_are_those_of_upstreams_predictor(
    model: Any, recipe: Recipe, upstream: dict[str, npt.NDArray[Any]]
) -> None:
    found = photo_iou(model, recipe, {"point": upstream["dog.point"], "box": upstream["dog.box"]})
    assert min(found.values()) >= 0.999, found


def test_names_that_are_ours_pass_and_strange_ones_stay(recipe: Recipe) -> None:
    one = torch.ones(1)
    given = {"image_encoder.x": one, "MaskDecoder.y": one, "PromtEncoder": one, "Other.z": one}
    assert list(architecture(recipe).published_names(given)) == [
        "image_encoder.x",
        "mask_decoder.y",
        "prompt_encoder",
        "Other.z",
    ]
