"""The two graphs every model is exported to: tensor names, shapes, dtypes.

This is the only home of tensor names. A shape entry is an ``int`` or the name of a dynamic axis:
``prompts`` (B, prompts answered in one call) and ``points`` (N, points of one prompt). With the geometry's
``image_size`` S, ``embedding_size`` E and ``embedding_channels`` C:

    encoder   image            (1, 3, S, S)     uint8    RGB, resized (``resize``) and padded with the mean colour
           -> image_embeddings (1, C, E, E)     float32
    decoder   image_embeddings (1, C, E, E)     float32
              point_coords     (B, N, 2)        float32  (x, y), model frame (pixels of prompt_size)
              point_labels     (B, N)           float32  1, 0, 2/3 box corners, -1 padding
              mask_input       (B, 1, 4E, 4E)   float32  logits; ignored where has_mask_input is 0
              has_mask_input   (1,)             float32  0 or 1
           -> low_res_masks    (B, M, 4E, 4E)   float32  logits; M = num_masks, mask 0 is the single-mask answer
              iou_predictions  (B, M)           float32  the model's own estimate

Two named variants, which a geometry asks for:

    points    ``mask_input = false``: the decoder takes neither mask_input nor has_mask_input (EfficientSAM)
    high-res  ``high_res_channels = [C0, C1]``: beside image_embeddings the encoder gives, and the decoder takes,
              high_res_feats_0 (1, C0, 4E, 4E) and high_res_feats_1 (1, C1, 2E, 2E), float32 (SAM 2, EdgeTAM)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgesam_deploy.errors import InputError

IMAGE = "image"
IMAGE_EMBEDDINGS = "image_embeddings"
HIGH_RES_FEATS = ("high_res_feats_0", "high_res_feats_1")
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

# How an image becomes the square encoder input: SAM scales the longer side to S and pads; SAM 2 and EfficientSAM scale
# both sides to S.
LONGEST_SIDE, STRETCH = RESIZES = ("longest_side", "stretch")
# Which of the M masks answers where one is asked for: the first, trained for that (SAM); the one of the highest
# predicted IoU, all being candidates (EfficientSAM), or all but the first (TinySAM); the first if it is stable, else
# the best of the others (SAM 2).
FIRST, BEST, CANDIDATE, STABLE = SINGLE_MASKS = ("first", "best", "candidate", "stable")

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
    resize: "longest_side" or "stretch", how an image becomes the encoder input (``transforms``).
    mask_input: whether the decoder takes a mask as a prompt.
    high_res_channels: of the two finer feature maps that the encoder hands to the decoder, () where there are none.
    max_points: the most points that the decoder takes of one prompt, a box being two; None for any number.
    single_mask: "first", "best", "candidate" or "stable", which mask is the single answer (``predictor``).
    box_padding: whether a box, too, is followed by the padding point that SAM adds to points alone (``prompts``).
    """

    image_size: int
    prompt_size: int
    embedding_size: int
    embedding_channels: int
    num_masks: int
    resize: str = LONGEST_SIDE
    mask_input: bool = True
    high_res_channels: tuple[int, ...] = ()
    max_points: int | None = None
    single_mask: str = FIRST
    box_padding: bool = False

    def __post_init__(self) -> None:
        self._check_variant()
        sizes = ("image_size", "prompt_size", "embedding_size", "embedding_channels", "num_masks")
        for name in (*sizes, *(() if self.max_points is None else ("max_points",))):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise InputError(f"geometry.{name} must be a positive integer, got {value!r}")
        if self.image_size % self.embedding_size:
            raise InputError(
                f"geometry.image_size ({self.image_size}) must be a multiple of embedding_size ({self.embedding_size})"
            )

    def _check_variant(self) -> None:
        for name, known in (("resize", RESIZES), ("single_mask", SINGLE_MASKS)):
            if getattr(self, name) not in known:
                raise InputError(f"geometry.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("mask_input", "box_padding"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"geometry.{name} must be true or false, got {getattr(self, name)!r}")
        channels = self.high_res_channels
        # A list, as JSON and TOML have it, is taken for the same.
        object.__setattr__(self, "high_res_channels", tuple(channels) if isinstance(channels, list) else channels)
        if (
            not isinstance(self.high_res_channels, tuple)
            or len(self.high_res_channels) not in (0, len(HIGH_RES_FEATS))
            or not all(isinstance(c, int) and not isinstance(c, bool) and c > 0 for c in self.high_res_channels)
        ):
            raise InputError(
                f"geometry.high_res_channels must be two positive integers, or none, got {self.high_res_channels!r}"
            )

    @property
    def variant(self) -> str:
        """Of the contract: "sam", "points" or "high-res"."""
        if self.high_res_channels:
            return "high-res"
        return "sam" if self.mask_input else "points"

    @property
    def first_candidate(self) -> int:
        """Index of the first of the M masks that are offered as a choice; what is before it is the single answer."""
        # Mask 0 was trained for unambiguous prompts, the others as a choice (mask_decoder.MaskDecoder.forward).
        return 0 if self.single_mask == BEST else 1

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
    return GraphContract((_image(geometry),), _embeddings(geometry))


def decoder_contract(geometry: Geometry) -> GraphContract:
    side = geometry.mask_size
    mask = (
        TensorSpec(MASK_INPUT, "float32", (PROMPTS_AXIS, 1, side, side)),
        TensorSpec(HAS_MASK_INPUT, "float32", (1,)),
    )
    return GraphContract(
        (
            *_embeddings(geometry),
            TensorSpec(POINT_COORDS, "float32", (PROMPTS_AXIS, POINTS_AXIS, 2)),
            TensorSpec(POINT_LABELS, "float32", (PROMPTS_AXIS, POINTS_AXIS)),
            *(mask if geometry.mask_input else ()),
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


def _embeddings(geometry: Geometry) -> tuple[TensorSpec, ...]:
    """What the encoder hands to the decoder, coarsest first."""
    side = geometry.embedding_size
    finer = zip(HIGH_RES_FEATS, geometry.high_res_channels, (4 * side, 2 * side), strict=False)
    return (
        TensorSpec(IMAGE_EMBEDDINGS, "float32", (1, geometry.embedding_channels, side, side)),
        *(TensorSpec(name, "float32", (1, channels, size, size)) for name, channels, size in finer),
    )
