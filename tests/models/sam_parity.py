"""What the parity tests of networks with SAM's decoder share: prompts, answers, and what upstream recorded.

A recorded ``<family>_outputs.npz`` holds ``state``, the name, shape and dtype of every tensor of upstream's state dict,
and strided parts of what upstream answered with the weights and inputs of ``deterministic_weights.py``.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor, nn

from edgesam_deploy.contract import contracts
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.session import PyTorchSession
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.transforms import resized_hw

from .deterministic_weights import smooth_image
from .upstream_error import error

Recorded = dict[str, npt.NDArray[Any]]

DATA = Path(__file__).parent / "data"
PHOTO = Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos" / "verify" / "dog.jpg"
EMBEDDING_PART = np.s_[:, ::8, ::3, ::3]
MASK_PART = np.s_[:, :, ::7, ::7]

# In the model frame of 1024 pixels. name: (point_coords (N,2), point_labels (N,), box_xyxy (4,), with a mask input?)
PROMPTS: dict[str, tuple[list[list[float]] | None, list[int] | None, list[float] | None, bool]] = {
    "point": ([[300.0, 500.0]], [1], None, False),
    "points": ([[300.0, 500.0], [900.5, 40.25]], [1, 0], None, False),
    "box": (None, None, [120.0, 200.0, 800.0, 930.0], False),
    "points_box_mask": ([[300.0, 500.0], [900.5, 40.25]], [1, 0], [120.0, 200.0, 800.0, 930.0], True),
    "mask": (None, None, None, True),
}


def recorded(family: str) -> Recorded:
    with np.load(DATA / f"{family}_outputs.npz") as archive:
        return dict(archive)


def like(state: npt.NDArray[np.str_]) -> dict[str, Tensor]:
    """Tensors without storage with upstream's names, shapes and dtypes, from lines "name (shape) torch.dtype"."""
    tensors = {}
    for line in state.tolist():
        name, rest = line.split(" ", 1)
        shape, dtype = rest.rsplit(" torch.", 1)
        tensors[name] = torch.empty(ast.literal_eval(shape), dtype=getattr(torch, dtype), device="meta")
    return tensors


def answer(model: Sam, embeddings: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """All low_res_masks (1,4,4E,4E) and iou_predictions (1,4) by segment-anything's own modules.

    A prompt of ``PROMPTS`` is scaled from 1024 to the model's frame.
    """
    coords, labels, box, with_mask = PROMPTS[name]
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    scale = encoder.input_image_size[0] / 1024
    with torch.inference_mode():
        sparse, dense = encoder(
            points=None if coords is None else (scale * torch.tensor([coords]), torch.tensor([labels])),
            boxes=None if box is None else scale * torch.tensor([box]),
            masks=4.0 * smooth_image(4 * embeddings.shape[-1])[:, :1] if with_mask else None,
        )
        masks, iou = decoder.predict_masks(embeddings, encoder.get_dense_pe(), sparse, dense)
    return masks, iou


class FloatPadding(nn.Module):
    """image (1,3,S,S) uint8 -> image_embeddings, padded with 0 after normalising, as ``Sam.preprocess`` does it.

    What we deploy knows padding by its colour, so real pixels of that colour move by up to 0.008 standard deviations,
    and with them masks as noisy as those of random weights.
    """

    def __init__(self, model: Sam, height: int, width: int) -> None:
        super().__init__()
        self.model, self.height, self.width = model, height, width

    def forward(self, image: Tensor) -> Tensor:
        part = image[:, :, : self.height, : self.width].float()
        return cast(Tensor, self.model.image_encoder(self.model.preprocess(part)))


def photo_ious(model: Sam, recipe: Recipe, upstream: Recorded, float_padding: bool) -> dict[str, list[float]]:
    """Mask IoU of ours with upstream's recorded masks of ``PHOTO`` at its size, by prompt.

    Recorded are mask 0 and candidate 3 of a click, and candidate 1 of a box. With float_padding, IoU predictions must
    agree too.
    """
    photo = np.asarray(Image.open(PHOTO).convert("RGB"))
    height, width = photo.shape[:2]
    predictor = reference_predictor(model, recipe)
    if float_padding:
        module = FloatPadding(model, *resized_hw((height, width), recipe.geometry.image_size))
        encoder = PyTorchSession(module, contracts(recipe.geometry)["encoder"])
        predictor = Predictor(encoder, predictor.decoder, recipe.geometry, recipe.pixels)
    predictor.set_image(photo)
    prompts: dict[str, tuple[dict[str, Any], list[int]]] = {
        "photo.point": ({"point_coords": [[width * 0.5, height * 0.55]], "point_labels": [1]}, [0, 3]),
        "photo.box": ({"box": [width * 0.2, height * 0.1, width * 0.8, height * 0.95]}, [1]),
    }
    found = {}
    for name, (prompt, kept) in prompts.items():
        single, multi = (predictor.predict(**prompt, multimask_output=multimask) for multimask in (False, True))
        masks = np.concatenate([single.masks, multi.masks])[kept]
        theirs = np.unpackbits(upstream[f"{name}.masks"]).astype(bool)[: masks.size].reshape(masks.shape)
        assert all(0.02 < mask.mean() < 0.98 for mask in theirs)
        if float_padding:
            iou = np.concatenate([single.iou_predictions, multi.iou_predictions])
            assert error(iou, upstream[f"{name}.iou_predictions"]) < 2e-5
        found[name] = [mask_iou(ours, other) for ours, other in zip(masks, theirs, strict=True)]
    return found
