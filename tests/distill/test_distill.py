"""``sam-export distill`` on a dozen photographs: it learns, stops, goes on to the same bits, and says what is wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch", reason="needs the export extra")

import timm
from PIL import Image

from edgesam_deploy.cli import main
from edgesam_deploy.distill import objectives
from edgesam_deploy.distill.agreement import BOXES, CLICKS
from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.objectives import embedding_loss
from edgesam_deploy.files import sha256_file
from edgesam_deploy.masks import mask_iou
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.prompts import check_prompts
from edgesam_deploy.recipe import load_recipe
from edgesam_deploy.transforms import resized_hw

SHORT = ("--epochs", 2, "--batch", 2, "--held", 2, "--warmup", 2, "--threads", 1, "--log-every", 1, "--shard-size", 5)
UPDATES, COUNT = 10, 12


@pytest.fixture
def words(tiny_recipe: Path, student_recipe: Path, checkpoint: Path, photographs: Path) -> list[str]:
    return [str(student_recipe), "--teacher", str(tiny_recipe), "--checkpoint", str(checkpoint), "--images",
            str(photographs), *map(str, SHORT)]  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["distill", *map(str, arguments)], prog_name="sam-export")


def answer(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def test_a_student_learns_and_keeps_the_decoder(
    words: list[str], tmp_path: Path, tiny_recipe: Path, student_recipe: Path, checkpoint: Path, photographs: Path
) -> None:
    found = answer(*words, "--epochs", 12, "--lr", 2e-3, "--check-every", 20, "-o", tmp_path)
    assert (found["finished"], found["step"], found["total"], found["images"]) == (True, 60, 60, 10)
    log, checks = rows(tmp_path / "log.csv"), rows(tmp_path / "checks.csv")
    assert [int(r["step"]) for r in log] == list(range(1, 61))
    assert np.mean([float(r["loss"]) for r in log[-5:]]) < 0.8 * np.mean([float(r["loss"]) for r in log[:5]])
    assert [int(r["step"]) for r in checks] == [20, 40, 60]
    assert float(checks[-1]["cosine"]) > float(checks[0]["cosine"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "cache", "checks.csv", "log.csv", "run.json", "samples", "student.pt",
    ]  # fmt: skip
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["agreement"] == found["agreement"]
    assert record["options"]["lr"] == 2e-3
    # Two images of two views, each with the teacher's row and the student's.
    with Image.open(tmp_path / "samples" / "step-000060.png") as picture:
        assert picture.size == (4 * 256, 2 * 2 * 256)
    recipe, teacher_recipe = load_recipe(student_recipe), load_recipe(tiny_recipe)
    student, teacher = load_model(recipe, tmp_path / "student.pt"), load_model(teacher_recipe, checkpoint)
    for part in ("prompt_encoder", "mask_decoder"):
        mine, theirs = (getattr(m, part).state_dict() for m in (student, teacher))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    # The agreement, asked again through the Predictor.
    corpus = Corpus([photographs])
    both = reference_predictor(student, recipe), reference_predictor(teacher, teacher_recipe)
    clicks, boxes = [], []
    for index in (0, len(corpus) - 1):
        image = corpus.read(index)
        size = np.array([image.shape[1], image.shape[0]])
        for predictor in both:
            predictor.set_image(image)
        h, w = resized_hw((image.shape[0], image.shape[1]), 32)
        points = (np.array(CLICKS) * size)[:, None]
        for prompts, into in (
            (check_prompts(points, np.ones((len(points), 1)), None, image.shape[:2]), clicks),
            (check_prompts(None, None, np.array(BOXES) * np.tile(size, 2), image.shape[:2]), boxes),
        ):
            (mine, _), (theirs, scores) = (p.decode(prompts) for p in both)
            chosen = 1 + scores[:, 1:].argmax(1) if into is clicks else np.zeros(len(scores), int)
            into += [mask_iou(m[c, :h, :w] > 0, t[c, :h, :w] > 0) for m, t, c in zip(mine, theirs, chosen, strict=True)]
    assert found["agreement"]["click_iou"] == pytest.approx(np.mean(clicks), abs=2e-3)
    assert found["agreement"]["box_iou"] == pytest.approx(np.mean(boxes), abs=2e-3)


@pytest.mark.parametrize("way", ["killed", "time"])
def test_a_stopped_run_ends_with_the_same_bits(words: list[str], tmp_path: Path, way: str) -> None:
    whole = answer(*words, "--colours", 0.5, "-o", tmp_path / "whole", "--cache", tmp_path / "cache")
    again = [*words, "--colours", "0.5", "-o", str(tmp_path / "again"), "--cache", str(tmp_path / "cache"),
             "--save-every", "0"]  # fmt: skip
    if way == "time":
        stopped = answer(*again, "--max-hours", 1e-9)
        assert (stopped["finished"], stopped["step"]) == (False, 1)
        assert (tmp_path / "again" / "student.pt").is_file()
    else:
        command = [sys.executable, "-m", "edgesam_deploy", "distill", *again]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        log, deadline = tmp_path / "again" / "log.csv", time.monotonic() + 120
        while not (log.exists() and len(rows(log)) >= UPDATES // 2):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "again" / "state.pt").is_file()
    done = answer(*again)
    assert answer(*again) == {**done, "seconds": pytest.approx(done["seconds"], abs=0.1)}, "finished: nothing to do"
    assert (done["finished"], done["step"]) == (True, UPDATES)
    assert [int(r["step"]) for r in rows(tmp_path / "again" / "log.csv")] == list(range(1, UPDATES + 1))
    first, second = (weights(tmp_path / name / "student.pt") for name in ("whole", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert done["sha256"] == whole["sha256"]


def test_a_network_with_dropout_goes_on_to_the_same_bits(words: list[str], tiny_recipe: Path, tmp_path: Path) -> None:
    """TinyViT drops a tenth of its paths."""
    text = tiny_recipe.read_text(encoding="utf-8").replace("hgnetv2_b0", "tiny_vit_11m_224")
    words[0] = str(tmp_path / "vit.toml")
    Path(words[0]).write_text(text, encoding="utf-8")
    words += ["--cache", str(tmp_path / "cache"), "--epochs", "1"]
    whole = answer(*words, "-o", tmp_path / "whole")
    stopped = answer(*words, "-o", tmp_path / "again", "--max-hours", 1e-9)
    assert (stopped["finished"], whole["total"]) == (False, 5)
    assert answer(*words, "-o", tmp_path / "again")["sha256"] == whole["sha256"]


def test_two_processes_learn_what_one_learns(words: list[str], tmp_path: Path) -> None:
    """Same images an update, plain gradient descent, batch statistics frozen: then only rounding differs."""
    same = [*words, "--optimizer", "sgd", "--freeze-norm", "--lr", "0.05", "--cache", str(tmp_path / "cache")]
    answer(*same, "--batch", 4, "-o", tmp_path / "one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "edgesam_deploy", "distill", *same, "--batch", "2", "-o", str(tmp_path / "two"), "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] is True
    one, two = ([float(r["loss"]) for r in rows(tmp_path / name / "log.csv")] for name in ("one", "two"))
    assert len(one) == len(two) == 5
    assert two == pytest.approx(one, abs=1e-4)
    assert one[-1] != one[0]


def test_on_the_fly_with_views(words: list[str], tmp_path: Path) -> None:
    found = answer(*words, "--on-the-fly", "--views", 1, "--accumulate", 2, "--loss", "cosine", "-o", tmp_path)
    assert (found["step"], found["total"]) == (5, 5)
    assert not (tmp_path / "cache").exists()
    assert all(0 <= float(r["loss"]) < 2 for r in rows(tmp_path / "log.csv"))


def test_masks_are_learnt_after_embeddings(words: list[str], tmp_path: Path, checkpoint: Path) -> None:
    first = answer(*words, "-o", tmp_path / "first", "--cache", tmp_path / "cache")
    again = [*words, "--cache", tmp_path / "cache", "--rounds", 2, "--prompts", 4, "--init", first["checkpoint"]]
    kept = answer(*again, "-o", tmp_path / "encoder")
    learnt = answer(*again, "-o", tmp_path / "decoder", "--decoder-learns")
    before = weights(checkpoint)
    for found, changed in ((kept, False), (learnt, True)):
        after = weights(Path(found["checkpoint"]))
        name = "mask_decoder.mask_tokens.weight"
        assert (not torch.equal(after[name], before[name].float())) is changed
        name = "prompt_encoder.point_embeddings.0.weight"
        assert torch.equal(after[name], before[name].float())


def test_losses_by_hand() -> None:
    a, b = torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[[3.5]], [[2.0]]]])
    assert embedding_loss("l1", a, b).item() == pytest.approx((0.5 + 2) / 2)
    assert embedding_loss("mse", a, b).item() == pytest.approx((0.25 + 4) / 2)
    assert embedding_loss("huber", a, b).item() == pytest.approx((0.125 + 1.5) / 2)
    cosine = (3 * 3.5 + 4 * 2) / (5 * np.hypot(3.5, 2))
    assert embedding_loss("cosine", a, b).item() == pytest.approx(1 - cosine)


def test_a_student_begins_with_a_backbone_that_knows_images(
    words: list[str], tmp_path: Path, student_recipe: Path
) -> None:
    whole = timm.create_model(str(load_recipe(student_recipe).options["backbone"]), pretrained=False)
    file = tmp_path / "model.pt"
    torch.save(whole.state_dict(), file)
    still = ("--epochs", 0.2, "--lr", 1e-12, "--ema", 0, "--freeze-norm")
    answer(*words, *still, "--backbone", file, "-o", tmp_path / "run")
    found = weights(tmp_path / "run" / "student.pt")
    prefix = "image_encoder.backbone."
    mine = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    assert len(mine) > 100
    for name, tensor in whole.state_dict().items():
        if name in mine:
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-9)
    assert set(mine) <= set(whole.state_dict())
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["backbone_sha256"] == sha256_file(file)
    assert record["init_sha256"] is None


WRONG: dict[str, tuple[list[object], int, str]] = {
    "views": (["--views", 0.5], 2, "random views need the teacher beside: --on-the-fly, or --views 0"),
    "both": (["--on-the-fly", "--cache", "x"], 2, "--on-the-fly keeps no cache"),
    "teacher": (["--teacher", "nothing"], 2, "nothing"),
    "images": (["--images", "/nowhere"], 2, "/nowhere does not exist; expected a folder of images or a .tar file"),
    "init": (["--init", "/nowhere.pt"], 1, "/nowhere.pt"),
    "backbone": (["--backbone", "/nowhere.pt"], 1, "/nowhere.pt"),
    "init and backbone": (["--init", "a.pt", "--backbone", "b.pt"], 2, "give --init or --backbone"),
    "lr": (["--lr", 1e9, "--ema", 0], 1, "start again with a lower --lr"),
}


@pytest.mark.parametrize(("more", "code", "says"), WRONG.values(), ids=WRONG)
def test_wrong_requests_end_in_one_line(
    words: list[str], tmp_path: Path, more: list[object], code: int, says: str
) -> None:
    result = run(*words, "-o", tmp_path, *more)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_from_any_process(words: list[str], tmp_path: Path, workers: int) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 30), (50 * number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    words[words.index("--images") + 1] = str(tmp_path / "images")
    result = run(*words, "--on-the-fly", "--workers", workers, "-o", tmp_path / "out")
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.fullmatch(r"error: \S+/images/2\.png is not a readable image: .*", lines[0])


@pytest.mark.parametrize("what", ["image", "loss"])
def test_a_process_that_fails_ends_and_its_loader_too(words: list[str], tmp_path: Path, what: str) -> None:
    if what == "image":
        (tmp_path / "images").mkdir()
        for number in range(4):
            Image.new("RGB", (40, 30), (50 * number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / "2.png").write_bytes(b"no image")
        words[words.index("--images") + 1] = str(tmp_path / "images")
    more = ["--lr", "1e9", "--ema", "0"] if what == "loss" else []
    command = [sys.executable, "-m", "edgesam_deploy", "distill", *words, *more, "--on-the-fly", "--workers", "1"]
    done = subprocess.run([*command, "-o", tmp_path / "out"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert ("2.png is not a readable image" if what == "image" else "start again with a lower --lr") in line


def test_damaged_images_can_be_left_out(words: list[str], tmp_path: Path, photographs: Path) -> None:
    """And then the run is that of the others alone."""
    shutil.copytree(photographs, tmp_path / "images")
    place = words.index("--images") + 1
    words[place] = str(tmp_path / "images")
    damaged = tmp_path / "images" / "between.jpg"
    damaged.write_bytes(b"no image")
    result = run(*words, "--skip-damaged", "-o", tmp_path / "all", "--json")
    assert result.exit_code == 0, result.output
    assert f"1 of {COUNT + 1} images cannot be read and are left out: {tmp_path}/all/damaged.json" in result.stderr
    listed = json.loads((tmp_path / "all" / "damaged.json").read_text(encoding="utf-8"))["damaged"]
    assert [entry["name"] for entry in listed] == ["between.jpg"]
    damaged.unlink()
    assert answer(*words, "-o", tmp_path / "others")["sha256"] == json.loads(result.stdout)["sha256"]


def test_another_run_does_not_replace_a_finished_one(words: list[str], tmp_path: Path) -> None:
    done = answer(*words, "-o", tmp_path)
    log = (tmp_path / "log.csv").read_bytes()
    result = run(*words, "-o", tmp_path, "--epochs", 3)
    assert result.exit_code == 2
    assert "holds a finished run with other options, images, teacher or student (its options" in result.stderr
    assert (sha256_file(tmp_path / "student.pt"), (tmp_path / "log.csv").read_bytes()) == (done["sha256"], log)


def test_a_time_limit_in_the_teachers_pass(words: list[str], tmp_path: Path) -> None:
    stopped = run(*words, "-o", tmp_path / "out", "--max-hours", 1e-9)
    assert stopped.exit_code == 0, stopped.output
    assert "stopped at the time limit in the teacher's pass, 1 shards further, 2 to go" in stopped.stderr
    assert stopped.stdout == "stopped at the time limit: the same command goes on\n"
    assert sorted(p.name for p in (tmp_path / "out" / "cache").glob("*.npy")) == ["shard-000000.npy"]
    limited = answer(*words, "-o", tmp_path / "out", "--max-hours", 1e-9)
    assert (limited["finished"], limited["step"], limited["checkpoint"]) == (False, 0, None)
    assert answer(*words, "-o", tmp_path / "out")["sha256"] == answer(*words, "-o", tmp_path / "whole")["sha256"]


def test_two_runs_do_not_share_a_folder(words: list[str], tmp_path: Path, holding: Any) -> None:
    with holding(tmp_path):
        refused = run(*words, "-o", tmp_path)
    assert refused.exit_code == 2
    assert f"another run is at work in {tmp_path}: wait for it, or give another -o" in refused.stderr
    assert answer(*words, "-o", tmp_path)["finished"]


def test_a_gradient_that_is_not_finite_ends_the_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finite loss: the slope of the root at 0 is infinite."""
    monkeypatch.setattr(objectives, "embedding_loss", lambda kind, mine, theirs: (mine - mine.detach()).sum().sqrt())
    result = run(*words, "-o", tmp_path, "--save-every", 0)
    assert result.exit_code == 1
    assert "the gradient is nan at step 0: start again with a lower --lr" in result.stderr
    assert not (tmp_path / "state.pt").exists()


def test_another_runs_state_is_refused(words: list[str], tmp_path: Path) -> None:
    words.append("--on-the-fly")  # a teacher's pass would be stopped first
    answer(*words, "-o", tmp_path, "--max-hours", 1e-9)
    result = run(*words, "-o", tmp_path, "--lr", 1e-3)
    assert result.exit_code == 1
    assert "is of a run with other options, images, teacher or student" in result.stderr
    (tmp_path / "state.pt").write_bytes(b"cut")
    result = run(*words, "-o", tmp_path)
    assert result.exit_code == 1
    assert "state.pt is not the state of a run" in result.stderr
