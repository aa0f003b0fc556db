"""A build that was stopped, at any point and in any way, goes on where it stopped; what is up to date is not redone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgesam_deploy.bundle import load_bundle
from edgesam_deploy.cli import main
from edgesam_deploy.stages.cache import RECORD, exclusive

pytest.importorskip("torch", reason="building needs the export extra")

# In the order of a build; the last is no folder of the work folder but the bundle itself.
STAGES = (
    "export",
    "simplify-encoder",
    "simplify-decoder",
    "reference",
    "calibrate",
    "quantize-encoder",
    "encode-encoder",
    "verify",
)

# Runs a real build, and sends itself a signal in the middle of one stage: half a file is written by then.
STOPPED = """
import os, signal, sys
from edgesam_deploy.cli import main
from edgesam_deploy.stages import build
from edgesam_deploy.stages.cache import StageCache

# A shell that starts a job in the background has it ignore control-C, and all that the job starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
stage, number, *words = sys.argv[1:]
run = StageCache.run

def run_until(self, name, inputs, action):
    def stop(folder):
        (folder / "encoder.onnx").write_bytes(b"half a graph")
        os.kill(os.getpid(), int(number))
        return action(folder)

    return run(self, name, inputs, stop if name == stage else action)

StageCache.run = run_until
if stage == "verify":
    build.verify = lambda *_, **__: os.kill(os.getpid(), int(number))
main(words, prog_name="sam-export")
"""


@pytest.fixture(scope="module")
def words(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``build`` of the tiny recipe on images so small and few that most stages take a moment."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("calibration", 32), ("verify", 1)):
        (folder / name).mkdir()
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
            picture.resize((96, 64)).save(folder / name / f"{i:02}.png")
    images = ["--calibration", str(folder / "calibration"), "--images", str(folder / "verify")]
    return ["build", str(tiny_recipe), "--backend", "onnxruntime", *images]


@pytest.fixture(scope="module")
def small(built: SimpleNamespace, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build on those images: the folder with ``bundle`` and ``.stages/bundle``."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(built.stages, folder / ".stages" / "bundle", copy_function=os.link)
    states(build(words, folder / "bundle"))
    return folder


@pytest.fixture
def finished(small: Path, tmp_path: Path) -> Path:
    """A copy of that build, for one test to change: ``finished`` is its bundle."""
    shutil.copytree(small, tmp_path / "engines")
    return tmp_path / "engines" / "bundle"


def build(words: list[str], bundle: Path, *more: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, [*words, "-o", str(bundle), *more, "--json"])


def states(result: Result) -> dict[str, str]:
    """reused or done, by stage, of a build that ended well (whether or not it reached its threshold)."""
    assert result.exit_code in (0, 3), result.output
    return {s["name"]: "reused" if s["reused"] else "done" for s in json.loads(result.stdout)["stages"]}


def done_only(*stages: str) -> dict[str, str]:
    """What ``states`` must be if these stages were done, and verify, which always is."""
    return {name: "done" if name in (*stages, "verify") else "reused" for name in STAGES}


def work(bundle: Path) -> Path:
    return bundle.parent / ".stages" / bundle.name


def unfinished(bundle: Path) -> list[Path]:
    return sorted(p.relative_to(bundle.parent) for p in bundle.parent.rglob(".unfinished-*"))


def stop(words: list[str], bundle: Path, stage: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """A build in a process of its own that gets a signal in the middle of ``stage``."""
    command = [sys.executable, "-c", STOPPED, stage, str(int(number)), *words, "-o", str(bundle)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_killed_in_every_stage_a_build_goes_on_and_ends_well(
    built: SimpleNamespace, words: list[str], tmp_path: Path
) -> None:
    """One build, killed in each stage in turn; an older bundle stays in place and whole until the new one is."""
    bundle = tmp_path / "engines" / "bundle"
    shutil.copytree(built.bundle, bundle)
    old = (bundle / "manifest.json").read_bytes()
    written: dict[str, int] = {}
    for position, stage in enumerate(STAGES):
        killed = stop(words, bundle, stage, signal.SIGKILL)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        records = {p.parent.name: p.stat().st_mtime_ns for p in work(bundle).glob(f"*/{RECORD}")}
        assert set(records) == set(STAGES[:position]), "every stage before the killed one is finished, and no other"
        assert records | written == records, "what was finished before was not done again"
        written = records
        assert len(unfinished(bundle)) == 1, "half of the killed stage, and nothing of the one killed before"
        assert load_bundle(bundle).manifest["precision"] == "int8"
        assert (bundle / "manifest.json").read_bytes() == old
    assert states(build(words, bundle)) == done_only()
    assert {p.parent.name: p.stat().st_mtime_ns for p in work(bundle).glob(f"*/{RECORD}")} == written
    assert unfinished(bundle) == []
    assert sorted(p.name for p in bundle.parent.iterdir()) == [".stages", "bundle"]
    new = load_bundle(bundle)
    assert new.manifest["results"]["images"] == 1
    with new.open(threads=1) as predictor:
        predictor.set_image(np.zeros((20, 30, 3), dtype=np.uint8))
        assert predictor.predict([[5, 5]], [1]).masks.shape == (3, 20, 30)


def test_control_c_is_one_line_and_leaves_nothing_half_done(words: list[str], finished: Path) -> None:
    (work(finished) / "encode-encoder" / RECORD).unlink()
    stopped = stop(words, finished, "encode-encoder", signal.SIGINT)
    assert stopped.stderr == "interrupted; finished stages are kept, run the same command to go on\n"
    assert stopped.returncode == 130
    assert unfinished(finished) == []
    assert load_bundle(finished).recipe == "tiny"
    assert states(build(words, finished)) == done_only("encode-encoder")


def test_built_again_unchanged_everything_is_reused_but_verify(words: list[str], finished: Path) -> None:
    before = load_bundle(finished).manifest
    result = build(words, finished)
    assert states(result) == done_only()
    assert "stages marked 'reused' were up to date; --force redoes them" in result.stderr
    after = load_bundle(finished).manifest
    assert after["files"] == before["files"], "a build is reproducible to the byte"
    assert after["results"]["mask_iou"] == before["results"]["mask_iou"]


def test_a_build_moved_elsewhere_is_still_up_to_date(words: list[str], finished: Path, tmp_path: Path) -> None:
    """No path of this machine is part of what a stage depends on."""
    moved = finished.parent.rename(tmp_path / "elsewhere") / "bundle"
    assert states(build(words, moved)) == done_only()


def test_force_redoes_everything(
    words: list[str], finished: Path, built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export itself, ten seconds long, is stood in for by its result; that it is called again is the point."""
    from edgesam_deploy.stages import export

    calls: list[Path] = []

    def copy(recipe: object, checkpoint: Path, output: Path) -> export.ExportResult:
        calls.append(output)
        for name in ("encoder", "decoder"):
            shutil.copyfile(built.stages / "export" / f"{name}.onnx", output / f"{name}.onnx")
        return export.ExportResult(output / "encoder.onnx", output / "decoder.onnx", 1, 1, 0.0)

    monkeypatch.setattr(export, "export", copy)
    result = build(words, finished, "--force")
    assert states(result) == done_only(*STAGES)
    assert len(calls) == 1
    assert "--force" not in result.stderr


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def garble(path: Path) -> None:
    path.write_text("[1, 2")


