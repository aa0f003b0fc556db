"""``bench`` and ``selfcheck`` on the tiny bundle: what the answers hold. No times are asserted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from edgesam_deploy.cli import main

PARTS = ("pre", "encoder", "decoder", "post", "total")
WAITS = ("set_image", "predict", "end_to_end", "camera")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words], prog_name="sam-export")


def test_bench_answers_parts_pipeline_and_what_they_depend_on(built: SimpleNamespace) -> None:
    result = run("bench", built.bundle, "--runs", 3, "--warmup", 1, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert tuple(answer["parts"]) == PARTS
    assert tuple(answer["pipeline"]) == WAITS
    assert answer["camera_fps"] == pytest.approx(1000 / answer["pipeline"]["camera"]["mean_ms"])
    assert (answer["runs"], answer["warmup"], answer["threads"]) == (3, 1, 1)
    assert answer["engines"] is None
    assert {"source", "power_mode", "locked", "notes"} <= set(answer["clocks"])
    assert (answer["power"] is None) == (answer["power_note"] is not None)
    parts = answer["parts"]
    assert parts["total"]["min_ms"] >= max(parts[name]["min_ms"] for name in PARTS[:-1])


def test_bench_for_people_names_every_part(built: SimpleNamespace) -> None:
    result = run("bench", built.bundle, "--runs", 2, "--warmup", 0)
    assert result.exit_code == 0, result.output
    first_words = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert set(PARTS) <= first_words
    assert "frames per second" in result.stdout


def test_export_times_is_for_engines(built: SimpleNamespace, tmp_path: Path) -> None:
    result = run("bench", built.bundle, "--runs", 1, "--warmup", 0, "--export-times", tmp_path / "times")
    assert result.exit_code == 2
    assert "--export-times is for engines" in result.stderr
    assert not (tmp_path / "times").exists()


@pytest.fixture
def bundles(built: SimpleNamespace, tmp_path: Path) -> list[Path]:
    """A good bundle, and one with a byte changed."""
    good, broken = (Path(shutil.copytree(built.bundle, tmp_path / name)) for name in ("good", "broken"))
    graph = broken / "encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    return [good, broken]


def test_selfcheck_goes_on_after_a_broken_bundle_and_tells_it(bundles: list[Path], tmp_path: Path) -> None:
    result = run("selfcheck", *bundles, "--runs", 2, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: 1 of 2 bundles failed: broken"
    written = json.loads((tmp_path / "out" / "selfcheck.json").read_text())
    good, broken = written["bundles"]
    assert good["error"] is None
    assert good["accuracy"]["mask_iou"]["count"] == 80
    assert tuple(good["bench"]["parts"]["parts"]) == PARTS
    assert "is broken: encoder.onnx has sha256" in broken["error"]
    assert broken["bench"] is None
    report = (tmp_path / "out" / "selfcheck.md").read_text()
    assert f"| good | {good['accuracy']['mask_iou']['mean']:.4f} |" in report
    assert "**broken** went no further" in report
    assert report in result.stdout


def test_selfcheck_json_holds_no_folder_of_this_machine(bundles: list[Path], tmp_path: Path) -> None:
    result = run("selfcheck", bundles[0], "--runs", 1, "-o", tmp_path / "out", "--json")
    assert result.exit_code in (0, 3), result.output
    assert json.loads(result.stdout)["bundles"][0]["bundle"] == "good"
    assert str(tmp_path) not in result.stdout
    assert json.loads((tmp_path / "out" / "selfcheck.json").read_text()) == json.loads(result.stdout)


def test_selfcheck_refuses_an_output_that_cannot_be_before_it_works(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("selfcheck", bundles[0], "-o", tmp_path / "file" / "x")
    assert result.exit_code == 1
    assert "is not a folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_selfcheck_refuses_an_unknown_target(tmp_path: Path) -> None:
    result = run("selfcheck", "--target", "toaster", "-o", tmp_path)
    assert (result.exit_code, "unknown target 'toaster'" in result.stderr) == (2, True)


def test_selfcheck_refuses_jetpack_5_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of /etc/nv_tegra_release is that of L4T 35.4.1, JetPack 5.1.2."""
    from edgesam_deploy import device

    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text(
        "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, "
        "DATE: Tue Aug  1 19:57:35 UTC 2023\n"
    )
    examine = device.examine_machine
    monkeypatch.setattr(device, "examine_machine", lambda: examine(tmp_path))
    result = run("selfcheck", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "JetPack 5" in result.stderr
    assert "upgrade to" in result.stderr
    assert len(result.stderr.splitlines()) == 1
