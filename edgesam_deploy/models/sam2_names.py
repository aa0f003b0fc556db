"""Names of SAM 2's and EdgeTAM's published tensors -> ours, which are segment-anything's and timm's.

Two publications are read: the authors' ``.pt`` (https://github.com/facebookresearch/sam2,
https://github.com/facebookresearch/EdgeTAM) and the ``safetensors`` of the same weights for transformers
(``Sam2Model``, ``Sam2VideoModel``, ``EdgeTamModel``, ``EdgeTamVideoModel``). Both hold the memory that follows an
object through a video: in image mode (``SAM2ImagePredictor``) none of it is run, so it is left out here, by exact name.
So is the head that says whether the object is in the frame, whose answer image mode does not look at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgesam_deploy.models.transformers_names import segment_anything_names

Renames = Sequence[tuple[str, str]]

# By what the names start with. The names of single tensors are whole.
OFFICIAL_UNUSED = (
    "memory_attention.",
    "memory_encoder.",
    "spatial_perceiver.",  # EdgeTAM
    "maskmem_tpos_enc",
    "mask_downsample.",
    "no_mem_pos_enc",
    "no_obj_embed_spatial",
    "no_obj_ptr",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "sam_mask_decoder.pred_obj_score_head.",
)
TRANSFORMERS_UNUSED = (
    "memory_attention.",
    "memory_encoder.",
    "spatial_perceiver.",  # EdgeTAM
    "memory_temporal_positional_encoding",
    "mask_downsample.",
    "no_memory_positional_encoding",
    "occlusion_spatial_embedding_parameter",
    "no_object_pointer",
    "object_pointer_proj.",
    "temporal_positional_encoding_projection_layer.",
    "mask_decoder.pred_obj_score_head.",
)

# Regular expressions, applied in order.
OFFICIAL: Renames = (
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"^mask_decoder\.(conv_s[01])\.", r"image_encoder.\1."),
    (r"^no_mem_embed$", "image_encoder.no_mem_embed"),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.0\.", r"\1.fc1."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.layers\.1\.", r"\1.fc2."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.1\.", r"\1.lin2."),
)
# Of transformers, what SAM 2 has beside SAM (``transformers_names``).
TRANSFORMERS: Renames = (
    (r"^vision_encoder\.backbone\.timm_model\.", "image_encoder.trunk.body."),
    (r"^vision_encoder\.backbone\.patch_embed\.projection\.", "image_encoder.trunk.patch_embed.proj."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^(image_encoder\.trunk\.blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.proj_in\.", r"\1.fc1."),
    (r"^(image_encoder\.trunk\.blocks\.\d+\.mlp)\.proj_out\.", r"\1.fc2."),
    (r"^mask_decoder\.(conv_s[01])\.", r"image_encoder.\1."),
    (r"^no_memory_embedding$", "image_encoder.no_mem_embed"),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_in\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_out\.", r"\1.lin2."),
    (r"^(mask_decoder\.transformer\..*)\.o_proj\.", r"\1.out_proj."),
)
# transformers publishes the same matrix twice, and SAM's four vectors per label as one table.
SHARED_EMBEDDING = "shared_image_embedding.positional_embedding"
SHARED_EMBEDDING_AGAIN = "prompt_encoder.shared_embedding.positional_embedding"
POINT_TABLE = "prompt_encoder.point_embed.weight"


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names. Names that are ours already, and unknown ones, pass unchanged.

    Raises ValueError where what transformers publishes twice is not the same.
    """
    if any(name.startswith("vision_encoder.") for name in state):
        return segment_anything_names(_renamed(_whole_tables(state), TRANSFORMERS, TRANSFORMERS_UNUSED))
    return _renamed(state, OFFICIAL, OFFICIAL_UNUSED)


def _renamed(state: Mapping[str, Tensor], renames: Renames, unused: tuple[str, ...]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        if any(name.startswith(u) if u.endswith(".") else name == u for u in unused):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def _whole_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with one of two equal matrices, and with one vector per label."""
    found = dict(state)
    copy, again = found.pop(SHARED_EMBEDDING, None), found.get(SHARED_EMBEDDING_AGAIN)
    if copy is not None and (again is None or not torch.equal(copy, again)):
        raise ValueError(f"{SHARED_EMBEDDING} and {SHARED_EMBEDDING_AGAIN} are one matrix in SAM 2, here they differ")
    if POINT_TABLE in found:
        for label, vector in enumerate(found.pop(POINT_TABLE)):
            found[f"prompt_encoder.point_embeddings.{label}.weight"] = vector[None]
    return found
