"""Twelve small photographs, and a student that fits the tiny teacher."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


HOLD = """
import sys
from pathlib import Path
from edgesam_deploy.files import locked
with locked(Path(sys.argv[1]), sys.exit):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holding() -> Callable[[Path], AbstractContextManager[None]]:
    """(folder) -> while within, another process holds its lock."""

    @contextmanager
    def hold(folder: Path) -> Iterator[None]:
        command = [sys.executable, "-c", HOLD, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield
            process.stdin.close()

    return hold
