"""``sam-export eval``: what it prints, what it leaves in a folder, its exit codes and its one-line errors."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

pytest.importorskip("scipy", reason="needs the eval extra")
pytest.importorskip("pycocotools", reason="needs the eval extra")

from edgesam_deploy.bundle import shipped_bundle
from edgesam_deploy.cli import main

from .. import made_up_datasets as made

BUNDLE = str(shipped_bundle())


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, ["eval", *map(str, words)], prog_name="sam-export")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"coco:{made.coco(tmp_path_factory.mktemp('pack'))}"


@pytest.fixture(scope="module")
def done(coco: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run with everything: its folder and its answer on stdout."""
    folder = tmp_path_factory.mktemp("eval") / "out"
    result = run(BUNDLE, "--dataset", coco, "--prompts", "box,click", "--baselines", "-o", folder, "--json")
    assert result.exit_code == 0, result.output
    return SimpleNamespace(folder=folder, answer=json.loads(result.stdout), stderr=result.stderr)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of(answer: dict[str, Any], prompt: str, name: str) -> dict[str, Any]:
    (found,) = (q for q in answer["truth"] if (q["prompt"], q["answer"]) == (prompt, name))
    return dict(found)


def test_the_folder_holds_the_answer_every_mask_and_a_picture(done: SimpleNamespace) -> None:
    assert sorted(p.name for p in done.folder.iterdir()) == ["eval.json", "images.csv", "masks.csv", "worst.png"]
    written = json.loads((done.folder / "eval.json").read_text())
    assert [case["image"] for case in written.pop("worst.png")] != []
    assert written == done.answer
    masks = rows(done.folder / "masks.csv")
    assert len(masks) == 3 * 6
    for quality in done.answer["truth"]:
        mine = [r for r in masks if (r["prompt"], r["answer"]) == (quality["prompt"], quality["answer"])]
        assert quality["count"] == len(mine) == 3
        assert quality["miou"] == pytest.approx(np.mean([float(r["iou"]) for r in mine]))
        assert quality["boundary_f"] == pytest.approx(np.mean([float(r["boundary_f"]) for r in mine]))
    images = rows(done.folder / "images.csv")
    assert [(r["image"], r["targets"], r["width"], r["height"]) for r in images] == [
        ("images/1.jpg", "2", "90", "60"),
        ("images/2.jpg", "1", "90", "60"),
    ]
    total = sum(float(r["box, single"]) * int(r["targets"]) for r in images) / 3
    assert total == pytest.approx(of(done.answer, "box", "single")["miou"])
    with Image.open(done.folder / "worst.png") as picture:
        assert picture.width > 1000
    assert "wrote" in done.stderr


def test_the_origin_names_what_the_numbers_are_of(done: SimpleNamespace) -> None:
    origin = done.answer["origin"]
    manifest = json.loads((shipped_bundle() / "manifest.json").read_text())
    assert origin["model"]["files"]["encoder.onnx"] == manifest["files"]["encoder.onnx"]["sha256"]
    assert origin["model"]["checkpoint_sha256"] == manifest["checkpoint_sha256"]
    assert origin["model"]["recipe"] == manifest["recipe"]
    assert {"edgesam-deploy", "python", "numpy", "scipy", "pycocotools", "onnxruntime"} <= set(origin["versions"])
    assert origin["teacher"] is None
    (dataset,) = origin["datasets"]
    assert (dataset["images"], dataset["targets"], dataset["boxes"]) == (2, 3, "annotation")
    assert len(dataset["targets_sha256"]) == 64
    assert done.answer["agreement"] == []


def test_baselines_know_the_box(done: SimpleNamespace) -> None:
    box, ellipse = (of(done.answer, "box", name) for name in ("filled box", "inscribed ellipse"))
    assert box["by_source"]["polygons"]["miou"] > 0.9, "a rectangle fills its box"
    assert ellipse["by_source"]["panoptic"]["miou"] > 0.9, "a disc is an ellipse"
    assert box["calibration"] is None


