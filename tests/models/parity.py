"""What every comparison with an upstream shares: prompts, a photograph, and how far two answers are apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgesam_deploy.images import read_image
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.recipe import PACKAGE, Recipe

from .deterministic_weights import smooth_image

DATA = Path(__file__).parent / "data"
PHOTO = PACKAGE / "assets" / "photos" / "verify" / "dog.jpg"

# name: (points (x, y) and their labels, or None; box_xyxy, or None; with a mask input?), in a frame of 1024 pixels.
PROMPTS: dict[str, tuple[tuple[list[list[float]], list[int]] | None, list[float] | None, bool]] = {
    "point": (([[300.0, 500.0]], [1]), None, False),
    "points": (([[300.0, 500.0], [900.5, 40.25]], [1, 0]), None, False),
    "box": (None, [120.0, 200.0, 800.0, 930.0], False),
    "points_box_mask": (([[300.0, 500.0], [900.5, 40.25]], [1, 0]), [120.0, 200.0, 800.0, 930.0], True),
    "mask": (None, None, True),
}


def outputs(name: str) -> dict[str, npt.NDArray[Any]]:
    """The recorded answers of an upstream."""
    with np.load(DATA / f"{name}_outputs.npz") as archive:
        return dict(archive)


def listing(state: Mapping[str, Tensor]) -> list[str]:
    """Names, shapes and dtypes of a state dict, as recorded."""
    return [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in state.items()]


def empty_state(names: npt.NDArray[Any]) -> dict[str, Tensor]:
    """A recorded listing as a state dict on the meta device: what ``deterministic_state`` takes."""
    state = {}
    for line in names.tolist():
        name, shape, dtype = line.split(" ", 1)[0], line.split(" ", 1)[1].rpartition(" ")[0], line.rpartition(" ")[2]
        size = [int(n) for n in shape.strip("()").split(",") if n.strip()]
        state[name] = torch.empty(size, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
    return state


def answer(model: Any, embeddings: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """All low_res_masks (1,4,4E,4E) and iou_predictions (1,4) of a prompt, by SAM's own modules."""
    given, box, with_mask = PROMPTS[name]
    encoder = model.prompt_encoder
    scale = encoder.input_image_size[0] / 1024
    points = None if given is None else (scale * torch.tensor([given[0]]), torch.tensor([given[1]]))
    boxes = None if box is None else scale * torch.tensor([box])
    mask_input = 4.0 * smooth_image(4 * embeddings.shape[-1])[:, :1] if with_mask else None
    with torch.inference_mode():
        sparse, dense = encoder(points=points, boxes=boxes, masks=mask_input)
        masks, iou = model.mask_decoder.predict_masks(embeddings, encoder.get_dense_pe(), sparse, dense)
    return masks, iou


def photo_iou(model: nn.Module, recipe: Recipe, upstream: Mapping[str, npt.NDArray[Any]]) -> dict[str, float]:
    """Mask IoU, at the photograph's size, of our reference with what upstream's predictor answered.

    upstream: "point" and "box", the packed bits of a mask each: the best of the candidates of one click, and the
    single answer to a box.
    """
    image = read_image(PHOTO)
    height, width = image.shape[:2]
    predictor = reference_predictor(model, recipe)
    predictor.set_image(image)
    click = predictor.predict([[0.45 * width, 0.55 * height]], [1], multimask_output=True)
    box = predictor.predict(box=[0.2 * width, 0.15 * height, 0.8 * width, 0.9 * height], multimask_output=False)
    found = {"point": click.masks[click.iou_predictions.argmax()], "box": box.masks[0]}
    expected = {name: np.unpackbits(bits)[: height * width].reshape(height, width) for name, bits in upstream.items()}
    return {name: mask_iou(found[name].astype(bool), expected[name].astype(bool)) for name in found}
