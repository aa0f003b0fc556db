"""The committed counts of networks: complete, of the present networks, and what their authors count."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgesam_deploy.contract import GraphContract, TensorSpec
from edgesam_deploy.counts import counts_of, network_key
from edgesam_deploy.recipe import available_recipes, load_recipe

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "counts.py"


@pytest.mark.parametrize("name", available_recipes())
def test_every_shipped_network_is_counted(name: str) -> None:
    """A network or a size that changed without a new count is caught here."""
    counts = counts_of(load_recipe(name))
    assert counts is not None, f"run: python benchmarks/counts.py --recipes {name}"
    assert counts.encoder_macs > counts.encoder_params > 0
    assert counts.decoder_macs > counts.decoder_params > 0


def test_counts_belong_to_a_network_not_to_a_name(tiny_recipe: Path) -> None:
    assert counts_of(load_recipe(tiny_recipe)) is None, "128 pixels are not 512"
    recipe = load_recipe("reference")
    assert counts_of(replace(recipe, name="mine")) == counts_of(recipe)
    for other in (
        replace(recipe, options={"backbone": "resnet18"}),
        replace(recipe, geometry=replace(recipe.geometry, image_size=1024)),
        replace(recipe, geometry=replace(recipe.geometry, mask_input=False)),
    ):
        assert network_key(other) != network_key(recipe)


# Parameters (10⁶) and multiply-adds (10⁹) as printed by others, with attention counted: TinySAM's README for SAM,
# EdgeSAM's and EfficientViT-SAM's own; parameters of SAM by SlimSAM and EdgeSAM.
PRINTED = {
    "sam_vit_b": (93, 487),
    "sam_vit_l": (312, 1491),
    "sam_vit_h": (641.1, 2976),
    "edge_sam": (9.6, 22.1),
    "efficientvit_sam_l0": (34.8, 35),
    "efficientvit_sam_l1": (47.7, 49),
    "efficientvit_sam_l2": (61.3, 69),
    "efficientvit_sam_xl0": (117.0, 185),
    "efficientvit_sam_xl1": (203.3, 322),
}


@pytest.mark.parametrize("name", PRINTED)
def test_counts_are_those_in_print(name: str) -> None:
    counts = counts_of(load_recipe(name))
    assert counts is not None
    params_m, macs_g = PRINTED[name]
    # EfficientViT-SAM's figure is the encoder's.
    ours = counts.encoder_macs / 1e9 if name.startswith("efficientvit") else counts.macs_g
    assert counts.params_m == pytest.approx(params_m, rel=0.01)
    assert ours == pytest.approx(macs_g, rel=0.015)


@pytest.fixture(scope="module")
def script() -> Any:
    """benchmarks/counts.py as a module."""
    pytest.importorskip("torch", reason="counting needs the export extra")
    spec = importlib.util.spec_from_file_location("counts_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_counts_what_is_committed(script: Any) -> None:
    recipe = load_recipe("reference")
    assert script.count(recipe) == counts_of(recipe)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_counter_agrees_with_counting_by_hand(script: Any, device: str) -> None:
    import torch

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    image = GraphContract((TensorSpec("image", "float32", (1, 3, 512, 512)),), ())
    convolution = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1).to(device)
    assert script._macs(convolution, image, torch.device(device)) == 256 * 256 * 16 * 3 * 9
    tokens = GraphContract((TensorSpec("x", "float32", (1, 2, 64, 16)),), ())
    # Two heads; queries by keys, then by values.
    assert script._macs(Attention(), tokens, torch.device(device)) == 2 * 2 * 64 * 64 * 16
