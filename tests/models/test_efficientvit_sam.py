"""EfficientViT-SAM against upstream's own code, which is not needed to run this.

``data/efficientvit_sam_outputs.npz`` holds what https://github.com/mit-han-lab/efficientvit at commit
de7d7733cc0329f391b33f1f459271562ec27bd5 answered, in eval mode, through ``create_efficientvit_sam_model``: names and
shapes of all five models; every prompt kind (``sam_parity``) and a photograph through ``EfficientViTSamPredictor`` of
L0 at its published 512 pixels; and the embeddings of XL1 made thin (widths 8 to 96, one block a stage) at 512 pixels.
Tolerance: 2e-5 of the largest upstream value, in float32. Measured when the file was made: 0.0 (the same sums in the
same order); the rest is room for other BLAS libraries and vector widths. L1, L2 and XL0 at their published sizes were
compared once, by hand, with the same result. Small mistakes are larger: BatchNorm with eps 1e-5 instead of 1e-6 gives
5e-5, GELU by erf 7e-4, bilinear instead of bicubic 7e-2. Smaller ones are held by the recorded eps of every module.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from edgesam_deploy.contract import encoder_contract
from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models import build_model, graph_modules
from edgesam_deploy.models.efficientvit_sam import ARCHITECTURE, MultiScaleAttention, published_names
from edgesam_deploy.recipe import Int8Rules, PrecisionRules, Recipe, load_recipe
from edgesam_deploy.stages import export as export_stage
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.fp16 import convert_to_fp16, emulate_fp16
from edgesam_deploy.stages.placement import eligible

from .deterministic_weights import deterministic_state, smooth_image
from .sam_parity import EMBEDDING_PART, MASK_PART, PROMPTS, Recorded, answer, like, photo_ious, recorded
from .upstream_error import error

TOLERANCE = 2e-5
SIZE = 512

# Parameters in millions, as upstream's applications/efficientvit_sam/README.md prints them.
PUBLISHED_PARAMS_M = {"l0": 34.8, "l1": 47.7, "l2": 61.3, "xl0": 117.0, "xl1": 203.3}


@pytest.fixture(scope="module")
def upstream() -> Recorded:
    return recorded("efficientvit_sam")


@pytest.fixture(scope="module")
def model(upstream: Recorded) -> Sam:
    """L0 with weights that came under upstream's names: nothing missing, left over or of another shape."""
    built = build_model(load_recipe("efficientvit_sam_l0"))
    built.load_state_dict(published_names(deterministic_state(like(upstream["state"]))), strict=True)
    return cast(Sam, built)


@pytest.fixture(scope="module")
def embeddings(model: Sam) -> Tensor:
    """(1,256,64,64)"""
    with torch.inference_mode():
        return cast(Tensor, model.image_encoder(smooth_image(SIZE)))


@pytest.mark.parametrize("variant", PUBLISHED_PARAMS_M)
def test_names_shapes_and_parameters_are_upstreams(variant: str, upstream: Recorded) -> None:
    with torch.device("meta"):
        built = build_model(load_recipe(f"efficientvit_sam_{variant}"))
    ours = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in built.state_dict().items()]
    theirs = published_names(like(upstream["state" if variant == "l0" else f"state.{variant}"]))
    assert sorted(ours) == sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in theirs.items())
    assert round(sum(p.numel() for p in built.parameters()) / 1e6, 1) == PUBLISHED_PARAMS_M[variant]


def test_names_that_are_ours_pass_unchanged_and_unknown_ones_for_the_strict_load_to_refuse(model: Sam) -> None:
    ours = model.state_dict()
    assert list(published_names(ours)) == list(ours)
    strange = {"image_encoder.backbone.head.weight": torch.zeros(1)}
    assert published_names(strange) == strange
    assert ARCHITECTURE.published_names is published_names


def test_every_eps_is_upstreams(model: Sam, upstream: Recorded) -> None:
    """Those of the mask decoder's LayerNorms too, which are 1e-5 in SAM."""
    ours = {f"{name} {module.eps:g}" for name, module in model.named_modules() if hasattr(module, "eps")}
    assert ours == {line.replace(".op_list.", ".") for line in upstream["eps"].tolist()}
    assert "mask_decoder.transformer.norm_final_attn 1e-06" in ours


def test_image_embeddings_agree(embeddings: Tensor, upstream: Recorded) -> None:
    assert tuple(embeddings.shape) == (1, 256, 64, 64)
    assert error(embeddings.numpy()[EMBEDDING_PART], upstream["image_embeddings"]) < TOLERANCE


@pytest.mark.parametrize("name", PROMPTS)
def test_answers_agree(name: str, model: Sam, embeddings: Tensor, upstream: Recorded) -> None:
    low_res_masks, iou_predictions = answer(model, embeddings, name)
    assert error(low_res_masks.numpy()[MASK_PART], upstream[f"{name}.low_res_masks"]) < TOLERANCE
    assert error(iou_predictions, upstream[f"{name}.iou_predictions"]) < TOLERANCE


