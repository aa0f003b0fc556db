"""Try the fitted efficiency on published latencies that it was not fitted to, and keep the errors beside the fit.

    python benchmarks/estimate_try.py [--graphs DIR]

Adds the rows to edgesam_deploy/assets/efficiency.json, from which `sam-export estimate` takes its range. Image encoders
of NanoSAM (FP16) and MobileSAM (built as FP32, TF32 allowed) on AGX Orin; four classifiers at 224 pixels in FP16 on
Orin Nano, whose clock mode is not told: taken for the highest (Super). All at batch 1, with initial weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from estimate_fit import typed, work

from edgesam_deploy.files import write_json
from edgesam_deploy.measure.efficiency import FILE, Row, load_fit
from edgesam_deploy.measure.roofline import price
from edgesam_deploy.recipe import Int8Rules, PrecisionRules
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.simplify import simplify
from edgesam_deploy.stages.skeleton import type_without_ranges
from edgesam_deploy.target import load_target

NANOSAM = "github.com/NVIDIA-AI-IOT/nanosam, README, Performance"
ONNXSIM = "github.com/onnxsim/onnxsim/pull/1742: TensorRT 10.3, JetPack 6, Orin Nano 8GB"
AGX, NANO = "agx-orin-64gb", "orin-nano-8gb"
# name, target, precision, measured ms, source
PUBLISHED = (
    ("nanosam_resnet18", AGX, "fp16", 4.2, NANOSAM),
    ("mobile_sam", AGX, "fp32", 35.0, NANOSAM),
    ("resnet18", NANO, "fp16", 0.758, ONNXSIM),
    ("resnet50", NANO, "fp16", 1.814, ONNXSIM),
    ("mobilenetv2_100", NANO, "fp16", 0.850, ONNXSIM),
    ("vit_base_patch16_224", NANO, "fp16", 5.59, ONNXSIM),
)
CLASSIFIERS = ("resnet18", "resnet50", "mobilenetv2_100", "vit_base_patch16_224")
IMAGE = (1, 3, 224, 224)


def classifier(name: str, folder: Path) -> Path:
    """A timm classifier as a simplified FP16 graph with initial weights, kept in ``folder``."""
    own = folder / name
    kept = own / "fp16.onnx"
    if not kept.is_file():
        own.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False).eval()
        program = torch.onnx.export(
            model, (torch.zeros(IMAGE),), dynamo=True, opset_version=19, input_names=["image"], verbose=False
        )
        if program is None:
            raise RuntimeError(f"PyTorch exported nothing for {name}")
        graphs.save(program.model_proto, own / "exported.onnx", {})
        simplify(own / "exported.onnx", own / "fp32.onnx")
        type_without_ranges(own / "fp32.onnx", PrecisionRules(), Int8Rules(), "fp16", kept, ())
    return kept


def encoder(name: str, target: str, precision: str, folder: Path) -> Path:
    return typed(name, target, precision, folder)["encoder"]


def row(name: str, target: str, precision: str, measured_ms: float, source: str, folder: Path) -> Row:
    device = load_target(target).devices[0]
    make: Callable[[], Path] = (
        (lambda: classifier(name, folder)) if name in CLASSIFIERS else lambda: encoder(name, target, precision, folder)
    )
    ms = price(work([make()]), device, load_fit().efficiency).ms
    return Row(name, device.name, precision, measured_ms, ms, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=Path, default=Path("engines/.estimate"))
    arguments = parser.parse_args()
    rows = [row(*entry, arguments.graphs) for entry in PUBLISHED]
    for one in rows:
        print(f"{one.name} on {one.device}, {one.precision}: published {one.measured_ms} ms, model {one.model_ms:.2f} "
              f"({one.error:+.0%})")  # fmt: skip
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    write_json(FILE, {**raw, "tried": [dataclasses.asdict(one) for one in rows]})
    fit = load_fit()
    print(f"median error {fit.median_error:.0%}; nine of ten within a factor of {fit.factor:.2f}")


if __name__ == "__main__":
    main()
