"""``--backend`` and ``bench --compare`` on the tiny bundle, and ``doctor`` on OpenVINO. No times are asserted."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner, Result

from edgesam_deploy.cli import main
from edgesam_deploy.measure import compare
from edgesam_deploy.runtime import CPU_BACKENDS

PHOTO = Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos" / "verify" / "duck.jpg"
LABELS = ["onnxruntime", "openvino", "openvino bf16"]
COMMANDS = ("bench", "predict", "verify")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words], prog_name="sam-export")


@pytest.fixture
def openvino() -> None:
    if find_spec("openvino") is None:
        pytest.skip("needs the extra openvino")


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "installed", lambda backend: backend == "onnxruntime")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_choices_are_the_runtimes(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    option = next(p for p in command.params if p.name == "backend")
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == CPU_BACKENDS


@pytest.mark.usefixtures("openvino")
def test_bench_on_another_backend_says_so(built: SimpleNamespace) -> None:
    result = run("bench", built.bundle, "--backend", "openvino", "--runs", 1, "--warmup", 0, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["backend"], answer["threads"]) == ("openvino", 1)
    assert answer["provider"].startswith("OpenVINO 20")


@pytest.mark.usefixtures("openvino")
def test_verify_on_another_backend_says_so(built: SimpleNamespace) -> None:
    answers = {}
    for backend in CPU_BACKENDS:
        result = run("verify", built.bundle, "--backend", backend, "--min-iou", 0.5, "--json")
        assert result.exit_code == 0, result.output
        answers[backend] = json.loads(result.stdout)
        assert answers[backend]["witness"] == backend
    assert answers["openvino"]["mask_iou"]["mean"] == pytest.approx(
        answers["onnxruntime"]["mask_iou"]["mean"], abs=0.01
    )


@pytest.mark.usefixtures("openvino")
def test_predict_on_another_backend_gives_nearly_the_same_mask(built: SimpleNamespace) -> None:
    areas = []
    for backend in CPU_BACKENDS:
        result = run(
            "predict", PHOTO, "--box", "100,100,500,500", "--bundle", built.bundle, "--backend", backend, "--json"
        )
        assert result.exit_code == 0, result.output
        areas.append(json.loads(result.stdout)["masks"][0]["area_px"])
    assert areas[0] == pytest.approx(areas[1], rel=0.05)


def test_compare_answers_rows_for_machines(built: SimpleNamespace) -> None:
    result = run("bench", built.bundle, "--compare", "--runs", 2, "--warmup", 1, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["runs"], answer["warmup"], answer["threads"], answer["images"]) == (2, 1, 1, 3)
    assert [f"{row['backend']}{' bf16' * row['bf16']}" for row in answer["rows"]] == LABELS
    assert answer["rows"][0]["graphs"]["encoder"]["ratio"] == 1.0
    assert answer["rows"][0]["mask_iou"]["count"] == 24


@pytest.mark.usefixtures("without_openvino")
def test_compare_without_openvino_says_how_to_get_it(built: SimpleNamespace) -> None:
    words = ("bench", built.bundle, "--compare", "--runs", 1, "--warmup", 0, "--threads", 1)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "openvino: not installed: pip install 'edgesam-deploy[openvino]'" in result.stdout.splitlines()
    assert [line.split()[0] for line in result.stdout.splitlines()[2:5]] == ["onnxruntime", "openvino", "openvino"]
    rows = json.loads(run(*words, "--json").stdout)["rows"]
    assert [row["note"] is None for row in rows] == [True, False, False]


USAGE = {
    "backend": ("--compare", "--backend", "openvino"),
    "export-times": ("--compare", "--export-times", "times"),
    "unknown": ("--backend", "tensorrt"),
}


@pytest.mark.parametrize("words", USAGE.values(), ids=USAGE)
def test_wrong_usage(built: SimpleNamespace, words: tuple[str, ...]) -> None:
    result = run("bench", built.bundle, *words)
    assert result.exit_code == 2
    assert "--compare runs every CPU backend" in result.stderr or "is not one of" in result.stderr


def test_doctor_names_openvino_and_what_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgesam_deploy.cli.doctor._version", lambda package: "missing")
    monkeypatch.setattr("edgesam_deploy.device.cpu_features", lambda: ("avx512_vnni", "amx_bf16"))
    answer = json.loads(run("doctor", "--json").stdout)
    row = next(a for a in answer["abilities"] if "openvino" in a["packages"])
    assert (row["ready"], row["packages"]) == (False, {"openvino": "missing"})
    assert row["cure"] == "pip install 'edgesam-deploy[openvino]'"
    assert answer["cpu_features"] == ["avx512_vnni", "amx_bf16"]
    assert "this CPU's instructions for INT8 and bfloat16: avx512_vnni, amx_bf16" in run("doctor").stdout.splitlines()
    monkeypatch.setattr("edgesam_deploy.device.cpu_features", lambda: ("avx512_bf16",))
    assert any("this CPU has no VNNI" in note for note in json.loads(run("doctor", "--json").stdout)["notes"])
