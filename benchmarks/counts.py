"""Count the parameters and multiply-adds of every shipped recipe's network. Needs no weights and no GPU.

    python benchmarks/counts.py [--recipes mobile_sam sam_vit_b]

Writes edgesam_deploy/assets/counts.json, which `sam-export models` reads; recipes that are not named keep their entry.
Run it after a change of a network or of the sizes in a recipe. Nothing is computed: networks lie on PyTorch's meta
device, which knows shapes only, so that SAM ViT-H takes no memory either; those that cannot are made and run on shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgesam_deploy.contract import POINTS_AXIS, PROMPTS_AXIS, GraphContract, TensorSpec, contracts
from edgesam_deploy.counts import COUNTS, Counts, network_key
from edgesam_deploy.files import write_json
from edgesam_deploy.models import build_model, graph_modules
from edgesam_deploy.recipe import Recipe, available_recipes, load_recipe

# One prompt, of two points: a click and SAM's padding point, or a box.
AXES = {PROMPTS_AXIS: 1, POINTS_AXIS: 2}


def count(recipe: Recipe) -> Counts:
    """What a recipe's network takes, from the modules that are exported."""
    try:
        return _count(recipe, torch.device("meta"))
    except (RuntimeError, NotImplementedError):
        # Its builder or its modules compute with numbers: made for real, then run on shapes.
        return _count(recipe, torch.device("cpu"))


def _count(recipe: Recipe, device: torch.device) -> Counts:
    with device:
        model: Any = build_model(recipe).to(device)
    encoder, decoder = graph_modules(model, recipe)
    graphs = contracts(recipe.geometry)
    encoder_params = sum(p.numel() for p in model.image_encoder.parameters())
    return Counts(
        encoder_params=encoder_params,
        decoder_params=sum(p.numel() for p in model.parameters()) - encoder_params,
        encoder_macs=_macs(encoder.to(device), graphs["encoder"], device),
        decoder_macs=_macs(decoder.to(device), graphs["decoder"], device),
    )


def _macs(module: nn.Module, contract: GraphContract, device: torch.device) -> int:
    """Multiply-adds of one run: PyTorch's operation count halved, as it counts a multiply-add as two."""
    counter = FlopCounterMode(display=False)
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True) if device.type == "cpu" else contextlib.nullcontext()
    # Fused attention would pass uncounted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), shapes_only, counter:
        module(*(_zeros(spec, device) for spec in contract.inputs))
    return counter.get_total_flops() // 2


def _zeros(spec: TensorSpec, device: torch.device) -> Tensor:
    shape = [AXES[side] if isinstance(side, str) else side for side in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=available_recipes())
    names = parser.parse_args().recipes
    models = json.loads(COUNTS.read_text(encoding="utf-8"))["models"] if COUNTS.is_file() else {}
    for name in names:
        recipe = load_recipe(name)
        counted = count(recipe)
        models[name] = {"network": network_key(recipe), **dataclasses.asdict(counted)}
        print(f"{name}: {counted.params_m:.2f} M parameters, {counted.macs_g:.2f} G multiply-adds")
    kept = {name: entry for name, entry in sorted(models.items()) if name in available_recipes()}
    write_json(COUNTS, {"torch": torch.__version__.partition("+")[0], "models": kept})


if __name__ == "__main__":
    main()
