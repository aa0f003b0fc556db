"""A transformer's residual stream in INT8 collapses; our rules leave it in float. SAM's own ViT blocks, few and thin.

Trained vision transformers hold, in a few fixed channels of a few tokens, activations hundreds of times larger than the
rest, which act as biases (Sun et al. 2024, "Massive Activations in Large Language Models", section 5). Random weights
have none, so the position embedding puts them there: every Add of the stream then carries them on to the next block.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx", reason="needs the export extra")
torch = pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.contract import IMAGE, IMAGE_EMBEDDINGS, encoder_contract
from edgesam_deploy.images import list_images, read_image
from edgesam_deploy.models import build_model, graph_modules
from edgesam_deploy.recipe import Int8Rules, PrecisionRules, Recipe, load_recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import export as module
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.calibrate import Ranges, calibrate
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.typed import Typing, type_graph
from edgesam_deploy.target import load_target
from edgesam_deploy.transforms import to_encoder_input

from ..conftest import PHOTOS

SIZE, SIDE, WIDTH, DEPTH = 256, 16, 192, 3
CHANNELS, TOKENS = 3, 3
SEEDS = (0, 1, 2)
# Times the median |x| of the stream; in trained ones, 100 to 1000.
MASSIVE = 500.0


def small_vit(seed: int) -> tuple[Recipe, torch.nn.Module]:
    """SAM's ViT with heads of 64 channels, windows of 14, relative positions, the last block global; random weights."""
    base = load_recipe("sam_vit_b")
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": WIDTH // 64, "global_attn_indexes": [DEPTH - 1]}
    geometry = dataclasses.replace(base.geometry, image_size=SIZE, prompt_size=SIZE, embedding_size=SIDE)
    recipe = dataclasses.replace(base, options=sizes, geometry=geometry)
    torch.manual_seed(seed)
    model = build_model(recipe)
    encoder = model.image_encoder
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.rel_pos_h.normal_(0, 0.02)
            block.attn.rel_pos_w.normal_(0, 0.02)
        encoder.pos_embed.normal_(0, 0.2)
        channels, tokens = torch.randperm(WIDTH)[:CHANNELS], torch.randperm(SIDE * SIDE)[:TOKENS]
        signs = torch.tensor([1.0, -0.7, 0.5])
        stream = encoder.patch_embed(torch.randn(1, 3, SIZE, SIZE)) + encoder.pos_embed
        for block in encoder.blocks:
            stream = block(stream)
        planted = MASSIVE * stream.abs().median() * signs
        encoder.pos_embed.view(SIDE * SIDE, WIDTH)[tokens[:, None], channels] = planted
    return recipe, model


@pytest.fixture(scope="module", params=SEEDS)
def vit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """recipe, graph (simplified FP32), ranges (of every tensor that any rules may quantize), answers (in FP32)."""
    folder = tmp_path_factory.mktemp("vit")
    recipe, model = small_vit(request.param)
    contract = encoder_contract(recipe.geometry)
    examples = module._examples(contract)
    graphs.save(
        module._export(graph_modules(model, recipe)[0], examples, contract, None, recipe), folder / "e.onnx", {}
    )
    graph = simplify(folder / "e.onnx", folder / "encoder.onnx").output
    images = list_images(PHOTOS / "calibration")[:6]
    every = dataclasses.replace(rules_of(recipe), residual_add="all", keep=())
    ranges = calibrate({"encoder": graph}, images, recipe, every, folder / "ranges.json")["encoder"]
    return SimpleNamespace(recipe=recipe, graph=graph, ranges=ranges, answers=embeddings(graph, recipe))


def rules_of(recipe: Recipe) -> Int8Rules:
    """What a build for the CPU quantizes by."""
    return load_target("cpu").rules_for(recipe)


def embeddings(graph: Path, recipe: Recipe) -> npt.NDArray[np.float32]:
    """(images, tokens, channels) of photographs that calibration did not see."""
    images = [read_image(path) for path in list_images(PHOTOS / "verify")[:3]]
    with open_session(graph) as session:
        outputs = [
            session.run({IMAGE: to_encoder_input(image, SIZE, recipe.pixels.padding)})[IMAGE_EMBEDDINGS]
            for image in images
        ]
    return np.concatenate(outputs).reshape(len(images), -1, SIDE * SIDE).transpose(0, 2, 1)


def likeness(expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> tuple[float, float]:
    """(mean cosine of a token's embedding, mean IoU of masks: where a random vector answers above its median)."""
    norms = np.linalg.norm(expected, axis=2) * np.linalg.norm(got, axis=2)
    cosine = float(((expected * got).sum(axis=2) / np.maximum(norms, 1e-12)).mean())
    vectors = np.random.default_rng(0).normal(size=(expected.shape[2], 16))
    threshold = np.median(expected @ vectors, axis=1, keepdims=True)
    first, second = expected @ vectors > threshold, got @ vectors > threshold
    return cosine, float(((first & second).sum(axis=1) / (first | second).sum(axis=1)).mean())


def typed(vit: SimpleNamespace, rules: Int8Rules, folder: Path) -> tuple[float, float]:
    ranges: Ranges = vit.ranges
    how = Typing("tensorrt", "fp32")
    result = type_graph(vit.graph, ranges, PrecisionRules(), rules, how, folder / "typed.onnx")
    assert len(result.int8) >= 4 * DEPTH, "four products with weights a block"
    return likeness(vit.answers, embeddings(result.output, vit.recipe))


def test_the_stream_is_massive(vit: SimpleNamespace) -> None:
    """In the stream after every block, in few places only; what a norm hands on is of ordinary size."""
    nodes = graphs.load(vit.graph).graph.node
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    largest = {node.name: (vit.ranges.absmax[node.input[0]], vit.ranges.absmax[node.output[0]]) for node in norms}
    for name, (before, after) in largest.items():
        if "blocks" in name:
            assert before > 10
            assert after < WIDTH**0.5 + 1e-3


def test_quantizing_the_stream_collapses_and_our_rules_do_not(vit: SimpleNamespace, tmp_path: Path) -> None:
    ours = rules_of(vit.recipe)
    cosine, mask_iou = typed(vit, ours, tmp_path)
    assert cosine >= 0.999
    assert mask_iou >= 0.95
    cosine, mask_iou = typed(vit, dataclasses.replace(ours, residual_add="all"), tmp_path)
    assert cosine < 0.75
    assert mask_iou < 0.7


def test_a_convolution_that_reads_the_stream_collapses_too(vit: SimpleNamespace, tmp_path: Path) -> None:
    """The neck's first one: no norm stands before it. The recipe keeps it in float."""
    rules = rules_of(vit.recipe)
    assert any("neck" in pattern for pattern in rules.keep)
    cosine, _ = typed(vit, dataclasses.replace(rules, keep=()), tmp_path)
    assert cosine < 0.95
