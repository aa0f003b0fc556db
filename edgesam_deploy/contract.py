"""The two graphs every model is exported to: tensor names, shapes, dtypes.

This is the only home of tensor names. A shape entry is an ``int`` or the name of a dynamic axis:
``prompts`` (B, prompts answered in one call) and ``points`` (N, points of one prompt). With the geometry's
``image_size`` S, ``embedding_size`` E and ``embedding_channels`` C:

    encoder   image            (1, 3, S, S)     uint8    RGB, resized and padded with the mean colour
           -> image_embeddings (1, C, E, E)     float32
    decoder   image_embeddings (1, C, E, E)     float32
              point_coords     (B, N, 2)        float32  (x, y), model frame (pixels of prompt_size)
              point_labels     (B, N)           float32  1, 0, 2/3 box corners, -1 padding
              mask_input       (B, 1, 4E, 4E)   float32  logits; ignored where has_mask_input is 0
              has_mask_input   (1,)             float32  0 or 1
           -> low_res_masks    (B, M, 4E, 4E)   float32  logits; M = num_masks, mask 0 is the single-mask answer
              iou_predictions  (B, M)           float32  the model's own estimate
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgesam_deploy.errors import InputError

IMAGE = "image"
IMAGE_EMBEDDINGS = "image_embeddings"
POINT_COORDS = "point_coords"
POINT_LABELS = "point_labels"
MASK_INPUT = "mask_input"
HAS_MASK_INPUT = "has_mask_input"
LOW_RES_MASKS = "low_res_masks"
IOU_PREDICTIONS = "iou_predictions"

PROMPTS_AXIS = "prompts"
POINTS_AXIS = "points"

LABEL_BACKGROUND = 0
LABEL_FOREGROUND = 1
LABEL_BOX_TOP_LEFT = 2
LABEL_BOX_BOTTOM_RIGHT = 3
LABEL_PADDING = -1

# SAM's mask decoder upscales the embedding by two transposed convolutions of stride 2.
MASK_UPSCALE = 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that the graphs and the runtime share.

    image_size: S, side of the square encoder input in pixels.
    prompt_size: side of the model frame in which point_coords are given.
    embedding_size: E, side of image_embeddings.
    embedding_channels: C, channels of image_embeddings.
    num_masks: M, masks the decoder returns: the single mask and the multimask candidates.
    """

    image_size: int
    prompt_size: int
    embedding_size: int
    embedding_channels: int
    num_masks: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise InputError(f"geometry.{name} must be a positive integer, got {value!r}")
        if self.image_size % self.embedding_size:
            raise InputError(
                f"geometry.image_size ({self.image_size}) must be a multiple of embedding_size ({self.embedding_size})"
            )

    @property
    def mask_size(self) -> int:
        """Side of low_res_masks and mask_input, 4E."""
        return MASK_UPSCALE * self.embedding_size


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, numpy dtype name and shape of one graph input or output."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a concrete shape fits; a named axis takes any positive length."""
        return len(shape) == len(self.shape) and all(
            got > 0 if isinstance(want, str) else got == want for want, got in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class GraphContract:
    """Inputs and outputs of one graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def encoder_contract(geometry: Geometry) -> GraphContract:
    return GraphContract((_image(geometry),), (_embeddings(geometry),))


def decoder_contract(geometry: Geometry) -> GraphContract:
    side = geometry.mask_size
    return GraphContract(
        (
            _embeddings(geometry),
            TensorSpec(POINT_COORDS, "float32", (PROMPTS_AXIS, POINTS_AXIS, 2)),
            TensorSpec(POINT_LABELS, "float32", (PROMPTS_AXIS, POINTS_AXIS)),
            TensorSpec(MASK_INPUT, "float32", (PROMPTS_AXIS, 1, side, side)),
            TensorSpec(HAS_MASK_INPUT, "float32", (1,)),
        ),
        (
            TensorSpec(LOW_RES_MASKS, "float32", (PROMPTS_AXIS, geometry.num_masks, side, side)),
            TensorSpec(IOU_PREDICTIONS, "float32", (PROMPTS_AXIS, geometry.num_masks)),
        ),
    )


def contracts(geometry: Geometry) -> Mapping[str, GraphContract]:
    """Both graphs by the name of their file in a bundle, without the suffix."""
    return {"encoder": encoder_contract(geometry), "decoder": decoder_contract(geometry)}


def _image(geometry: Geometry) -> TensorSpec:
    return TensorSpec(IMAGE, "uint8", (1, 3, geometry.image_size, geometry.image_size))


def _embeddings(geometry: Geometry) -> TensorSpec:
    side = geometry.embedding_size
    return TensorSpec(IMAGE_EMBEDDINGS, "float32", (1, geometry.embedding_channels, side, side))
