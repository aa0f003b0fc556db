"""Images by number: from folders and from tar files the same ones, in the same order; what is no corpus says so."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesam_deploy.distill.corpus import Corpus
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