@pytest.mark.parametrize("float_padding", [True, False])
def test_photo_agrees(float_padding: bool, model: Sam, upstream: Recorded) -> None:
    """Resized to 512 and prompted in 1024, as upstream's predictor does."""
    found = photo_ious(model, load_recipe("efficientvit_sam_l0"), upstream, float_padding)
    assert min(min(ious) for ious in found.values()) >= 0.999, found


def test_image_embeddings_of_a_thin_extra_large_network_agree(upstream: Recorded) -> None:
    base = load_recipe("efficientvit_sam_xl1")
    sizes = {"widths": [8, 16, 32, 32, 64, 96], "depths": [1, 1, 1, 1, 1, 1], "neck_depth": 1}
    recipe = replace(base, options={**base.options, **sizes}, geometry=replace(base.geometry, image_size=SIZE))
    encoder = cast(nn.Module, build_model(recipe).image_encoder)
    encoder.load_state_dict(published_names(deterministic_state(like(upstream["state.thin_xl"]))), strict=True)
    with torch.inference_mode():
        found = cast(Tensor, encoder(smooth_image(SIZE)))
    assert error(found.numpy()[:, ::16, ::4, ::4], upstream["thin_xl.image_embeddings"]) < TOLERANCE


def small(name: str = "efficientvit_sam_l0") -> Recipe:
    """A recipe's blocks, few and thin, at 256 pixels."""
    base = load_recipe(name)
    sizes = {"widths": [8, 16, 32, 32, 64], "depths": [0, 0, 0, 0, 1], "neck_depth": 1}
    geometry = replace(base.geometry, image_size=256, prompt_size=256, embedding_size=32)
    return replace(base, options={**base.options, **sizes}, geometry=geometry)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small encoder as ONNX, with keys and values of about 100: their products summed over the image pass 65504,
    while what goes into them and comes out of them stays far below. As in the published L2 (mIoU 0.0 in FP16).
    """
    recipe = small()
    torch.manual_seed(0)
    network = build_model(recipe)
    attention = next(m for m in network.modules() if isinstance(m, MultiScaleAttention))
    sizes: list[float] = []
    attention.qkv.register_forward_hook(lambda _, __, out: sizes.append(float(out.abs().mean())))
    with torch.no_grad():
        cast(nn.Module, network.image_encoder)(smooth_image(256))
        attention.qkv.conv.weight.mul_(100.0 / sizes[0])
    attention.qkv._forward_hooks.clear()
    contract = encoder_contract(recipe.geometry)
    encoder = graph_modules(network, recipe)[0]
    path = tmp_path_factory.mktemp("efficientvit") / "encoder.onnx"
    graphs.save(export_stage._export(encoder, export_stage._examples(contract), contract, None, recipe), path, {})
    return path


def test_attention_kept_in_fp32_stays_finite_where_fp16_overflows(loud: Path, tmp_path: Path) -> None:
    feeds = graphs.example_feeds(graphs.load(loud), seed=1)
    errors = {}
    for label, rules in (("recipe", small().fp16), ("none", PrecisionRules())):
        half = convert_to_fp16(loud, rules, tmp_path / f"{label}.onnx")
        errors[label] = graphs.disagreement(loud, emulate_fp16(half.output, tmp_path / "emulated.onnx"), feeds)
    assert errors["recipe"] < 0.02
    assert errors["none"] == float("inf")


def test_attention_products_are_never_int8(loud: Path) -> None:
    model = graphs.load(loud)
    allowed, refused = eligible(model, replace(small().int8, attention=True))
    products = [n.name for n in model.graph.node if n.op_type == "MatMul"]
    assert len(products) == 2
    assert all("recipe keeps" in refused[name] for name in products)
    assert {*products} <= {*eligible(model, Int8Rules(attention=True))[0]}
    assert len(allowed) > 10


def test_one_node_stands_for_a_gelu_and_for_a_norm(loud: Path) -> None:
    """Written out, x cubed and x squared leave FP16 long before x does."""
    operators = [n.op_type for n in graphs.load(loud).graph.node]
    assert not {"Pow", "Tanh", "Erf", "Sqrt", "ReduceMean"} & {*operators}
    assert operators.count("LayerNormalization") == 1
    assert operators.count("Gelu") > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [1, 1, 1, 4]}, "must have one entry per stage"),
        ({"blocks": ["res", "mbconv", "fmb", "mb", "att"]}, "blocks must be of res, fmb, mb, att, got 'mbconv'"),
        ({"neck": 3}, "does not know neck"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    base = small()
    with pytest.raises(RecipeError, match=message):
        build_model(replace(base, options={**base.options, **options}))
