"""Images without labels, by index: folders (searched to the bottom) and tar files, as SA-1B comes in.

A tar file is not unpacked: its headers are read once, and an image is then read where it lies. That keeps what
streaming would lose, a fixed number for every image: shuffling is a permutation of numbers, and a run that was stopped
goes on at the same image. One image takes 20 bytes of memory and its name, so that SA-1B's 11 million fit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesam_deploy.errors import ImageError, InputError
from edgesam_deploy.files import write_json
from edgesam_deploy.images import SUFFIXES, read_image

# Images between two records of a search for damaged ones.
CHUNK = 1024


class Corpus:
    """All images below ``roots``, sorted by name within each. Raises InputError for none, or a broken tar file."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(roots)
        names = bytearray()
        ends: list[int] = []
        places: list[tuple[int, int, int]] = []
        for number, root in enumerate(self.roots):
            before = len(places)
            for name, offset, size in _members(root):
                names += os.fsencode(name)
                ends.append(len(names))
                places.append((number, offset, size))
            if len(places) == before:
                raise InputError(f"{root} holds no images; expected files ending in {', '.join(SUFFIXES)}")
        self._names = bytes(names)
        self._ends = np.array(ends, np.int64)
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """As its root knows it: a path below the folder, a member of the tar file."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._names[start : int(self._ends[index])])

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """(H,W,3) uint8 RGB. Raises ImageError that names the image."""
        number, offset, size = (int(v) for v in self._places[index])
        root, name = self.roots[number], self.name(index)
        if root.is_dir():
            return read_image(root / name)
        try:
            with root.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise ImageError(f"cannot read {name} in {root}: {error.strerror or error}") from error
        return read_image(root / name, content)

    def digest(self) -> str:
        """sha256 over names and sizes: another set of images gives another one, at the price of a listing."""
        found = hashlib.sha256(self._names)
        found.update(self._ends.tobytes())
        found.update(self._places[:, 2].tobytes())
        return found.hexdigest()

    def without(self, indices: Sequence[int]) -> Corpus:
        """The others, in the same order and numbered anew; this corpus stays as it is."""
        kept = np.ones(len(self), bool)
        kept[list(indices)] = False
        sizes = np.diff(self._ends, prepend=0)
        rest = copy.copy(self)
        rest._names = np.frombuffer(self._names, np.uint8)[np.repeat(kept, sizes)].tobytes()
        rest._ends = np.cumsum(sizes[kept])
        rest._places = self._places[kept]
        return rest


def find_damaged(
    corpus: Corpus,
    record: Path,
    threads: int | None = None,
    progress: Callable[[Iterator[int], int], Iterator[int]] = lambda items, total: items,
) -> list[int]:
    """Numbers of the images that cannot be read. Each is read once: ``record`` keeps what was found, with the reasons.

    A search that was stopped goes on near there; a corpus with another digest is searched from its start. threads: that
    decode, None for one a core. Raises OutputError for a record that cannot be written.
    """
    known = _read_record(record, corpus)
    if known["checked"] == len(corpus):
        return [int(entry["index"]) for entry in known["damaged"]]
    counter = iter(progress(iter(range(known["checked"], len(corpus))), len(corpus) - known["checked"]))
    # Each read sets Python's warnings aside; in several threads the last to end must not leave them so.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        while known["checked"] < len(corpus):
            chunk = range(known["checked"], min(known["checked"] + CHUNK, len(corpus)))
            for index, reason in zip(chunk, pool.map(lambda i: _unreadable(corpus, i), chunk), strict=True):
                if reason is not None:
                    known["damaged"].append({"index": index, "name": corpus.name(index), "reason": reason})
                next(counter)
            known["checked"] = chunk.stop
            write_json(record, known)
    return [int(entry["index"]) for entry in known["damaged"]]


def _read_record(path: Path, corpus: Corpus) -> dict[str, Any]:
    """What is known of this very corpus; nothing, where ``path`` is of another or no record at all."""
    fresh = {"images_sha256": corpus.digest(), "images": len(corpus), "checked": 0, "damaged": []}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = all(found[name] == fresh[name] for name in ("images_sha256", "images"))
        usable = same and 0 <= int(found["checked"]) <= len(corpus)
        return found if usable and all(0 <= int(e["index"]) < len(corpus) for e in found["damaged"]) else fresh
    except (OSError, ValueError, KeyError, TypeError):
        return fresh


def _unreadable(corpus: Corpus, index: int) -> str | None:
    try:
        corpus.read(index)
    except ImageError as error:
        return str(error)
    return None


def _members(root: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, bytes) of the images of one root, sorted by name."""
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        for path in files:
            yield path.relative_to(root).as_posix(), 0, path.stat().st_size
        return
    if not root.is_file():
        raise InputError(f"{root} does not exist; expected a folder of images or a .tar file of them")
    try:
        with tarfile.open(root, "r:") as archive:  # "r:" means uncompressed: others have no place to seek to
            members = [m for m in archive if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{root} is not a whole, uncompressed tar file: {error}") from error
    size = root.stat().st_size
    for member in sorted(members, key=lambda m: m.name):
        if member.offset_data + member.size > size:
            raise InputError(f"{root} is cut off: {member.name} ends after the file does. Get it again")
        yield member.name, member.offset_data, member.size
