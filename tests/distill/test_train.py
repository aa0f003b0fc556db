"""The training script on a handful of real photographs: it runs, learns what it says, and saves what can be loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the export extra")
coco_mask = pytest.importorskip("pycocotools.mask", reason="needs the dev extra")

from edgesam_deploy.distill.train import half_precision, parse, train
from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.models import build_model
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import load_recipe

PHOTOS = sorted((Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos" / "verify").glob("*.jpg"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that training reads, filled with small photographs whose regions are their grey levels."""
    root = tmp_path_factory.mktemp("packs")
    for folder in ("bsds500/train", "bsds500/val", "ecssd/train", "coco-subset/images"):
        (root / folder).mkdir(parents=True)
    things: list[dict[str, object]] = []
    images = []
    for index, path in enumerate(PHOTOS):
        image = Image.open(path).convert("RGB").resize((96, 72))
        levels = (np.asarray(image.convert("L")) // 64).astype(np.uint8)
        if index < 4:
            folder = root / "bsds500" / ("train" if index < 2 else "val")
            image.save(folder / f"{index}.jpg")
            Image.fromarray(levels + 1).save(folder / f"{index}.seg0.png")
        elif index < 6:
            image.save(root / "ecssd" / "train" / f"{index}.jpg")
            Image.fromarray((levels > 1).astype(np.uint8) * 255).save(root / "ecssd" / "train" / f"{index}.png")
        else:
            name = f"images/{index}.jpg"
            image.save(root / "coco-subset" / name)
            images.append({"id": index, "file_name": name, "height": 72, "width": 96})
            encoded = coco_mask.encode(np.asfortranarray((levels > 1).astype(np.uint8)))
            segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
            things.append(
                {"id": index, "image_id": index, "area": int((levels > 1).sum()), "iscrowd": 0, "category_id": 1}
                | {"segmentation": segmentation}
            )
    for kind, regions in (("instances", things), ("stuff", [])):
        (root / "coco-subset" / f"{kind}_train.json").write_text(
            json.dumps({"images": images, "annotations": regions}), encoding="utf-8"
        )
    return root


def test_two_steps_give_a_loadable_float16_checkpoint(packs: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.pt"
    arguments = ["--data", packs, "--init", checkpoint, "--output", output, "--size", 64, "--images", 1]
    arguments += ["--prompts", 4, "--steps", 2, "--threads", 1, "--every", 1, "--lr", 1e-3, "--warmup", 1]
    command = [sys.executable, "-m", "edgesam_deploy.distill.train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    state = torch.load(output, weights_only=True)
    before = torch.load(checkpoint, weights_only=True)
    assert all(v.dtype == torch.float16 and torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    assert any(not torch.equal(state[k], before[k]) for k in state if k.startswith("image_encoder"))
    assert all(v.min() >= 0.05 for k, v in state.items() if k.endswith("lab.scale"))
    load_model(load_recipe("reference"), output)
    assert len(output.with_suffix(".csv").read_text(encoding="utf-8").splitlines()) == 3


def test_a_variance_that_float16_cannot_hold_is_rescaled_without_changing_the_network() -> None:
    model = build_model(load_recipe("reference"))
    norm = model.image_encoder.fuse[1]
    norm.running_var.fill_(1e6)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model.image_encoder(image)
        weights = half_precision(model)
        after = model.image_encoder(image)
    assert weights["image_encoder.fuse.1.running_var"].max() < 65504
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_infinity_is_refused(tmp_path: Path) -> None:
    """What such a rescaling prevents: a network that loads, runs, and ignores the image."""
    recipe = load_recipe("reference")
    state = build_model(recipe).state_dict()
    state["image_encoder.fuse.1.running_var"] = torch.full((256,), 1e6).half()
    torch.save(state, tmp_path / "inf.pt")
    with pytest.raises(CheckpointError, match=r"inf or NaN, the first is image_encoder\.fuse\.1\.running_var"):
        load_model(recipe, tmp_path / "inf.pt")


def test_missing_packs_and_bad_options_are_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="'bsds500'"):
        train(parse(["--data", str(tmp_path), "--init", str(checkpoint), "--output", str(tmp_path / "o.pt")]))
    with pytest.raises(InputError, match="--steps must be positive"):
        parse(["--data", ".", "--init", "a", "--output", "b", "--steps", "0"])
