"""The teacher's embeddings on disk: right, resumable, and honest about damage."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.bundle import load_bundle
from edgesam_deploy.distill.cache import TeacherCache
from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.teacher import BundleTeacher, TorchTeacher, check_pair
from edgesam_deploy.errors import CheckpointError, ImageError, InputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.images import read_image
from edgesam_deploy.models import reference_predictor
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import load_recipe

SHARD = 5


class Counting(TorchTeacher):
    """Knows how many images it was asked."""

    asked = 0

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.asked += len(images)
        return super().embed(images)


@pytest.fixture
def teacher(tiny_recipe: Path, checkpoint: Path) -> Counting:
    recipe = load_recipe(tiny_recipe)
    return Counting(load_model(recipe, checkpoint), recipe, sha256_file(checkpoint))


def test_embeddings_are_the_predictors(photographs: Path, teacher: Counting, tmp_path: Path) -> None:
    corpus = Corpus([photographs])
    cache = TeacherCache(tmp_path / "cache", teacher, corpus, SHARD)
    assert (cache.shards, cache.fill(batch=2), teacher.asked) == (3, (3, 0), len(corpus))
    predictor = reference_predictor(teacher.model, teacher.recipe)
    for i in range(len(corpus)):
        predictor.set_image(read_image(photographs / corpus.name(i)))
        want = predictor.get_image_embedding()[0]
        assert cache[i].dtype == np.float16
        # Half a step of FP16 at the largest value.
        assert np.abs(cache[i] - want).max() <= 2**-11 * np.abs(want).max() + 1e-4
    size = sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.npy"))
    assert size == cache.bytes + 128 * cache.shards  # numpy's header


def test_a_stopped_pass_goes_on_and_two_processes_share_it(
    photographs: Path, teacher: Counting, tmp_path: Path
) -> None:
    corpus = Corpus([photographs])
    first = TeacherCache(tmp_path, teacher, corpus, SHARD)
    assert first.fill(2, rank=1, world=2) == (1, 0)
    assert teacher.asked == SHARD
    assert TeacherCache(tmp_path, teacher, corpus, SHARD).fill(2) == (2, 0)
    assert teacher.asked == len(corpus)
    # A shard without its hash was not finished.
    (tmp_path / "shard-000002.json").unlink()
    assert TeacherCache(tmp_path, teacher, corpus, SHARD).fill(2) == (1, 0)
    assert TeacherCache(tmp_path, teacher, corpus, SHARD).fill(2) == (0, 0)


def test_a_damaged_shard_is_found_named_and_made_again(photographs: Path, teacher: Counting, tmp_path: Path) -> None:
    corpus = Corpus([photographs])
    TeacherCache(tmp_path, teacher, corpus, SHARD).fill(2)
    path = tmp_path / "shard-000001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    cache = TeacherCache(tmp_path, teacher, corpus, SHARD)
    with pytest.raises(CheckpointError, match=r"shard-000001\.npy is damaged \(sha256 .*run the same command again"):
        cache[SHARD]
    said: list[str] = []
    assert cache.fill(2, say=said.append) == (1, 0)
    assert len(said) == 1
    assert "shard-000001.npy is damaged" in said[0]
    assert "computing it again" in said[0]
    assert path.read_bytes() == whole
    path.unlink()
    said.clear()
    assert TeacherCache(tmp_path, teacher, corpus, SHARD).fill(2, say=said.append) == (1, 0)
    assert "shard-000001.npy is missing" in said[0]
    (tmp_path / "shard-000001.json").write_text("{")
    said.clear()
    assert TeacherCache(tmp_path, teacher, corpus, SHARD).fill(2, say=said.append) == (1, 0)
    assert "has no readable shard-000001.json" in said[0]


def test_a_cache_of_something_else_is_refused(
    photographs: Path, teacher: Counting, tmp_path: Path, student_recipe: Path
) -> None:
    corpus = Corpus([photographs])
    TeacherCache(tmp_path, teacher, corpus, SHARD)
    with pytest.raises(InputError, match="holds embeddings of something else \\(shard_size is 5, expected 6\\)"):
        TeacherCache(tmp_path, teacher, corpus, SHARD + 1)
    otherwise = SimpleNamespace(name=teacher.name, digest=teacher.digest, geometry=teacher.geometry)
    otherwise.pixels = dataclasses.replace(teacher.pixels, mean=(1.0, 2.0, 3.0))
    with pytest.raises(InputError, match="teacher_input_sha256 is"):
        TeacherCache(tmp_path, otherwise, corpus, SHARD)
    teacher.digest = "other"
    with pytest.raises(InputError, match="teacher_sha256 is"):
        TeacherCache(tmp_path, teacher, corpus, SHARD)
    (tmp_path / "cache.json").write_text("[]")
    with pytest.raises(InputError, match="is not a teacher cache's"):
        TeacherCache(tmp_path, teacher, corpus, SHARD)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="is not empty and no teacher cache"):
        TeacherCache(tmp_path / "other", teacher, corpus, SHARD)


def test_loader_processes_read_it_themselves(photographs: Path, teacher: Counting, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, teacher, Corpus([photographs]), SHARD)
    cache.fill(3)
    wanted = cache[3].copy()
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 20_000
    assert np.array_equal(copy[3], wanted)


def test_a_pass_stops_between_shards_and_goes_on(photographs: Path, teacher: Counting, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, teacher, Corpus([photographs]), SHARD)
    assert cache.fill(2, stop=lambda: True) == (1, 2)
    assert teacher.asked == SHARD
    assert cache.fill(2) == (2, 0)


def test_reading_leaves_no_shard_mapped(photographs: Path, teacher: Counting, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, teacher, Corpus([photographs]), SHARD)
    cache.fill(3)
    held = [cache[i] for i in range(3 * SHARD - 3)]
    assert len(held) == 12
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_another_processs_check_is_trusted(photographs: Path, teacher: Counting, tmp_path: Path) -> None:
    corpus = Corpus([photographs])
    TeacherCache(tmp_path, teacher, corpus, SHARD).fill(2)
    (tmp_path / "shard-000001.json").unlink()
    cache = TeacherCache(tmp_path, teacher, corpus, SHARD)
    with pytest.raises(CheckpointError, match=r"shard-000001\.npy is missing"):
        cache[SHARD]
    cache.trust()
    assert cache[SHARD].shape == cache.key.shape


def test_one_run_at_a_time_fills_a_cache(
    photographs: Path, teacher: Counting, tmp_path: Path, holding: Callable[[Path], AbstractContextManager[None]]
) -> None:
    cache = TeacherCache(tmp_path, teacher, Corpus([photographs]), SHARD)
    others, said, entered = tmp_path / ".unfinished-others.npy", Queue[str](), Event()

    def fill() -> None:
        with cache.alone(said.put):
            entered.set()

    with holding(tmp_path):
        others.touch()
        waiting = Thread(target=fill)
        waiting.start()
        assert said.get(timeout=60) == f"another run computes embeddings in {tmp_path}: waiting for it"
        assert others.exists()
        assert not entered.is_set()
    waiting.join(60)
    assert entered.is_set()
    assert not others.exists(), "what a killed run left goes"


def test_an_overflowing_teacher_and_a_damaged_image_are_named(
    photographs: Path, teacher: Counting, tmp_path: Path
) -> None:
    corpus = Corpus([photographs])
    teacher.embed = lambda images: np.full((len(images), 256, 8, 8), 7e4, np.float32)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=rf"gives {corpus.name(0)} an embedding that is not finite in FP16"):
        TeacherCache(tmp_path / "a", teacher, corpus, SHARD).fill(2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"x\.png is not a readable image"):
        TeacherCache(tmp_path / "b", teacher, Corpus([tmp_path / "images"]), SHARD).fill(2)
    assert json.loads((tmp_path / "b" / "cache.json").read_text())["images"] == 1
    assert not list((tmp_path / "b").glob("*.npy"))


def test_a_bundle_can_teach(built: SimpleNamespace, teacher: Counting, photographs: Path) -> None:
    bundle = load_bundle(built.bundle)
    corpus = Corpus([photographs])
    inputs = np.stack([np.zeros((3, 128, 128), np.uint8), np.full((3, 128, 128), 200, np.uint8)])
    with bundle.open(1) as predictor:
        mine = BundleTeacher(bundle, predictor.encoder, bundle.pixels)
        assert mine.digest == bundle.manifest["files"]["encoder.onnx"]["sha256"]
        predictor.set_image(corpus.read(0))
        assert np.array_equal(mine.embed(predictor.preprocess(corpus.read(0))["image"]),
                              predictor.get_image_embedding())  # fmt: skip
        assert mine.embed(inputs).shape == teacher.embed(inputs).shape == (2, 256, 8, 8)


def test_a_student_that_cannot_stand_in_is_refused(teacher: Counting) -> None:
    with pytest.raises(InputError, match=r"of 256 channels, 8 x 8.*the student 'mobile_sam' has 256, 64"):
        check_pair(load_recipe("mobile_sam"), teacher)
    recipe = load_recipe("sam2.1_hiera_tiny")
    with pytest.raises(InputError, match="finer feature maps beside the embedding"):
        check_pair(recipe, teacher)
