"""benchmarks/survey.py and what readme.py makes of it: entries, phases that go on, a table and charts."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def entries(script: Callable[[str], Any], text: str, folder: Path) -> Any:
    (folder / "survey.toml").write_text(text, encoding="utf-8")
    return script("survey_entries").load_entries(folder / "survey.toml", folder / "work")


def test_the_committed_entries_are_recipes(script: Callable[[str], Any], tmp_path: Path) -> None:
    from edgesam_deploy.recipe import load_recipe

    found = script("survey_entries").load_entries(BENCHMARKS / "survey.toml", tmp_path)
    assert "reference" in [entry.label for entry in found]
    for entry in found:
        if not entry.recipe.endswith(".toml"):  # a student's is made where it is trained
            load_recipe(entry.recipe)


def test_paths_are_relative_to_the_file(script: Callable[[str], Any], tmp_path: Path) -> None:
    text = '[[entry]]\nlabel = "mine"\nrecipe = "../mine.toml"\ncheckpoint = "w.pt"\nteacher = "sam_vit_b"\n'
    text += 'ways = ["int8, onnxruntime", "fp32, torch"]\n'
    (entry,) = entries(script, text, tmp_path)
    assert entry.recipe == str(tmp_path.parent / "mine.toml")
    assert entry.checkpoint == tmp_path / "w.pt"
    assert (entry.teacher, entry.folder) == ("sam_vit_b", tmp_path / "work" / "mine")
    assert [way.name for way in entry.measured()] == ["fp32, torch", "int8, onnxruntime"]


START = '[[entry]]\nlabel = "a"\nrecipe = "reference"\n'
WRONG = {
    "nothing": ("", r"has no \[\[entry\]\]"),
    "unknown": (START + 'weights = "x"', r"unknown \['weights'\] in an entry"),
    "no-recipe": ('[[entry]]\nlabel = "a"', "an entry needs 'recipe' as str, got None"),
    "number": (START + "checkpoint = 3", "an entry needs 'checkpoint' as str, got 3"),
    "twice": (START + START, "two entries of the label 'a'"),
    "label": (START.replace('"a"', '"../a"'), "a label has letters"),
    "two-weights": (START + 'random_weights = true\ncheckpoint = "x"', "exclude each other"),
    "ways": (START + 'ways = ["fp32, onnxruntime", "fp8, torch"]', r"unknown ways \['fp8, torch'\], expected some of"),
    "ways-text": (START + 'ways = "fp32, torch"', "an entry needs 'ways' as list"),
    "no-teacher": (START + 'teacher_checkpoint = "x"', "goes with a teacher"),
}


@pytest.mark.parametrize(("text", "problem"), WRONG.values(), ids=WRONG)
def test_wrong_entries(script: Callable[[str], Any], tmp_path: Path, text: str, problem: str) -> None:
    from edgesam_deploy.errors import InputError

    with pytest.raises(InputError, match=problem):
        entries(script, text, tmp_path)


def test_an_entry_without_its_weights_is_left_out(
    script: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="finding a recipe's own weights needs the export extra")
    missing = '[[entry]]\nlabel = "b"\nrecipe = "reference"\ncheckpoint = "not/here.pt"\n'
    untrained = '[[entry]]\nlabel = "c"\nrecipe = "student_resnet18"\n'
    found = script("survey").with_weights(entries(script, START + missing + untrained, tmp_path))
    assert [entry.label for entry in found] == ["a"]
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"b: left out: checkpoint {tmp_path}/not/here.pt does not exist"
    assert second.startswith("c: left out: recipe 'student_resnet18' has no published weights")


@pytest.fixture
def survey(
    script: Callable[[str], Any],
    built: SimpleNamespace,
    tiny_recipe: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[str]]:
    """Runs phases on the tiny model, its INT8 bundle built already; gives the commands of sam-export that it took.

    It is its own teacher. Results are in tmp_path/survey.json.
    """
    pytest.importorskip("pycocotools", reason="needs the eval extra")
    from click.testing import CliRunner

    from edgesam_deploy.cli import main

    from .made_up_datasets import coco

    coco(tmp_path / "coco-subset").rename(tmp_path / "coco-subset" / "instances_val.json")
    teacher = f'teacher = "{tiny_recipe}"\nteacher_checkpoint = "{checkpoint}"\n'
    text = f'[[entry]]\nlabel = "tiny"\nrecipe = "{tiny_recipe}"\ncheckpoint = "{checkpoint}"\n{teacher}'
    (tmp_path / "survey.toml").write_text(text, encoding="utf-8")
    shutil.copytree(built.bundle, tmp_path / "work" / "tiny" / "int8-onnxruntime")
    module, known, families = script("survey"), script("survey_entries"), script("families")
    ways = [known.Way("fp32", "torch"), known.Way("int8", "onnxruntime")]
    for each in (module, known):
        monkeypatch.setattr(each, "ways_here", lambda: (ways, {"fp16": "no reason"}))
    called: list[str] = []

    def here(*words: object) -> Any:
        called.append(str(words[0]))
        result = CliRunner().invoke(main, [*map(str, words), "--json"])
        assert result.exit_code in (0, 3), result.output
        return json.loads(result.stdout)

    monkeypatch.setattr(families, "run", here)

    def run(*words: str) -> list[str]:
        called.clear()
        options = ["--entries", "survey.toml", "--work", "work", "--output", "survey.json", "--data", "."]
        paths = [str(tmp_path / word) if not word.startswith("--") else word for word in options]
        monkeypatch.setattr(sys, "argv", ["survey.py", *paths, "--threads", "1", "--runs", "2", *words])
        module.main()
        return list(called)

    return run


def test_phases_fill_one_table_and_go_on(
    survey: Callable[..., list[str]], script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "survey.json"

    def entry() -> Any:
        return json.loads(results.read_text(encoding="utf-8"))["entries"]["tiny"]

    with pytest.raises(SystemExit, match="run --build first"):
        survey("--quality")
    assert survey("--build") == []
    assert [row["quality"] for row in entry()["rows"]] == [None, None]
    assert entry()["macs"] > entry()["encoder_macs"] > 1e8
    # Of each row with the truth, and with the teacher.
    assert survey("--quality") == ["eval"] * 4
    assert survey("--speed") == []
    # What is up to date is left as it is, by every phase.
    before = results.read_bytes()
    assert survey("--build", "--quality", "--speed") == []
    assert results.read_bytes() == before
    torch, int8 = entry()["rows"]
    for row in (torch, int8):
        (box,) = (f for f in row["quality"]["truth"] if f["answer"] == "single")
        assert box["interval"][0] <= box["miou"] <= box["interval"][1]
        assert set(row["latency"]) == {"encoder", "decoder"}
        assert row["latency"]["encoder"]["q1_ms"] <= row["latency"]["encoder"]["q3_ms"]
        assert row["peak_rss_mb"] > 30
    assert torch["quality"]["agreement"] == []
    assert {f["miou"] for f in torch["teacher"]["agreement"] if f["answer"] == "same index"} == {1.0}
    assert 0.5 < next(f["miou"] for f in int8["quality"]["agreement"]) < 1.0
    assert str(tmp_path) not in results.read_text(encoding="utf-8")
    assert (tmp_path / "work" / "tiny" / "eval" / "int8-onnxruntime-quality" / "worst.png").is_file()
    _one_part_lost(survey, results)
    _tables_and_charts(script, results, monkeypatch)


def _one_part_lost(survey: Callable[..., list[str]], results: Path) -> None:
    content = json.loads(results.read_text(encoding="utf-8"))
    content["entries"]["tiny"]["rows"][1]["quality"] = None
    results.write_text(json.dumps(content), encoding="utf-8")
    assert survey("--quality") == ["eval"]
    content["entries"]["tiny"]["rows"][1]["origin"]["checkpoint_sha256"] = "of another"
    altered = results.with_name("altered.json")
    altered.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit, match="tiny: --speed: tiny, int8, onnxruntime, is not what was built"):
        survey("--speed", "--output", str(altered))


def _tables_and_charts(script: Callable[[str], Any], results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = script("readme_survey")
    monkeypatch.setattr(readme, "FOLDER", results.parent)
    for lines, count in ((readme.whole(), 19), (readme.short(), 9)):
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| tiny")]
        assert [row[:3] for row in rows] == [["tiny", "fp32", "torch"], ["tiny", "int8", "onnxruntime"]]
        assert {len(row) for row in rows} == {count}
    assert "Mask quality on 2 images of COCO val with 3 objects" in readme.whole()[0]
    assert "No fp16: no reason." in readme.whole()[0]
    drawn = {path.name: ElementTree.fromstring(text) for path, text in readme.charts().items()}
    marks = {name: sum(e.tag.endswith("circle") for e in root.iter()) for name, root in drawn.items()}
    assert marks == {"pareto-latency.svg": 2, "pareto-macs.svg": 1}


def test_what_was_not_measured_is_a_dash(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose weights cannot be had: its published accuracy, no chart; without results nothing at all."""
    readme = script("readme_survey")
    monkeypatch.setattr(readme, "FOLDER", tmp_path)
    assert (readme.whole(), readme.short(), readme.charts()) == ([], [], {})
    row = {"precision": "fp32", "backend": "onnxruntime", "note": None, "verified": False}
    row |= {"latency": None, "peak_rss_mb": None}
    quotes = [
        {"metric": "COCO val2017 mask AP, boxes of ViTDet", "value": 41.0, "source": "there"},
        {"metric": "COCO val2017 mIoU, ground-truth boxes", "value": 0.728, "source": "here (README)"},
    ]
    entry = {"parameters": 9.66e6, "macs": 38.2e9, "weights": "random", "published": quotes}
    entry["rows"] = [{**row, "quality": None, "teacher": None}]
    content = {"left_out": {}, "entries": {"mobile_sam": entry}}
    (tmp_path / "survey.json").write_text(json.dumps(content), encoding="utf-8")
    title, _, _, _, line, *_ = readme.whole()
    published = "0.728: COCO val2017 mIoU, ground-truth boxes; here (README)"
    cells = ["mobile_sam", "fp32", "onnxruntime", "9.66", "38.2", *["–"] * 13, published]
    assert line == f"| {' | '.join(cells)} |"
    assert "Below the mask IoU that its recipe demands: mobile_sam fp32 on onnxruntime." in title
    assert "With random weights, so without quality: mobile_sam." in title
    assert "![" not in "".join(readme.whole() + readme.short())
    assert readme.charts() == {}