def another_json(path: Path) -> None:
    path.write_text('["not", "a", "record"]')


DAMAGE: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "graph-flipped": ("simplify-decoder", "decoder.onnx", flip),
    "graph-cut": ("quantize-encoder", "encoder.onnx", cut),
    "graph-gone": ("encode-encoder", "encoder.onnx", Path.unlink),
    "ranges-garbled": ("calibrate", "ranges.json", garble),
    "answers-flipped": ("reference", "answers.npz", flip),
    "image-gone": ("reference", "00.png", Path.unlink),
    "record-gone": ("simplify-encoder", RECORD, Path.unlink),
    "record-garbled": ("quantize-encoder", RECORD, garble),
    "record-another-json": ("encode-encoder", RECORD, another_json),
}


@pytest.mark.parametrize(("stage", "name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_stage_whose_files_were_damaged_is_redone_and_no_other(
    words: list[str], finished: Path, stage: str, name: str, damage: Callable[[Path], None]
) -> None:
    before = load_bundle(finished).manifest["files"]
    damage(work(finished) / stage / name)
    assert states(build(words, finished)) == done_only(stage)
    assert load_bundle(finished).manifest["files"] == before


def test_a_lost_work_folder_of_one_stage_is_redone(words: list[str], finished: Path) -> None:
    shutil.rmtree(work(finished) / "calibrate")
    assert states(build(words, finished)) == done_only("calibrate")


def test_other_calibration_images_redo_calibration_and_what_follows(words: list[str], finished: Path) -> None:
    folder = finished.parent / "calibration"
    shutil.copytree(words[words.index("--calibration") + 1], folder)
    Image.new("RGB", (96, 64), "red").save(folder / "00.png")
    changed = [str(folder) if w.endswith("calibration") and not w.startswith("-") else w for w in words]
    assert states(build(changed, finished)) == done_only("calibrate", "quantize-encoder", "encode-encoder")


def test_other_verification_images_redo_the_reference_only(words: list[str], finished: Path) -> None:
    folder = finished.parent / "verify"
    folder.mkdir()
    Image.new("RGB", (96, 64), "red").save(folder / "red.png")
    changed = [str(folder) if w.endswith("verify") else w for w in words]
    assert states(build(changed, finished)) == done_only("reference")
    assert [n for n in load_bundle(finished).manifest["files"] if n.endswith(".png")] == ["verify/red.png"]


def test_another_percentile_redoes_calibration_and_what_follows(
    words: list[str], finished: Path, tmp_path: Path, built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgesam_deploy.stages import export

    def never(*_: object) -> None:
        raise RuntimeError("exported again")

    monkeypatch.setattr(export, "export", never)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(Path(words[1]).read_text() + "\n[precision.int8]\npercentile = 99.9\n")
    changed = [str(recipe) if w.endswith(".toml") else w for w in words]
    assert states(build(changed, finished)) == done_only("calibrate", "quantize-encoder", "encode-encoder")
    assert load_bundle(finished).manifest["calibration"]["percentile"] == 99.9


def test_a_second_build_of_the_same_bundle_is_refused_by_one_line(words: list[str], finished: Path) -> None:
    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in finished.parent.rglob("*") if p.name != ".lock"}

    before = times()
    with exclusive(work(finished)):
        result = build(words, finished)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: another build is at work in {work(finished)}; wait for it or give another --output\n"
    )
    assert times() == before
    assert states(build(words, finished)) == done_only()


def test_builds_of_two_bundles_side_by_side_do_not_disturb_each_other(words: list[str], finished: Path) -> None:
    """What one build has not finished yet is no rubbish of the other's."""
    other = finished.parent / ".unfinished-bundle2-abcd1234"
    other.mkdir()
    with exclusive(finished.parent / ".stages" / "bundle2"):
        assert states(build(words, finished)) == done_only()
    assert other.is_dir()
