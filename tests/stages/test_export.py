"""The exported graphs: contract, agreement with segment-anything's own modules, no trace of the exporting machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.contract import contracts
from edgesam_deploy.errors import GraphError
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import load_recipe
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.export import check_contract


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_graphs_keep_the_contract_and_the_default_domain(built: SimpleNamespace, tiny_recipe: Path, name: str) -> None:
    path = built.stages / "export" / f"{name}.onnx"
    check_contract(path, contracts(load_recipe(tiny_recipe).geometry)[name])
    model = graphs.load(path)
    assert graphs.foreign_nodes(model) == []
    assert model.ir_version <= 10
    assert [o.version for o in model.opset_import] == [19]
    assert "OneHot" not in {n.op_type for n in model.graph.node}


@pytest.mark.parametrize(
    ("prompts", "points", "mask"), [(1, 1, 0.0), (1, 7, 1.0), (5, 2, 0.0), (3, 4, 1.0), (2, 0, 1.0)]
)
def test_decoder_computes_what_segment_anything_computes(
    built: SimpleNamespace, tiny_recipe: Path, checkpoint: Path, prompts: int, points: int, mask: float
) -> None:
    """Any number of prompts and points, with and without a mask, against PromptEncoder and MaskDecoder unchanged."""
    recipe = load_recipe(tiny_recipe)
    geometry = recipe.geometry
    rng = np.random.default_rng(prompts * 10 + points)
    side = geometry.embedding_size
    labels = rng.integers(-1, 2, (prompts, points)).astype(np.float32)
    if points >= 2:
        labels[:, -2:] = (2, 3)
    feeds = {
        "image_embeddings": rng.normal(size=(1, geometry.embedding_channels, side, side)).astype(np.float32),
        "point_coords": (rng.random((prompts, points, 2)) * geometry.prompt_size).astype(np.float32),
        "point_labels": labels,
        "mask_input": rng.normal(size=(prompts, 1, geometry.mask_size, geometry.mask_size)).astype(np.float32) * 5,
        "has_mask_input": np.array([mask], dtype=np.float32),
    }
    reference = reference_predictor(load_model(recipe, checkpoint), recipe).decoder
    with open_session(built.stages / "export" / "decoder.onnx") as session:
        assert graphs.relative_error(reference.run(feeds), session.run(feeds)) <= 1e-4


def test_encoder_pads_as_segment_anything_does(built: SimpleNamespace, tiny_recipe: Path, checkpoint: Path) -> None:
    """uint8 pixels padded with the mean colour give the embedding of ``Sam.preprocess``, which pads with 0."""
    import torch

    recipe = load_recipe(tiny_recipe)
    model = load_model(recipe, checkpoint)
    size = recipe.geometry.image_size
    image = np.random.default_rng(0).integers(0, 60, (1, 3, size // 2, size), dtype=np.uint8)
    with torch.inference_mode():
        expected = model.image_encoder(model.preprocess(torch.from_numpy(image).float())).numpy()
    square = np.empty((1, 3, size, size), dtype=np.uint8)
    square[:] = np.array(recipe.pixels.padding, dtype=np.uint8)[None, :, None, None]
    square[:, :, : size // 2] = image
    with open_session(built.stages / "export" / "encoder.onnx") as session:
        got = session.run({"image": square})["image_embeddings"]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_files_say_where_they_come_from_and_nothing_of_this_machine(built: SimpleNamespace) -> None:
    for path in built.stages.rglob("*.onnx"):
        data = path.read_bytes()
        assert b"stack_trace" not in data
        assert b"site-packages" not in data
        stages = [p.value for p in graphs.load(path).metadata_props if p.key == "stage"]
        assert len(stages) == 1


def test_a_foreign_graph_is_refused_by_name(built: SimpleNamespace, tiny_recipe: Path) -> None:
    with pytest.raises(GraphError, match="breaks the contract"):
        check_contract(
            built.stages / "export" / "decoder.onnx", contracts(load_recipe(tiny_recipe).geometry)["encoder"]
        )
