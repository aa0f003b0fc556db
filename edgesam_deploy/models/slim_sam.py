"""SlimSAM (Chen et al. 2023, https://github.com/czg1225/SlimSAM): SAM ViT-B, pruned to narrower layers.

The uniformly pruned models, whose layers are all equally narrow. Upstream publishes those of differing widths as whole
pickled modules only, which hold code and are refused.
"""

from __future__ import annotations

from segment_anything.modeling import Sam

from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.sam import assemble, options
from edgesam_deploy.models.sam_vit import vit_encoder
from edgesam_deploy.models.transformers_names import segment_anything_names
from edgesam_deploy.recipe import Recipe


def build(recipe: Recipe) -> Sam:
    """Options: embed_dim, mlp_dim, depth, num_heads, global_attn_indexes (upstream's ``build_sam.py``)."""
    given = options(recipe, "embed_dim", "mlp_dim", "depth", "num_heads", "global_attn_indexes")
    return assemble(vit_encoder(recipe, **given), recipe)


ARCHITECTURE = Architecture(build, segment_anything_names)
