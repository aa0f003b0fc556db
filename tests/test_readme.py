"""Every command and code block of the README is run; its figures are those of the result files."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.strip()
]
SEARCHES = [
    line.partition("#")[0].strip()
    for language, block in BLOCKS
    if language == "text"
    for line in block.splitlines()
    if re.match(r"sam-export (search|build .*--search)", line)
]
TRAININGS = [
    line.partition("#")[0].strip()
    for language, block in BLOCKS
    if language == "text"
    for line in block.splitlines()
    if line.startswith(("sam-export distill", "sam-export finetune"))
]
PHOTO = ROOT / "edgesam_deploy" / "assets" / "photos" / "verify" / "duck.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's commands run, one after the other: a photograph and a MobileSAM checkpoint lie there.

    In place of COCO val2017 the photograph, and a square on it.
    """
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from edgesam_deploy.images import read_image
    from edgesam_deploy.models import build_model
    from edgesam_deploy.recipe import load_recipe

    place = tmp_path_factory.mktemp("readme")
    shutil.copyfile(PHOTO, place / "photo.jpg")
    torch.manual_seed(0)
    torch.save(build_model(load_recipe("mobile_sam")).state_dict(), place / "mobile_sam.pt")
    (place / "val2017").mkdir()
    shutil.copyfile(PHOTO, place / "val2017" / "000000000001.jpg")
    (place / "instances_val2017.json").write_text(json.dumps(_instances(read_image(PHOTO).shape[:2])), encoding="utf-8")
    return place


def _instances(hw: tuple[int, ...], number: int = 1) -> dict[str, list[dict[str, object]]]:
    image = {"id": number, "file_name": f"{number:012d}.jpg", "height": hw[0], "width": hw[1]}
    square = [100.0, 100.0, 300.0, 100.0, 300.0, 300.0, 100.0, 300.0]
    annotation = {"id": number, "image_id": number, "iscrowd": 0, "area": 4e4, "bbox": [100, 100, 200, 200]}
    return {"images": [image], "annotations": [{**annotation, "segmentation": [square]}]}


def test_the_readme_has_its_commands() -> None:
    assert {"make demo", "make test", 'pip install ".[cpu]"'} <= set(COMMANDS)
    assert sum(c.startswith("sam-export") for c in COMMANDS) >= 12
    assert len(SEARCHES) == 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("sam-export")])
def test_command_runs(command: str, folder: Path) -> None:
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "edgesam_deploy", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", SEARCHES)
def test_search_runs_on_a_tiny_model(
    command: str, tiny_recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the README has it but for the model, the budget and how much is measured: minutes become seconds."""
    from click.testing import CliRunner

    from edgesam_deploy.cli import main
    from edgesam_deploy.stages import sensitivity

    short = functools.partial(sensitivity.TuneOptions, images=1, max_evaluations=8, share=0.4, runs=1)
    monkeypatch.setattr(sensitivity, "TuneOptions", short)
    words = shlex.split(command)[1:]
    words[words.index("--min-iou") + 1] = "0.9"
    output = folder / words[0]
    result = CliRunner().invoke(main, [words[0], str(tiny_recipe), *words[1:], "-o", str(output)])
    # A search may also answer that INT8 does not pay, or not enough, on a model this small.
    assert result.exit_code in (0, 3), result.output
    assert "Traceback" not in result.output
    assert re.search(r"mask IoU|keep fp", result.output)


def test_trainings_run_on_tiny_models(
    tiny_recipe: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the README has them, one from the other's result, but for student, teacher and images."""
    import tarfile

    import timm
    from click.testing import CliRunner
    from safetensors.torch import save_file

    from edgesam_deploy.cli import main
    from edgesam_deploy.images import read_image

    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "train2017"):
        Path(folder).mkdir()
        for number in range(3):
            shutil.copyfile(PHOTO, Path(folder) / f"{number:012d}.jpg")
    with tarfile.open("sa_000000.tar", "w") as archive:
        archive.add(PHOTO, PHOTO.name)
    parts = [_instances(read_image(PHOTO).shape[:2], number) for number in range(3)]
    together = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    Path("instances_train2017.json").write_text(json.dumps(together), encoding="utf-8")
    backbone = timm.create_model("hgnetv2_b0", pretrained=False)  # tiny_recipe's
    save_file(backbone.state_dict(), "model.safetensors")
    for command, name in zip(TRAININGS, ("distill", "finetune"), strict=True):
        words = [str(tiny_recipe) if w in ("student_resnet18", "mobile_sam") else w for w in shlex.split(command)[1:]]
        assert (words[0], words.count(str(tiny_recipe))) == (name, 2 if name == "distill" else 1)
        own = ["--checkpoint", str(checkpoint)] if name == "distill" else ["--held", "1"]
        result = CliRunner().invoke(main, [*words, *own, "--epochs", "1", "--batch", "1", "--prompts", "2"])
        assert result.exit_code == 0, result.output
        output = words[words.index("-o") + 1]
        assert f"build it: sam-export build {tiny_recipe} --checkpoint {output}/student.pt" in result.output
        assert Path(output, "student.pt").is_file()


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_block_runs(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_expand(target: str) -> None:
    """The recipes themselves run in continuous integration; here make resolves every step of them."""
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""}
    )
    assert done.returncode == 0, done.stderr
    assert ("sam-export build" if target == "demo" else "-m pytest") in done.stdout


def test_figures_are_those_of_the_result_files() -> None:
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"`(benchmarks/[^`]+\.(?:json|png|py))`", TEXT):
        assert (ROOT / name).is_file(), name
