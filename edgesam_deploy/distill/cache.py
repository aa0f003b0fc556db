"""A teacher's embeddings of a corpus, computed once: FP16 shards that are memory-mapped, hashed and resumable.

    cache.json                what it is of: teacher, images, shapes
    shard-000000.npy          (n,C,E,E) float16, the embeddings of images n*k to n*k+n-1
    shard-000000.json         its sha256, written after it: a shard without one is not finished
    .lock                     held by the run that fills it

Shards stand alone: a pass that was stopped goes on with the first one missing, several processes share the work by
taking every n-th, and one that is damaged is found by its hash, named and made again. A megabyte for every two
embeddings of (256,32,32), half an embedding of (256,64,64).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.distill.corpus import Corpus
from edgesam_deploy.distill.teacher import Teacher, encoder_input
from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.files import clean_unfinished, locked, sha256_bytes, sha256_file, write_json, writing

KEY, SCHEMA = "cache.json", 1
FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What embeddings depend on. shape: (C,E,E). images, digest: of the corpus. teacher_input_sha256: of how its images
    are prepared."""

    teacher: str
    teacher_sha256: str
    teacher_input_sha256: str
    image_size: int
    shape: tuple[int, int, int]
    images: int
    images_sha256: str
    shard_size: int
    schema: int = SCHEMA


