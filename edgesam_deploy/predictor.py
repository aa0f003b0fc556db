"""Masks from prompts, with the names and semantics of segment-anything's ``SamPredictor``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesam_deploy import contract
from edgesam_deploy.contract import Geometry
from edgesam_deploy.errors import ImageError, InputError, PromptError
from edgesam_deploy.masks import MASK_THRESHOLD, stability_scores, upscale_logits
from edgesam_deploy.prompts import Prompts, check_prompts, encode_prompts
from edgesam_deploy.recipe import Pixels
from edgesam_deploy.runtime import Session, Tensor
from edgesam_deploy.transforms import to_encoder_input

# SAM 2's single mask gives way to a candidate below it (sam2/build_sam.py, dynamic_multimask_stability_thresh).
MIN_STABILITY = 0.98


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one ``predict`` call; unpacks as (masks, iou_predictions, low_res_masks).

    masks: (M,H,W) bool in the original frame, or float32 logits with return_logits.
    iou_predictions: (M,) float32, the model's own estimate, not a measurement.
    low_res_masks: (M,4E,4E) float32 logits; give one back as mask_input (1,4E,4E) to refine.
    Each has a leading prompt axis B if the prompts had one.
    """

    masks: npt.NDArray[np.bool_] | npt.NDArray[np.float32]
    iou_predictions: npt.NDArray[np.float32]
    low_res_masks: npt.NDArray[np.float32]

    def __iter__(self) -> Iterator[npt.NDArray[np.bool_] | npt.NDArray[np.float32]]:
        return iter((self.masks, self.iou_predictions, self.low_res_masks))


@dataclass(frozen=True, slots=True)
class _Embedded:
    """The image that prompts refer to. features: the encoder's outputs by name, as arrays or kept on its device."""

    features: Mapping[str, Tensor]
    original_hw: tuple[int, int]