def test_students_are_joined_with_what_the_survey_measured_of_their_weights(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, kept = script("readme_students"), {"macs_before": 3.9e9, "macs_after": 0.9e9}
    monkeypatch.setattr(script("readme_survey"), "FOLDER", tmp_path)
    monkeypatch.setattr(script("readme_experiments"), "FOLDER", tmp_path)
    assert (readme.students(), readme.charts()) == ([], {})

    def answers(miou: float) -> dict[str, Any]:
        sizes = {size: {"miou": miou, "count": 1} for size in ("small", "medium", "large")}
        box = {"prompt": "box", "answer": "single", "miou": miou, "interval": [miou - 0.01, miou + 0.01]}
        click = {**box, "prompt": "click", "answer": "by predicted IoU", "miou": miou / 2}
        agreed = [{**box, "miou": 0.9}, {**click, "answer": "same index", "miou": 0.8}]
        return {"truth": [{**box, "by_size": sizes}, click], "agreement": agreed}

    def experiment(weights: str, miou: float, **more: Any) -> dict[str, Any]:
        return {"after": answers(miou), "run": {"checkpoint_sha256": weights, "seconds": 600, "step": 314}, **more}

    experiments = {
        "dear": experiment("a1", 0.5, encoder_macs=3e9),
        "cheap": experiment("b2", 0.4, encoder_macs=2e9),
        "quarter": experiment("c3", 0.3, pruned=kept),
    }
    result = {"experiments": experiments, "teacher": answers(0.6), "teacher_sha256": "d4"}
    (tmp_path / "experiments.json").write_text(json.dumps(result), encoding="utf-8")

    def ways(**ms: float) -> list[dict[str, Any]]:
        graphs = {name: {"encoder": {"median_ms": t - 1}, "decoder": {"median_ms": 1.0}} for name, t in ms.items()}
        return [{"precision": name, "backend": "onnxruntime", "latency": graph} for name, graph in graphs.items()]

    speed = {"machine": "some CPU", "features": ["vnni"], "threads": 2}
    entries = {
        "dear": {"checkpoint_sha256": "a1", "parameters": 7e6, "speed": speed, "rows": ways(fp32=30.0, int8=20.0)},
        "cheap": {"checkpoint_sha256": "of another training", "parameters": 1, "speed": speed, "rows": ways(int8=1.0)},
    }
    (tmp_path / "survey.json").write_text(json.dumps({"entries": entries}), encoding="utf-8")
    title, _, _, _, *rows = readme.students()[:7]
    assert "Students of 2 families" in title
    assert "314 updates" in title
    assert "2 threads, some CPU with vnni" in title
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert cells == [
        ["the teacher", "3.90", "–", "–", "1", "1", "0.600 (0.590–0.610)", *["0.600"] * 3, "0.300", *"–––"],
        ["cheap", "2.00", "–", "10", "0.900", "0.800", "0.400 (0.390–0.410)", *["0.400"] * 3, "0.200", *"–––"],
        ["dear", "3.00", "7.00", "10", "0.900", "0.800", "0.500 (0.490–0.510)", *["0.500"] * 3, "0.250", "30.0",
         "20.0", "1.50×"],
    ]  # fmt: skip
    (text,) = readme.charts().values()
    names = {element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("text")}
    assert {"dear", "cheap"} <= names
    assert "quarter" not in names
