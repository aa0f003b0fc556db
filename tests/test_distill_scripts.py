"""benchmarks/distill_*.py: the arithmetic by hand, and each kind of run once, small."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.measure.protocol import fill
from edgesam_deploy.prompts import Prompts
from edgesam_deploy.recipe import load_recipe
from edgesam_deploy.target import load_target

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "edgesam_deploy" / "assets" / "photos" / "calibration"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of benchmarks/ by its name, which finds its siblings."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


PEAKS = {("rtx", "GeForce RTX 4090"): 165.2, ("x86-gpu", "H100 SXM 80GB"): 989.5, ("x86-gpu", "L40S"): 362.05}


@pytest.mark.parametrize(("place", "tflops"), PEAKS.items(), ids=lambda v: v[1] if isinstance(v, tuple) else "")
def test_training_sums_in_fp32(script: Any, place: tuple[str, str], tflops: float) -> None:
    device = next(d for d in load_target(place[0]).devices if d.name == place[1])
    assert script("distill_projection").training_peak(device) == tflops


def test_a_projection_by_hand(script: Any) -> None:
    module = script("distill_projection")
    device = next(d for d in load_target("x86-gpu").devices if d.name == "H100 SXM 80GB")
    pair = module.Pair("t", "s", 10**11, 10**9, load_recipe("mobile_sam").geometry)
    # 494.75e12 operations a second: 2474 images of the teacher, 82458 of the student; 1000 are loaded.
    found = module.project(device, 10, pair, 3_600_000, per_core=100, share=0.5)
    assert found.teacher_hours == pytest.approx(1.0)
    assert found.teacher_bound == found.epoch_bound == "loading"
    found = module.project(device, 10, pair, 3_600_000, per_core=1000, share=0.5)
    assert found.teacher_bound == "gpu"
    assert found.teacher_hours == pytest.approx(1000 / 2473.75)
    assert found.cores_to_feed == pytest.approx(82.458, rel=1e-4)
    assert found.cache_gb == pytest.approx(3.6e6 * 256 * 64 * 64 * 2 / 1e9)
    assert "494.75" not in found.teacher
    assert found.arithmetic[0] == "GPU: 989.5e12 operations/s × 0.5 = 4.948e+14 operations/s"
    rows = module.projections([pair], 100.0)["rows"]
    assert [row["device"] for row in rows] == [name for _, name, _ in module.HARDWARE for _ in module.COUNTS]


def test_kills_are_drawn_from_the_seed(script: Any) -> None:
    plan = script("distill_proof").plan
    kills = plan(np.random.default_rng(3), 10, 40, 0.5, 0.1)
    assert kills == plan(np.random.default_rng(3), 10, 40, 0.5, 0.1)
    assert [kill.during for kill in kills] == ["teacher pass", "updates", "updates"]
    for seed in range(50):
        first, second, third = plan(np.random.default_rng(seed), 10, 40, 0.5, 0.1)
        assert 1 <= first.count < 9
        assert 1 <= second.count < 20 <= third.count < 38
        assert 0 <= first.delay_s < 0.5
        assert 0 <= third.delay_s < 0.1


def test_differences_by_hand(script: Any) -> None:
    found = script("distill_proof").difference([1.0, 1.0, 1.0, 1.0], [1.0, 1.00001, 1.1, 1.0])
    assert found == {"largest": pytest.approx(0.1), "at_update": 3, "agreed": 2}
    assert script("distill_proof").difference([1.0], [1.0])["agreed"] == 1


CHILD = "import sys, time; held = bytes(int(sys.argv[1])); held = held.replace(b'\\0', b'x'); time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}, sys.argv[1]])"


class Fills:
    """A predictor whose every mask fills its box, moved to the right by a share of its width."""

    def __init__(self, moved: float) -> None:
        self.moved = moved

    def set_image(self, image: np.ndarray) -> None:
        self.shape = image.shape[:2]

    def decode(self, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
        assert prompts.boxes is not None
        step = self.moved * (prompts.boxes[:, 2] - prompts.boxes[:, 0])
        boxes = prompts.boxes + np.stack([step, 0 * step, step, 0 * step], axis=1)
        filled = np.stack([fill(box, self.shape, ellipse=False) for box in boxes])
        return np.repeat(filled[:, None].astype(np.float32) - 0.5, 4, axis=1), np.ones((len(boxes), 4))

    def postprocess(self, masks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        assert masks.shape == (1, 1, *shape)
        return masks


def test_places_of_boxes_by_hand(script: Any) -> None:
    """A filled box is π/4 of an ellipse; one that is moved by a quarter of its width has a quarter outside."""
    module = script("box_places")
    photos = sorted(PHOTOS.glob("*.jpg"))[:2]
    for moved in (0.0, 0.25):
        found = module.measure(Fills(moved), photos, 512)["50-100"]
        assert found["outside"] == pytest.approx(moved, abs=0.02)
        if not moved:
            assert found["iou"] == pytest.approx(np.pi / 4, abs=0.01)


def test_weights_are_averaged_by_their_share(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other, output = (tmp_path / name for name in ("first.pt", "other.pt", "averaged.pt"))
    torch.save({"w": torch.tensor([1.0, 2.0]).half(), "n": torch.tensor(5)}, first)
    torch.save({"w": torch.tensor([3.0, -2.0]).half(), "n": torch.tensor(7)}, other)
    words = ["average_weights.py", str(first), str(other), "--share", "0.25", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    script("average_weights").main()
    found = torch.load(output, weights_only=True)
    assert found["w"].dtype == torch.float16
    assert found["w"].tolist() == [1.5, 1.0]
    assert found["n"] == 5
    torch.save({"w": torch.zeros(3).half(), "n": torch.tensor(7)}, other)
    with pytest.raises(SystemExit, match="not of the same network"):
        script("average_weights").main()


def test_memory_of_a_process_and_its_child(script: Any) -> None:
    module = script("distill_watch")
    found = []
    for size in (0, 200_000_000):
        process = subprocess.Popen([sys.executable, "-c", PARENT, str(size)])
        seen: list[int] = []
        samples = module.watch(process, lambda seen=seen: seen.append(1) or len(seen), stop=20)  # type: ignore[misc]
        process.wait()
        found.append(module.summary(samples, 20))
        child = module.children(process.pid)
        assert child == []
    assert found[1]["steady_mb"] - found[0]["steady_mb"] == pytest.approx(200, abs=20)
    assert found[1]["workers_steady_mb"] - found[0]["workers_steady_mb"] == pytest.approx(200, abs=20)
    assert found[1]["open_files"] >= 6


def test_a_damaged_cache_is_proven_to_be_made_again(script: Any, tmp_path: Path) -> None:
    module = script("distill_proof")
    found = module.cache(tmp_path, argparse.Namespace(size=128, seed=1))
    assert found["holds"] is True
    assert found["changed"]["shard"] in found["said"][0]
    assert any("holds" in line for line in module.lines("cache", found))


def test_scale_on_a_few_images(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pass leaves what its cached updates take, and the shards of linked images are taken for whole."""
    module = script("distill_scale")
    values = {"WORK": tmp_path, "BASE": 8, "SHARD": 2, "SIZES": (8, 16), "HELD": 2, "WARMUP": 1, "BATCH": 1,
              "WHOLE_BATCH": 2}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)
    options = argparse.Namespace(images=[PHOTOS], student=None, teacher="reference", updates=3, threads=1)
    first = module.teacher_pass(options)
    second = module.cached(options)
    for section in (first, second):
        assert section["at"].keys() == {"8", "16"}
        assert 0.5 < section["ratio"]["steady"] < 2
        assert all(one["images_per_second"] > 0 for one in section["at"].values())
    assert len(list((tmp_path / "cache-16").glob("shard-*.npy"))) == 8
    record = json.loads((tmp_path / "run-cached" / "run.json").read_text(encoding="utf-8"))
    assert (record["images"], record["step"], record["finished"]) == (16, 3, True)
    third = module.whole(options)
    assert third.keys() == {"cached", "fly"}
    assert [one["updates"] for one in third["cached"]["at"].values()] == [3, 7], "every image but two, two at a time"
    assert third["cached"]["ratio"].keys() == {"before_updates", "peak", "steady"}
    assert len(module.describe("whole", third)) == 2
