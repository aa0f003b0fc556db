"""segment-anything's SamPredictor beside ours: the same weights in both, 20 images of every odd kind.

    python benchmarks/sam_predictor.py [--output benchmarks/results/cpu/sam-predictor.json]

Theirs runs PyTorch from the decoded array, ours the exported FP32 graphs on ONNX Runtime from the file. The images are
the shipped photographs, re-made as 1x900, 1500x2250, portrait with EXIF rotation, grey, RGBA, CMYK, 16-bit and so on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from segment_anything import SamPredictor

from edgesam_deploy.bundle import load_bundle
from edgesam_deploy.files import write_json
from edgesam_deploy.images import read_image
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.measure.accuracy import default_prompts
from edgesam_deploy.models.checkpoint import checkpoint_path, load_model
from edgesam_deploy.recipe import PACKAGE, load_recipe
from edgesam_deploy.stages.build import BuildOptions, build
from edgesam_deploy.stages.cache import tool_versions
from edgesam_deploy.target import load_target

PHOTOS = PACKAGE / "assets" / "photos"


def make_images(folder: Path) -> list[Path]:
    """Write the 20 files: the ten verification photographs as they are, and ten odd ones made from them."""
    paths = []
    for path in sorted((PHOTOS / "verify").glob("*.jpg")):
        paths.append(folder / path.name)
        paths[-1].write_bytes(path.read_bytes())
    source = Image.open(PHOTOS / "verify" / "coffee.jpg").convert("RGB")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: rotate by 270 degrees
    grey16 = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    alpha = Image.fromarray(np.full((source.height, source.width), 128, dtype=np.uint8))
    rgba = source.copy()
    rgba.putalpha(alpha)
    odd: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("row-1x900.png", source.resize((900, 1)), {}),
        ("column-900x1.png", source.resize((1, 900)), {}),
        ("large-1500x2250.jpg", source.resize((2250, 1500)), {"quality": 90}),
        ("portrait-exif.jpg", source, {"exif": rotated}),
        ("grey.png", source.convert("L"), {}),
        ("grey16.png", grey16, {}),
        ("rgba.png", rgba, {}),
        ("cmyk.jpg", source.convert("CMYK"), {}),
        ("palette.png", source.convert("P"), {}),
        ("narrow-77x500.png", source.resize((500, 77)), {}),
    ]
    for name, image, options in odd:
        image.save(folder / name, **options)
        paths.append(folder / name)
    return paths


def compare(theirs: SamPredictor, ours: Any, path: Path) -> dict[str, Any]:
    image = read_image(path)
    theirs.set_image(image)
    ours.set_image(image)
    points, boxes = default_prompts(image.shape[:2])
    prompts: list[dict[str, Any]] = [{"point_coords": p[None], "point_labels": np.array([1])} for p in points]
    prompts += [{"box": b} for b in boxes]
    prompts += [{"point_coords": points[:1], "point_labels": np.array([1]), "box": boxes[0]}]
    ious = []
    for prompt in prompts:
        for multimask in (True, False):
            expected, _, _ = theirs.predict(**prompt, multimask_output=multimask)
            got = ours.predict(**prompt, multimask_output=multimask).masks
            ious += [mask_iou(a.astype(bool), b) for a, b in zip(got, expected, strict=True)]
    return {
        "image": path.name,
        "hw": list(image.shape[:2]),
        "masks": len(ious),
        "mean": np.mean(ious),
        "min": min(ious),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/sam-predictor.json"))
    options = parser.parse_args()
    recipe = load_recipe("reference")
    checkpoint = checkpoint_path(recipe)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "reference-fp32"
        build(BuildOptions(recipe, load_target("cpu"), "fp32", bundle))
        images = Path(folder) / "images"
        images.mkdir()
        theirs = SamPredictor(load_model(recipe, checkpoint))
        with load_bundle(bundle).open() as ours:
            rows = [compare(theirs, ours, path) for path in make_images(images)]
    for row in rows:
        height, width = row["hw"]
        print(f"{row['image']:24s} {height:5d}x{width:<5d} masks {row['masks']:3d} mean IoU {row['mean']:.5f}")
    mean = float(np.mean([row["mean"] for row in rows]))
    print(f"{len(rows)} images, mean IoU {mean:.5f}, lowest image {min(r['mean'] for r in rows):.5f}")
    result = {"mean": mean, "images": rows, "checkpoint_sha256": recipe.checkpoint.sha256, "tools": tool_versions()}
    write_json(options.output, {"command": "python benchmarks/sam_predictor.py", **result})


if __name__ == "__main__":
    main()
