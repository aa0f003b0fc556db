"""Twelve small photographs, and a student that fits the tiny teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

PHOTOS = Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos"
COUNT = 12


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number, path in enumerate(sorted(PHOTOS.glob("*/*.jpg"))[:COUNT]):
        image = Image.open(path).convert("RGB")
        image.resize((160, 112) if number % 2 else (96, 128)).save(folder / f"{path.parent.name}-{path.name}")
    assert len(list(folder.iterdir())) == COUNT
    return folder


@pytest.fixture(scope="session")
def student_recipe(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tiny_recipe.read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("student") / "small.toml"
    changed = text.replace('name = "tiny"', 'name = "small"').replace("hgnetv2_b0", "mobilenetv4_conv_small")
    assert changed.count("small") == 2 + text.count("small")
    path.write_text(changed, encoding="utf-8")
    return path
