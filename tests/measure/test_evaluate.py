"""Whole evaluations of the shipped bundle: IoUs are pycocotools', however many processes there are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the eval extra")
coco_mask = pytest.importorskip("pycocotools.mask", reason="needs the eval extra")

from edgesam_deploy.bundle import shipped_bundle
from edgesam_deploy.errors import EdgeSAMError, ImageError, InputError, MissingExtraError
from edgesam_deploy.images import read_image
from edgesam_deploy.measure.datasets import open_dataset
from edgesam_deploy.measure.evaluate import EvalOptions, ImageResult, PackedMask, evaluate
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.stages.evaluate import BundleModel

from .. import made_up_datasets as made

MODEL = BundleModel(shipped_bundle())


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"coco:{made.coco(tmp_path_factory.mktemp('coco'))}"


@pytest.fixture(scope="module")
def results(coco: str) -> list[ImageResult]:
    options = EvalOptions(("box", "click", "clicks"), baselines=True, threads=1)
    return list(evaluate(MODEL.open, [open_dataset(coco)], options, MODEL.open))


def test_ious_are_pycocotools(coco: str, results: list[ImageResult]) -> None:
    """Every box's two answers, through the public Predictor."""
    expected = []
    with MODEL.bundle.open(threads=1) as predictor:
        for image in open_dataset(coco).images:
            predictor.set_image(read_image(image.path))
            for target in image.targets(made.HW):
                single, others = (predictor.predict(box=target.box_xyxy, multimask_output=m) for m in (False, True))
                masks = np.concatenate([single.masks, others.masks])
                best = np.concatenate([single.iou_predictions, others.iou_predictions]).argmax()
                encoded = [
                    coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))
                    for m in (masks[0], masks[best], target.mask)
                ]
                expected += coco_mask.iou(encoded[:2], encoded[2:], [0])[:, 0].tolist()
    records = [r for result in results for r in result.records if r.against == "truth" and r.prompt == "box"]
    found = [r.iou for r in records if r.answer in ("single", "by predicted IoU")]
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(found) == 6
    assert 0 < min(found) < max(found) < 1


def test_records_say_what_they_are_of(results: list[ImageResult]) -> None:
    assert [r.image for r in results] == ["images/1.jpg", "images/2.jpg"]
    first = results[0].records[0]
    assert (first.dataset.split(":")[0], first.group, first.target, first.source) == ("coco", "1", "11", "polygons")
    assert first.size == "medium"
    kinds = {(r.against, r.prompt, r.answer) for r in results[0].records}
    assert len(kinds) == 2 + 2 + 3 + 2 + 4
    agreed = [r for r in results[0].records if r.against == "teacher"]
    assert {r.iou for r in agreed if r.answer == "same index"} == {1.0}, "it is its own teacher"
    worst = results[0].worst
    assert worst is not None
    boxes = [r.iou for r in results[0].records if (r.against, r.prompt, r.answer) == ("truth", "box", "single")]
    assert worst.record.iou == min(boxes)


def test_as_many_processes_as_one_likes_give_the_same(coco: str, results: list[ImageResult]) -> None:
    options = EvalOptions(("box", "click", "clicks"), baselines=True, workers=2, threads=2)
    found = list(evaluate(MODEL.open, [open_dataset(coco)], options, MODEL.open))
    assert [r.records for r in found] == [r.records for r in results]
    assert [(r.image, r.path, r.hw) for r in found] == [(r.image, r.path, r.hw) for r in results]
    pairs = [(a.worst, b.worst) for a, b in zip(found, results, strict=True)]
    assert all(a and b and (a.record, a.truth, a.answer) == (b.record, b.truth, b.answer) for a, b in pairs)


def test_what_goes_wrong_in_a_process_is_raised_here(tmp_path: Path) -> None:
    folder = made.masks(tmp_path)
    (folder / "b.jpg").write_bytes(b"no photograph")
    with pytest.raises(ImageError, match=r"b\.jpg is not a readable image"):
        list(evaluate(MODEL.open, [open_dataset(f"masks:{folder}")], EvalOptions(("box",), workers=2)))


@contextmanager
def without_backend(threads: int | None) -> Iterator[Predictor]:
    raise MissingExtraError("openvino", "openvino", "run something else")
    yield


def test_an_error_survives_the_way_between_processes() -> None:
    import pickle

    with pytest.raises(MissingExtraError) as raised, without_backend(1):
        pass
    sent = pickle.loads(pickle.dumps(raised.value))
    assert str(sent) == str(raised.value)
    assert (sent.module, sent.extra) == ("openvino", "openvino")


def test_datasets_of_one_name_are_refused(coco: str) -> None:
    with pytest.raises(InputError, match="two datasets are called coco:"):
        list(evaluate(MODEL.open, [open_dataset(coco)] * 2, EvalOptions()))


@pytest.mark.parametrize("prompts", [(), ("box", "box"), ("scribble",)])
def test_prompts_are_some_of_three(prompts: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="prompts must be some of box, click, clicks, each once"):
        EvalOptions(prompts)


def test_a_packed_mask_is_the_mask() -> None:
    mask = made.disc(12, 9, 7.5, (31, 45))
    assert np.array_equal(PackedMask.pack(mask).unpack(), mask)


def test_a_process_that_dies_is_told_of(tmp_path: Path) -> None:
    dataset = open_dataset(f"masks:{made.masks(tmp_path)}")
    with pytest.raises(EdgeSAMError, match="a worker process ended before its work was done"):
        list(evaluate(die, [dataset], EvalOptions(("box",), workers=2)))


def die(threads: int | None) -> Any:
    os._exit(9)


@dataclass(frozen=True, slots=True)
class Busy:
    """Tells where it was opened, and never gets done."""

    folder: Path

    @contextmanager
    def open(self, threads: int | None) -> Iterator[Predictor]:
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)
        with MODEL.open(threads) as predictor:
            yield predictor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_killed_one(tmp_path: Path, number: signal.Signals) -> None:
    images, opened = made.masks(tmp_path / "images"), tmp_path / "opened"
    opened.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", KILLED, images, opened], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120
        while len(workers := [int(path.name) for path in opened.iterdir()]) < 2:
            assert parent.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        parent.send_signal(number)
        parent.wait()
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.01)


KILLED = f"""
import sys
from pathlib import Path
from {__name__} import Busy, EvalOptions, evaluate, open_dataset
list(evaluate(Busy(Path(sys.argv[2])).open, [open_dataset("masks:" + sys.argv[1])], EvalOptions(("box",), workers=2)))
"""


def alive(pid: int) -> bool:
    """A zombie is not: whoever took the orphan in may wait for nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