class TeacherCache:
    """The embeddings of every image of a corpus, in ``folder``. ``fill`` computes what is missing."""

    def __init__(self, folder: Path, teacher: Teacher, corpus: Corpus, shard_size: int) -> None:
        """Raises InputError where ``folder`` holds a cache of something else."""
        self.folder, self._teacher, self._corpus = folder, teacher, corpus
        geometry = teacher.geometry
        shape = (geometry.embedding_channels, geometry.embedding_size, geometry.embedding_size)
        self.key = CacheKey(
            teacher=teacher.name,
            teacher_sha256=teacher.digest,
            teacher_input_sha256=input_digest(teacher),
            image_size=geometry.image_size,
            shape=shape,
            images=len(corpus),
            images_sha256=corpus.digest(),
            shard_size=shard_size,
        )
        self._checked: set[int] = set()
        self._check_key()

    @property
    def shards(self) -> int:
        return -(-len(self._corpus) // self.key.shard_size)

    @property
    def bytes(self) -> int:
        """What the whole cache takes on disk, less some hundred bytes a shard."""
        return len(self._corpus) * 2 * int(np.prod(self.key.shape))

    def fill(
        self,
        batch: int,
        rank: int = 0,
        world: int = 1,
        say: Callable[[str], None] = lambda message: None,
        progress: Callable[[Iterator[int], int], Iterator[int]] = lambda items, total: items,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[int, int]:
        """Check every ``world``-th shard, from ``rank`` on, and make those that are missing or damaged: (how many were
        made, how many are left because ``stop``, asked after each, said so).

        say: told each shard that is damaged. Raises ImageError for an image that cannot be read, CheckpointError for a
        teacher whose embeddings are not finite in FP16.
        """
        mine = range(rank, self.shards, world)
        todo = []
        for shard in mine:
            if (problem := self._problem(shard)) is None:
                self._checked.add(shard)
                continue
            if problem:
                say(f"{self._path(shard)} {problem}: computing it again")
            todo.append(shard)
        images = [i for shard in todo for i in self._range(shard)]
        counter = iter(progress(iter(images), len(images)))
        for made, shard in enumerate(todo, start=1):
            self._make(shard, batch, counter)
            self._checked.add(shard)
            if stop():
                return made, len(todo) - made
        return len(todo), 0

    def trust(self) -> None:
        """Every shard has been checked, by this process or another one."""
        self._checked = set(range(self.shards))

    def __getitem__(self, index: int) -> npt.NDArray[np.float16]:
        """(C,E,E) of one image. Raises CheckpointError for a shard that is not whole."""
        shard, row = divmod(index, self.key.shard_size)
        path = self._path(shard)
        if shard not in self._checked:
            if (problem := self._problem(shard)) is not None:
                raise CheckpointError(
                    f"{path} {problem or 'is missing'}: run the same command again, which computes it"
                )
            self._checked.add(shard)
        # No mapping stays: what was read of it would count as this process's memory, and a process may have 65,530.
        try:
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[row])
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} is not what was written ({error}): run the same command again") from error

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes, which have no use for the teacher."""
        return {**self.__dict__, "_teacher": None}

    @contextmanager
    def alone(self, say: Callable[[str], None]) -> Iterator[None]:
        """One run at a time fills a cache; others wait here. say: told that it does."""
        with locked(self.folder, lambda: say(f"another run computes embeddings in {self.folder}: waiting for it")):
            clean_unfinished(self.folder)
            yield

    def _check_key(self) -> None:
        path = self.folder / KEY
        wanted = json.loads(json.dumps(asdict(self.key)))
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(found, dict):
                    raise ValueError("not a JSON object")
            except (OSError, ValueError) as error:
                raise InputError(f"{path} is not a teacher cache's: {error}. Give another --cache") from error
            if different := [name for name in wanted if found.get(name) != wanted[name]]:
                name = different[0]
                raise InputError(
                    f"{self.folder} holds embeddings of something else ({name} is {found.get(name)!r}, expected "
                    f"{wanted[name]!r}): give another --cache, or delete that one"
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty and no teacher cache: give another --cache")
        write_json(path, wanted)

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.npy"

    def _range(self, shard: int) -> range:
        start = shard * self.key.shard_size
        return range(start, min(start + self.key.shard_size, len(self._corpus)))

    def _problem(self, shard: int) -> str | None:
        """What is wrong with a shard: nothing (None), not made yet (""), or what to call its damage."""
        path = self._path(shard)
        record = path.with_suffix(".json")
        if not record.is_file():
            return ""
        if not path.is_file():
            return "is missing"
        try:
            wanted = str(json.loads(record.read_text(encoding="utf-8"))["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return f"has no readable {record.name}"
        found = sha256_file(path)
        return None if found == wanted else f"is damaged (sha256 {found[:12]}…, expected {wanted[:12]}…)"

    def _make(self, shard: int, batch: int, counter: Iterator[int]) -> None:
        path, indices = self._path(shard), self._range(shard)
        path.with_suffix(".json").unlink(missing_ok=True)
        with writing(path) as temporary:
            self._write(temporary, indices, batch, counter)
            digest = sha256_file(temporary)
        write_json(path.with_suffix(".json"), {"sha256": digest, "images": len(indices)})

    def _write(self, path: Path, indices: range, batch: int, counter: Iterator[int]) -> None:
        """By ordinary writes: a mapping of a file that outgrows the disk ends the process, a write says so."""
        geometry, pixels = self._teacher.geometry, self._teacher.pixels
        with path.open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (len(indices), *self.key.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(indices), batch):
                chunk = indices[start : start + batch]
                inputs = [encoder_input(self._corpus.read(i), geometry, pixels) for i in chunk]
                embeddings = self._teacher.embed(np.stack(inputs))
                self._require_finite(embeddings, chunk)
                file.write(embeddings.astype("<f2").tobytes())
                for _ in chunk:
                    next(counter)

    def _require_finite(self, embeddings: npt.NDArray[np.float32], chunk: range) -> None:
        fits = np.isfinite(embeddings).all(axis=(1, 2, 3)) & (np.abs(embeddings) <= FLOAT16_MAX).all(axis=(1, 2, 3))
        if not fits.all():
            name = self._corpus.name(chunk[int(np.argmin(fits))])
            raise CheckpointError(
                f"the teacher '{self._teacher.name}' gives {name} an embedding that is not finite in FP16: its weights "
                "are damaged, or it needs the mode without a cache (--on-the-fly)"
            )


def input_digest(teacher: Teacher) -> str:
    """Hex sha256 of what happens to an image before the teacher's weights see it."""
    parts = {"geometry": asdict(teacher.geometry), "pixels": asdict(teacher.pixels)}
    return sha256_bytes(json.dumps(parts, sort_keys=True).encode())