def test_two_processes_write_the_same_bytes(coco: str, done: SimpleNamespace, tmp_path: Path) -> None:
    words = ["--dataset", coco, "--prompts", "box,click", "--baselines", "--workers", "2", "-o", tmp_path / "out"]
    assert run(BUNDLE, *words).exit_code == 0
    for name in ("eval.json", "masks.csv", "images.csv", "worst.png"):
        assert (tmp_path / "out" / name).read_bytes() == (done.folder / name).read_bytes()


def test_a_table_for_people(coco: str) -> None:
    result = run("--dataset", coco, "--prompts", "box", "--limit", "1")
    assert result.exit_code == 0, "the shipped bundle is the default"
    assert "mask quality against true masks: reference int8, onnxruntime" in result.stdout
    assert "by predicted IoU" in result.stdout
    assert "by source: panoptic" in result.stdout
    assert "agreement" not in result.stdout


def test_davis_is_the_mean_of_its_sequences(tmp_path: Path) -> None:
    folder = made.davis(tmp_path / "davis")
    result = run(BUNDLE, "--dataset", f"davis:{folder}", "--prompts", "box", "--json", "-o", tmp_path / "out")
    masks = [r for r in rows(tmp_path / "out" / "masks.csv") if r["answer"] == "single"]
    by_sequence = [[float(r["iou"]) for r in masks if r["group"] == g] for g in ("cow_walk", "dog")]
    quality = of(json.loads(result.stdout), "box", "single")
    assert quality["miou"] == pytest.approx(np.mean([np.mean(v) for v in by_sequence]))
    assert (quality["count"], quality["groups"]) == (3, 2)


def test_a_gate(coco: str, tmp_path: Path) -> None:
    words = ["--dataset", coco, "--prompts", "box", "--limit", "1", "-o", tmp_path / "out", "--min-iou"]
    assert run(*words, "0").exit_code == 0
    missed = run(*words, "1")
    assert missed.exit_code == 3
    assert missed.stderr.splitlines()[-1].startswith("error: mIoU 0.")
    assert missed.stderr.splitlines()[-1].endswith("instances.json, box, single, is below 1")
    assert (tmp_path / "out" / "eval.json").is_file(), "what was measured is kept"


