"""The PyTorch model behind the runtime's session protocol: the reference that everything is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, cast

import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgesam_deploy.contract import LABEL_BOX_TOP_LEFT, LONGEST_SIDE, GraphContract
from edgesam_deploy.recipe import Recipe


class PyTorchSession:
    """One of the two exported modules, run by PyTorch in float32 on the CPU."""

    def __init__(self, module: nn.Module, contract: GraphContract) -> None:
        self._module = module.eval()
        self._contract = contract

    def __enter__(self) -> PyTorchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def specs(self) -> GraphContract:
        return self._contract

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        arguments = [torch.from_numpy(feeds[spec.name]) for spec in self._contract.inputs]
        with torch.inference_mode():
            results = self._module(*arguments)
        values = results if isinstance(results, tuple) else (results,)
        return {spec.name: value.numpy() for spec, value in zip(self._contract.outputs, values, strict=True)}


class ReferenceEncoder(nn.Module):
    """image (1,3,S,S) uint8 -> what the network's own image_encoder gives, its pixels normalised as ``Sam.preprocess``.

    The padding colour becomes SAM's 0, as in the exported graph (``graphs.EncoderGraph``).
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.image_encoder: Any = model.image_encoder
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", recipe.pixels.mean), ("std", recipe.pixels.std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        self.padded = recipe.geometry.resize == LONGEST_SIDE

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        pixels = image.float()
        normalised = (pixels - self.mean) / self.std
        if self.padded:
            normalised = normalised.masked_fill(pixels == self.mean.round(), 0.0)
        return cast("Tensor | tuple[Tensor, ...]", self.image_encoder(normalised))


class ReferenceDecoder(nn.Module):
    """The decoder contract on segment-anything's PromptEncoder and MaskDecoder."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor | None = None,
        has_mask_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        prompt_encoder, mask_decoder = self.model.prompt_encoder, self.model.mask_decoder
        # Upstream embeds clicks and boxes by two functions; in the contract a box is the last two points.
        clicks = point_coords.shape[1] - 2 * int(bool((point_labels == LABEL_BOX_TOP_LEFT).any()))
        sparse = prompt_encoder._embed_points(point_coords[:, :clicks], point_labels[:, :clicks], pad=False)
        if clicks < point_coords.shape[1]:
            corners = prompt_encoder._embed_boxes(point_coords[:, clicks:].reshape(-1, 4))
            sparse = torch.cat([sparse, corners], dim=1)
        if mask_input is not None and has_mask_input is not None and bool(has_mask_input.any()):
            dense = prompt_encoder._embed_masks(mask_input)
        else:
            dense = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(
                len(sparse), -1, *prompt_encoder.image_embedding_size
            )
        masks, iou = mask_decoder.predict_masks(image_embeddings, prompt_encoder.get_dense_pe(), sparse, dense)
        return masks, iou
