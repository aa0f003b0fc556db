"""SAM's tensor names in Hugging Face transformers (``SamModel``), brought back to segment-anything's.

The inverse of ``convert_sam_to_hf.py`` of transformers, which renames and copies tensors and changes none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# The three tensors of a perceptron are proj_in, layers.0 and proj_out there, and layers.0, layers.1, layers.2 here.
_PERCEPTRON = re.compile(r"(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.(.+)\.(weight|bias)")
_PERCEPTRON_LAYERS = {"proj_in": "layers.0", "layers.0": "layers.1", "proj_out": "layers.2"}

# Applied in this order, each to what the ones before it left.
_RENAMED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        # One matrix, which transformers saves once or twice.
        (
            r"^(?:shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        ),
        (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
        (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"^vision_encoder\.", "image_encoder."),
        (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
        (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
        (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
        (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
        (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
        (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
        (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
        (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
        (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
        (r"^((?:image_encoder\.blocks|mask_decoder\.transformer\.layers)\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
        (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    )
)


def segment_anything_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under segment-anything's names; what has them already, and what is unknown, passes unchanged."""
    theirs = _perceptrons(state)
    return {_name(name, theirs): tensor for name, tensor in state.items()}


def _perceptrons(names: Iterable[str]) -> frozenset[str]:
    """The perceptrons that are named in transformers' way: ``layers.0`` is the second layer there, the first here."""
    matches = (_PERCEPTRON.fullmatch(name) for name in names)
    return frozenset(match[1] for match in matches if match and match[2] == "proj_in")


def _name(name: str, theirs: frozenset[str]) -> str:
    match = _PERCEPTRON.fullmatch(name)
    if match and match[1] in theirs and match[2] in _PERCEPTRON_LAYERS:
        return f"{match[1]}.{_PERCEPTRON_LAYERS[match[2]]}.{match[3]}"
    for pattern, ours in _RENAMED:
        name = pattern.sub(ours, name)
    return name
