"""A tiny real model for every test that needs one: trained weights at a quarter of the deployed size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PHOTOS = REPOSITORY / "edgesam_deploy" / "assets" / "photos"
TINY_SIZE = 128
WEIGHTS = REPOSITORY / "tests" / "data" / "tiny.pt"
WEIGHTS_SHA256 = "8193398c055161921119e06fd690c6b93b0c6818100341646406834171818ce3"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that it is not what the other processes wait for at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def tiny_recipe_text() -> str:
    """The reference recipe with image_size 128, a sixteenth of the work, and with weights of the tests' own: those with
    an HGNetV2-B0 encoder that were shipped first. What tests say of a network then holds when the shipped one changes.
    """
    text = (REPOSITORY / "export" / "reference.toml").read_text(encoding="utf-8")
    own = {"backbone": '"hgnetv2_b0"', "file": f'"{WEIGHTS}"', "sha256": f'"{WEIGHTS_SHA256}"', "name": '"tiny"'}
    sizes = {"image_size": TINY_SIZE, "prompt_size": TINY_SIZE, "embedding_size": TINY_SIZE // 16}
    for name, value in {**own, **sizes}.items():
        before = next(line for line in text.splitlines() if line.startswith(f"{name} ="))
        text = text.replace(before, f"{name} = {value}")
    # Without its INT8 rules: they name layers of another network, and tests make their own.
    return "\n\n".join(part for part in text.split("\n\n") if "[precision.int8]" not in part)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TOML of the tiny model."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(tiny_recipe_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The tiny model's weights."""
    return WEIGHTS


@pytest.fixture(scope="session")
def built(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny model built to INT8 once: ``bundle`` (folder), ``stages`` (folder of stage results), ``result``."""
    pytest.importorskip("torch", reason="building needs the export extra")
    from edgesam_deploy.recipe import load_recipe
    from edgesam_deploy.stages.build import BuildOptions, build
    from edgesam_deploy.target import load_target

    output = tmp_path_factory.mktemp("engines") / "tiny-int8"
    result = build(BuildOptions(load_recipe(tiny_recipe), load_target("cpu"), "int8", output, backend="onnxruntime"))
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    return SimpleNamespace(
        bundle=output, stages=output.parent / ".stages" / output.name, result=result, manifest=manifest
    )


@pytest.fixture(scope="session")
def both_ranges(
    built: SimpleNamespace, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """Calibrated ranges of both graphs of the tiny model; its build needs, and has, the encoder's alone."""
    from edgesam_deploy.images import list_images
    from edgesam_deploy.recipe import Int8Rules, load_recipe
    from edgesam_deploy.stages.calibrate import calibrate

    sources = {name: built.stages / f"simplify-{name}" / f"{name}.onnx" for name in ("encoder", "decoder")}
    output = tmp_path_factory.mktemp("ranges") / "ranges.json"
    return dict(calibrate(sources, list_images(PHOTOS / "calibration"), load_recipe(tiny_recipe), Int8Rules(), output))