def test_a_recipe_is_evaluated_in_pytorch_and_has_a_teacher(coco: str, tiny_recipe: Path, checkpoint: Path) -> None:
    """Its own teacher: of the same index the same masks, and apart from the truth."""
    pytest.importorskip("torch", reason="needs the export extra")
    words = ["--dataset", coco, "--prompts", "box,clicks", "--checkpoint", checkpoint, "--json"]
    result = run(tiny_recipe, *words, "--against", tiny_recipe, "--against-checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["origin"]["model"]["runs_on"] == "PyTorch FP32"
    assert answer["origin"]["teacher"] == answer["origin"]["model"]
    assert "torch" in answer["origin"]["versions"]
    assert [(q["prompt"], q["answer"]) for q in answer["agreement"]] == [
        ("box", "same index"),
        ("box", "by predicted IoU"),
    ]
    assert answer["agreement"][0]["miou"] == 1.0
    assert of(answer, "clicks", "5 clicks")["count"] == 3
    assert of(answer, "box", "single")["miou"] < 1.0


# words -> exit code, what the one line says. {coco}: a dataset; {full}: a folder with somebody's file in it.
REFUSED = {
    "no dataset": ("", 2, "Missing option '--dataset'"),
    "unknown layout": ("--dataset voc:x", 2, "a dataset is LAYOUT:PATH"),
    "unknown prompt": ("--dataset {coco} --prompts box,circle", 2, "prompts must be some of box, click, clicks"),
    "unknown model": ("gpt --dataset {coco}", 2, "unknown recipe 'gpt'"),
    "no bundle": ("./nowhere/bundle --dataset {coco}", 1, "nowhere/bundle is not a bundle"),
    "weights of a bundle": ("{bundle} --checkpoint x.pt --dataset {coco}", 2, "weights are for a recipe"),
    "backend of a recipe": ("reference --backend openvino --dataset {coco}", 2, "--backend is for a bundle"),
    "no weights": ("reference --checkpoint x.pt --dataset {coco}", 1, "checkpoint x.pt does not exist"),
    "teacher without prompts": (
        "--against reference --prompts clicks --dataset {coco}", 2, "--against compares answers to box and click"
    ),
    "weights of no teacher": ("--against-checkpoint x.pt --dataset {coco}", 2, "goes with --against"),
    "images of two": ("--dataset {coco} --dataset {coco} --images .", 2, "--images is of one dataset"),
    "twice the same": ("--dataset {coco} --dataset {coco}", 2, "two datasets are called"),
    "somebody's folder": ("--dataset {coco} -o {full}", 1, "holds thesis.tex, which would be lost"),
    "nan": ("--dataset {coco} --min-iou nan", 2, "nan is not in the range"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "code", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals(coco: str, tmp_path: Path, words: str, code: int, said: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    result = run(*words.format(coco=coco, full=full, bundle=BUNDLE).split())
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert [p.name for p in full.iterdir()] == ["thesis.tex"]


def without_annotations(folder: Path) -> str:
    for file in made.sa1b(folder).glob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    return f"sa1b:{folder}"


def only_empty_masks(folder: Path) -> str:
    for file in made.masks(folder).glob("*.png"):
        made.grey(np.zeros(made.HW, np.uint8), file)
    return f"masks:{folder}"


def no_instance_in_the_first(folder: Path) -> str:
    made.cityscapes(folder)
    for file in folder.rglob("bonn_000000_000019*"):
        other = file.with_name(file.name.replace("000019", "000001"))
        other.write_bytes(file.read_bytes())
    made.grey(np.full(made.HW, 7, np.uint16), next(folder.rglob("*_000001_gtFine_instanceIds.png")))
    return f"cityscapes:{folder}"


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("made_empty", [without_annotations, only_empty_masks, no_instance_in_the_first])
def test_a_dataset_with_no_target_left_is_refused(
    coco: str, tmp_path: Path, made_empty: Callable[[Path], str], second: bool
) -> None:
    """Not left out of the table, whichever it is, and nothing is written."""
    empty = made_empty(tmp_path / "empty")
    names = [coco, empty] if second else [empty, coco]
    words = ["--prompts", "box", "--skip-empty", "--limit", "1", "-o", tmp_path / "out"]
    result = run(*(word for name in names for word in ("--dataset", name)), *words)
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"error: {empty.partition(':')[0]}:")
    assert "empty has no target left (images: 1): expected at least one true mask to compare with; take more" in said
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_masks_are_kept_of_none_but_the_worst(coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgesam_deploy.measure import quality_files

    write_files, seen = quality_files.write_files, []

    def watched(*arguments: Any) -> None:
        seen.append(arguments)
        write_files(*arguments)

    monkeypatch.setattr(quality_files, "write_files", watched)
    assert run("--dataset", coco, "--prompts", "box", "-o", tmp_path / "out").exit_code == 0
    ((_, _, results, worst),) = seen
    assert [(result.image, result.worst) for result in results] == [("images/1.jpg", None), ("images/2.jpg", None)]
    assert sorted(case.record.image for _, case in worst) == ["images/1.jpg", "images/2.jpg"]


@pytest.mark.parametrize("package", ["scipy", "pycocotools"])
def test_a_missing_extra_is_named_with_its_cure(coco: str, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run("--dataset", coco)
    assert result.exit_code == 1
    assert f"'{package}', which is not installed: run  pip install 'edgesam-deploy[eval]'" in result.stderr


def test_an_interruption_leaves_nothing(coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgesam_deploy.measure import evaluate

    examine, seen = evaluate.examine, []

    def interrupted(*arguments: Any) -> Any:
        seen.append(examine(*arguments))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return seen[-1]

    monkeypatch.setattr(evaluate, "examine", interrupted)
    result = run("--dataset", coco, "--prompts", "box", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []
