"""Images by number: from folders and from tar files the same ones, in the same order; what is no corpus says so."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesam_deploy.distill import corpus as module
from edgesam_deploy.distill.corpus import Corpus, find_damaged
from edgesam_deploy.errors import ImageError, InputError


@pytest.fixture
def archive(photographs: Path, tmp_path: Path) -> Path:
    """The photographs in a tar file, last name first, with what is no image between them."""
    path = tmp_path / "shard-0.tar"
    with tarfile.open(path, "w") as tar:
        for file in sorted(photographs.iterdir(), reverse=True):
            tar.add(file, file.name)
            note = tarfile.TarInfo(f"{file.stem}.json")
            note.size = 2
            tar.addfile(note, io.BytesIO(b"{}"))
    return path


def test_a_tar_file_is_read_where_it_lies(photographs: Path, archive: Path) -> None:
    folder, tar = Corpus([photographs]), Corpus([archive])
    names = sorted(p.name for p in photographs.iterdir())
    assert [folder.name(i) for i in range(len(folder))] == [tar.name(i) for i in range(len(tar))] == names
    assert folder.digest() == tar.digest()
    for i in range(len(tar)):
        want = np.asarray(Image.open(photographs / names[i]).convert("RGB"))
        assert np.array_equal(tar.read(i), want)
        assert np.array_equal(folder.read(i), want)


def test_roots_follow_each_other_and_folders_are_searched_to_the_bottom(
    photographs: Path, archive: Path, tmp_path: Path
) -> None:
    shutil.copytree(photographs, tmp_path / "all" / "deep" / "below")
    both = Corpus([tmp_path / "all", archive])
    assert len(both) == 2 * len(Corpus([archive]))
    assert both.name(0).startswith("deep/below/")
    assert np.array_equal(both.read(0), both.read(len(both) // 2))
    assert both.digest() != Corpus([archive]).digest()


def test_another_set_of_images_has_another_digest(photographs: Path, tmp_path: Path) -> None:
    for file in photographs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    same = Corpus([tmp_path]).digest()
    assert same == Corpus([photographs]).digest()
    first = min(tmp_path.iterdir())
    first.write_bytes(first.read_bytes() + b"\0")
    assert Corpus([tmp_path]).digest() != same


def test_what_is_no_corpus(photographs: Path, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; expected a folder of images or a \.tar file"):
        Corpus([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        Corpus([photographs, tmp_path / "empty"])
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut off|not a whole, uncompressed tar file"):
        Corpus([archive])
    archive.write_bytes(b"no archive")
    with pytest.raises(InputError, match="not a whole, uncompressed tar file"):
        Corpus([archive])


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"a\.jpg is not a readable image"):
        Corpus([tmp_path]).read(0)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg")
    with pytest.raises(ImageError, match=r"b\.tar/a\.jpg is not a readable image"):
        Corpus([tmp_path / "b.tar"]).read(0)


def test_a_corpus_without_some_images_is_a_corpus_of_the_others(
    photographs: Path, archive: Path, tmp_path: Path
) -> None:
    whole = Corpus([photographs, archive])
    count = len(whole) // 2
    rest = whole.without([2, 0, count + 5])
    kept = [i for i in range(len(whole)) if i not in (0, 2, count + 5)]
    assert len(rest) == len(kept) == len(whole) - 3
    for i, before in enumerate(kept):
        assert rest.name(i) == whole.name(before)
        assert np.array_equal(rest.read(i), whole.read(before))
    assert len(whole) == 2 * count
    assert whole.without([]).digest() == whole.digest()
    shutil.copytree(photographs, tmp_path / "fewer")
    (tmp_path / "fewer" / whole.name(1)).unlink()
    assert Corpus([photographs]).without([1]).digest() == Corpus([tmp_path / "fewer"]).digest()
    assert len(Corpus([photographs]).without(range(count))) == 0


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_damaged_images_are_found_once(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    root = tmp_path / "images"
    shutil.copytree(photographs, root)
    names = sorted(p.name for p in root.iterdir())
    (root / names[1]).write_bytes((root / names[1]).read_bytes()[:-300])  # cut off
    (root / names[7]).write_bytes(b"no image")
    if form == "tar":
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            tar.add(root, "")
        root = tmp_path / "images.tar"
    corpus, record = Corpus([root]), tmp_path / "run" / "damaged.json"
    counted: list[int] = []
    assert find_damaged(corpus, record, 2, lambda items, total: (counted.append(i) or i for i in items)) == [1, 7]
    assert counted == list(range(len(corpus)))
    found = json.loads(record.read_text(encoding="utf-8"))
    assert [(entry["index"], entry["name"]) for entry in found["damaged"]] == [(1, names[1]), (7, names[7])]
    assert all(names[i] in entry["reason"] for i, entry in zip((1, 7), found["damaged"], strict=True))

    read: list[int] = []
    monkeypatch.setattr(module, "_unreadable", lambda corpus, index: read.append(index))
    assert find_damaged(corpus, record) == [1, 7]
    assert read == [], "it is known"
    record.write_text(json.dumps({**found, "checked": 5, "damaged": found["damaged"][:1]}), encoding="utf-8")
    assert find_damaged(corpus, record) == [1]
    assert sorted(read) == list(range(5, len(corpus))), "a stopped search goes on"
    for other in ("{", "[]", json.dumps({**found, "images_sha256": "of others"})):
        record.write_text(other, encoding="utf-8")
        read.clear()
        assert find_damaged(corpus, record) == []
        assert sorted(read) == list(range(len(corpus)))
