"""SAM 2's two graphs as ONNX: what they answer, and what they must not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from edgesam_deploy.models import build_model, reference_predictor
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.recipe import Recipe, load_recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.export import export_model

from .deterministic_weights import deterministic_state
from .sam_parity import PHOTO
from .upstream_error import error

TOLERANCE = 2e-5


def thin() -> Recipe:
    """Every kind of block, few and narrow: windows that do and do not divide the image, global attention, pooling."""
    recipe = load_recipe("sam2.1_hiera_tiny")
    narrow = {"embed_dim": 16, "stages": [1, 1, 2, 1], "global_att_blocks": [3]}
    geometry = replace(
        recipe.geometry,
        image_size=128,
        prompt_size=128,
        embedding_size=8,
        embedding_channels=32,
        high_res_channels=(4, 8),
    )
    return replace(recipe, options={**recipe.options, **narrow}, geometry=geometry)


def test_exported_graphs_answer_as_the_reference(tmp_path: Path) -> None:
    recipe = thin()
    network = build_model(recipe)
    network.load_state_dict(deterministic_state(network.state_dict()))
    for name, proto in export_model(network, recipe).items():
        graphs.save(proto, tmp_path / f"{name}.onnx", {})
    photo = np.asarray(Image.open(PHOTO).convert("RGB"))
    reference = reference_predictor(network, recipe)
    with open_session(tmp_path / "encoder.onnx") as encoder, open_session(tmp_path / "decoder.onnx") as decoder:
        deployed = Predictor(encoder, decoder, recipe.geometry, recipe.pixels)
        for predictor in (reference, deployed):
            predictor.set_image(photo)
        height, width = photo.shape[:2]
        boxes = np.array([[0.1, 0.2, 0.6, 0.8], [0.3, 0.3, 0.9, 0.7]]) * [width, height, width, height]
        prompts = check_prompts(boxes[:, None, :2] + 9.0, [[1], [0]], boxes, (height, width))
        for ours, theirs in zip(deployed.decode(prompts), reference.decode(prompts), strict=True):
            assert error(ours, theirs) < TOLERANCE

    graph = onnx.load(tmp_path / "encoder.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert not {"Pow", "Sqrt", "ReduceMean"} & {*operators}, "a norm is written out"
    assert operators.count("LayerNormalization") == 10
    assert operators.count("Resize") == 1, "the neck's; positions are a constant"
    # The backbone's convolution and the neck's four: conv_s0 and conv_s1 are merged with it.
    assert operators.count("Conv") == 5
    assert not graphs.foreign_nodes(onnx.load(tmp_path / "decoder.onnx"))