class Predictor:
    """Runs an encoder and a decoder session behind ``set_image`` and ``predict``.

    The sessions stay the caller's: enter them before, leave them after. Not thread-safe (``set_image`` keeps
    state): use one Predictor per thread. Sessions of the CPU may be shared between them, engine sessions may not.
    """

    def __init__(self, encoder: Session, decoder: Session, geometry: Geometry, pixels: Pixels) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.geometry = geometry
        self.pixels = pixels
        self._embedded: _Embedded | None = None

    def set_image(self, image: npt.NDArray[np.uint8], image_format: str = "RGB") -> None:
        """Embed an image (H,W,3) uint8, channels in ``image_format`` order ("RGB" or "BGR")."""
        original_hw = (image.shape[0], image.shape[1]) if getattr(image, "ndim", 0) == 3 else (0, 0)
        feeds = self.preprocess(image, image_format)
        self._embedded = _Embedded(self.encoder.run(feeds), original_hw)

    def reset_image(self) -> None:
        """Forget the image."""
        self._embedded = None

    def get_image_embedding(self) -> npt.NDArray[np.float32]:
        """image_embeddings (1,C,E,E) float32 of the current image."""
        return np.asarray(self._current().features[contract.IMAGE_EMBEDDINGS])

    def predict(
        self,
        point_coords: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        box: npt.ArrayLike | None = None,
        mask_input: npt.NDArray[np.float32] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """Masks for one prompt, or for B prompts in one decoder call.

        point_coords: (N,2) or (B,N,2), (x, y) in the original frame; point_labels: (N,) or (B,N), 1 foreground and 0
        background; box: (4,) or (B,4) xyxy in the original frame; mask_input: (1,4E,4E) or (B,1,4E,4E) logits of an
        earlier low_res_masks. multimask_output: the three candidates (best for one ambiguous point) instead of the
        single mask. return_logits: masks as logits instead of thresholded at 0.
        """
        current = self._current()
        prompts = check_prompts(point_coords, point_labels, box, current.original_hw)
        masks, iou = self._choose(*self._decode(current, prompts, mask_input), multimask_output)
        logits = self.postprocess(masks, current.original_hw)
        answer = logits if return_logits else logits > MASK_THRESHOLD
        if prompts.batched:
            return Prediction(answer, iou, masks)
        return Prediction(answer[0], iou[0], masks[0])

    def preprocess(self, image: npt.NDArray[np.uint8], image_format: str = "RGB") -> dict[str, npt.NDArray[np.uint8]]:
        """The encoder's feeds for an image (H,W,3) uint8. Raises ImageError or InputError."""
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ImageError(f"set_image takes a numpy array (H,W,3) of uint8, got {got}")
        if 0 in image.shape:
            raise ImageError(f"set_image takes an image of at least 1x1 pixels, got shape {image.shape}")
        if image_format not in ("RGB", "BGR"):
            raise InputError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        rgb = image if image_format == "RGB" else np.ascontiguousarray(image[..., ::-1])
        return {
            contract.IMAGE: to_encoder_input(rgb, self.geometry.image_size, self.pixels.padding, self.geometry.resize)
        }

    def postprocess(self, low_res: npt.NDArray[np.float32], original_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
        """(B,M,4E,4E) logits -> (B,M,H,W) logits in the original frame."""
        return upscale_logits(low_res, original_hw, self.geometry.prompt_size, self.geometry.resize)

    def decode(
        self, prompts: Prompts, mask_input: npt.NDArray[np.float32] | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """All M masks of checked prompts: low_res_masks (B,M,4E,4E) and iou_predictions (B,M)."""
        return self._decode(self._current(), prompts, mask_input)

    def single_index(self, masks: npt.NDArray[np.float32], iou: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
        """(B,) which of the M masks (B,M,4E,4E) is the answer where one is asked for; iou: their iou_predictions."""
        rule, candidates = self.geometry.single_mask, self.geometry.first_candidate
        index = np.zeros(len(masks), dtype=np.intp)
        if rule != contract.FIRST:
            index = candidates + iou[:, candidates:].argmax(axis=1)
        if rule == contract.STABLE:
            index = np.where(stability_scores(masks[:, 0]) >= MIN_STABILITY, 0, index)
        return index

    def decoder_feeds(self, prompts: Prompts, mask_input: npt.NDArray[np.float32] | None = None) -> dict[str, Tensor]:
        """The decoder's feeds for checked prompts on the current image."""
        current = self._current()
        self._check_count(prompts)
        frame = self.geometry
        coords, labels = encode_prompts(
            prompts, current.original_hw, frame.prompt_size, frame.resize, frame.box_padding
        )
        feeds = {**current.features, contract.POINT_COORDS: coords, contract.POINT_LABELS: labels}
        if not self.geometry.mask_input:
            if mask_input is not None:
                raise PromptError("this model takes no mask as a prompt: give points or a box")
            return feeds
        return {
            **feeds,
            contract.MASK_INPUT: self._mask_feed(prompts, mask_input),
            contract.HAS_MASK_INPUT: np.array([mask_input is not None], dtype=np.float32),
        }

    def _decode(
        self, current: _Embedded, prompts: Prompts, mask_input: npt.NDArray[np.float32] | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if prompts.point_coords is None and prompts.boxes is None and mask_input is None:
            raise PromptError("predict needs a prompt: points with labels, a box, or a mask_input")
        out = self.decoder.run(self.decoder_feeds(prompts, mask_input))
        return out[contract.LOW_RES_MASKS], out[contract.IOU_PREDICTIONS]

    def _check_count(self, prompts: Prompts) -> None:
        clicks = 0 if prompts.point_coords is None else prompts.point_coords.shape[1]
        count, most = clicks + (0 if prompts.boxes is None else 2), self.geometry.max_points
        if most is not None and count > most:
            raise PromptError(f"this model takes at most {most} points per prompt, a box being two, got {count}")

    def _choose(
        self, masks: npt.NDArray[np.float32], iou: npt.NDArray[np.float32], multimask_output: bool
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Of all M masks (B,M,4E,4E) and their iou_predictions (B,M): the candidates, or the single answer (B,1,…)."""
        if multimask_output:
            candidates = self.geometry.first_candidate
            return masks[:, candidates:], iou[:, candidates:]
        index = self.single_index(masks, iou)
        rows = np.arange(len(masks))
        return masks[rows, index][:, None], iou[rows, index][:, None]

    def _mask_feed(self, prompts: Prompts, mask_input: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
        side = self.geometry.mask_size
        expected = (prompts.count, 1, side, side)
        if mask_input is None:
            return np.zeros(expected, dtype=np.float32)
        mask = np.asarray(mask_input, dtype=np.float32)
        if mask.ndim == 3:
            mask = mask[None]
        if mask.shape != expected:
            raise PromptError(
                f"mask_input must be logits of shape {expected[1:]} for one prompt or {expected} for "
                f"{prompts.count}, got {np.shape(mask_input)}"
            )
        if not np.isfinite(mask).all():
            raise PromptError("mask_input must be finite logits, got NaN or infinity")
        return mask

    def _current(self) -> _Embedded:
        if self._embedded is None:
            raise InputError("call set_image(image) before predict")
        return self._embedded
