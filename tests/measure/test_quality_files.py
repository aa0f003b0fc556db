"""Records as CSV: their bytes, the memory they take, and what an error in the middle leaves."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="needs the eval extra")

from edgesam_deploy.measure.evaluate import ImageResult, MaskRecord
from edgesam_deploy.measure.quality_files import write_images, write_masks


def record(**others: Any) -> MaskRecord:
    fields = {
        "dataset": "coco:a/b.json", "image": "é, 1.jpg", "group": "1", "target": "11", "area": 10.5, "size": "small",
        "source": None, "against": "truth", "prompt": "box", "answer": "single", "iou": 0.25, "predicted_iou": None,
        "boundary_f": 1.0,
    }  # fmt: skip
    return MaskRecord(**{**fields, **others})


def test_a_line_for_each_mask(tmp_path: Path) -> None:
    write_masks(tmp_path / "masks.csv", [record(), record(source='a "b"', predicted_iou=0.5)])
    assert (tmp_path / "masks.csv").read_bytes().decode("utf-8").split("\n") == [
        "dataset,image,group,target,area,size,source,against,prompt,answer,iou,predicted_iou,boundary_f",
        'coco:a/b.json,"é, 1.jpg",1,11,10.5,small,,truth,box,single,0.25,,1.0',
        'coco:a/b.json,"é, 1.jpg",1,11,10.5,small,"a ""b""",truth,box,single,0.25,0.5,1.0',
        "",
    ]


def test_a_line_for_each_image_with_every_answer(tmp_path: Path) -> None:
    """The second image has an answer more, and lacks none of the first's columns."""
    first = (record(), record(target="12", iou=0.75))
    second = (record(prompt="click", iou=1.0), record(against="teacher", iou=0.5))
    results = [
        ImageResult("d", name, name, Path(name), (60, 90), rs, None) for name, rs in (("a", first), ("b", second))
    ]
    write_images(tmp_path / "images.csv", results)
    assert (tmp_path / "images.csv").read_text(encoding="utf-8").splitlines() == [
        'dataset,image,group,width,height,targets,"box, single","click, single","box, single (teacher)"',
        "d,a,a,90,60,2,0.5,,",
        "d,b,b,90,60,1,,1.0,0.5",
    ]


def test_the_text_of_many_masks_is_not_held_in_memory(tmp_path: Path) -> None:
    path, one = tmp_path / "masks.csv", record()
    tracemalloc.start()
    try:
        write_masks(path, (one for _ in range(20_000)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 20_001
    assert peak < path.stat().st_size / 2


def test_an_error_in_the_middle_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    def interrupted() -> Iterator[MaskRecord]:
        yield record()
        raise KeyboardInterrupt

    path = tmp_path / "masks.csv"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_masks(path, interrupted())
    assert [p.name for p in tmp_path.iterdir()] == ["masks.csv"]
    assert path.read_text() == "before"
