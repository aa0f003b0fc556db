"""Assignments of INT8 to the layers of an encoder and a decoder: typed, run on images, remembered.

An assignment is, by graph, the set of nodes that compute in INT8.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgesam_deploy.contract import IMAGE, GraphContract
from edgesam_deploy.errors import InputError, OutputError
from edgesam_deploy.files import sha256_bytes, sha256_file
from edgesam_deploy.measure.accuracy import Answers, answer, compare
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Int8Rules, Recipe
from edgesam_deploy.runtime import Array, Session, open_session
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.cache import code_digest, tool_versions
from edgesam_deploy.stages.calibrate import Ranges, images_digest
from edgesam_deploy.stages.fp16 import emulate_fp16
from edgesam_deploy.stages.typed import Typing, type_graph

NONE: frozenset[str] = frozenset()
# Encoder assignments whose embeddings are kept, so that decoders are tried without running the encoder again.
_REMEMBERED = 3
_FILES = 16


@dataclass(frozen=True, slots=True)
class Subject:
    """What is assigned to: simplified FP32 graphs ``encoder`` and ``decoder`` with their calibrated ranges.

    folder: an empty one for typed graphs, of which the last ``_FILES`` are kept.
    """

    sources: Mapping[str, Path]
    ranges: Mapping[str, Ranges]
    recipe: Recipe
    rules: Int8Rules
    how: Typing
    folder: Path

    def typed(self, name: str, int8: frozenset[str], encoding: str | None = None) -> Path:
        """The typed graph of an assignment: in ``folder``, or the source itself. encoding: None for the subject's."""
        how = self.how if encoding is None else Typing(encoding, self.how.rest)
        if not int8 and how.rest == "fp32":
            return self.sources[name]

        def make(path: Path) -> None:
            source, ranges = self.sources[name], self.ranges[name]
            type_graph(source, ranges, self.recipe.fp16, self.rules, how, path, tuple(sorted(int8)))

        return self._file(make, name, how.encoding, sorted(int8))

    def runnable(self, name: str, int8: frozenset[str]) -> Path:
        """The typed graph as a CPU computes it faithfully: emulated where it holds FP16."""
        if self.how.rest != "fp16":
            return self.typed(name, int8)
        return self._file(lambda path: emulate_fp16(self.typed(name, int8), path), name, "emulated", sorted(int8))

    def _file(self, make: Callable[[Path], object], *key: object) -> Path:
        """The file of a key, made if it is not there; the least recently used make room."""
        path = self.folder / f"{sha256_bytes(json.dumps(key).encode())}.onnx"
        if path.exists():
            path.touch()
            return path
        for old in sorted(self.folder.glob("*.onnx"), key=lambda p: p.stat().st_mtime_ns)[:-_FILES]:
            graphs.remove(old)
        make(path)
        return path

    def digest(self, images: Sequence[Path]) -> str:
        """Identifies everything that mask IoU of an assignment on ``images`` depends on."""
        parts = [
            {name: sha256_file(path) for name, path in sorted(self.sources.items())},
            {name: asdict(ranges) for name, ranges in sorted(self.ranges.items())},
            [
                asdict(part)
                for part in (self.rules, self.how, self.recipe.fp16, self.recipe.pixels, self.recipe.geometry)
            ],
            [images_digest(images), tool_versions(), code_digest()],
        ]
        return sha256_bytes(json.dumps(parts, sort_keys=True).encode())


class Log:
    """Measurements by key, each appended to a file as one line, so that a killed run loses at most the one under way.

    Lines of another context stay in the file and are not used; a torn last line is passed over.
    """

    def __init__(self, path: Path, context: str) -> None:
        self.path, self.context = path, context
        self.seconds = 0.0
        self._values: dict[str, Any] = {}
        self._times: dict[str, float] = {}
        for line in self._lines():
            try:
                entry = json.loads(line)
                if entry["context"] == context:
                    self._values[entry["key"]] = entry["value"]
                    self._times[entry["key"]] = float(entry["seconds"])
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, *key: object) -> Any:
        """What was recorded, or None; its time counts as spent."""
        name = json.dumps(key, sort_keys=True)
        self.seconds += self._times.pop(name, 0.0)
        return self._values.get(name)

    def add(self, value: object, seconds: float, *key: object) -> None:
        """Record a JSON value; raises OutputError if it cannot be written."""
        name = json.dumps(key, sort_keys=True)
        self._values[name] = value
        entry = {"context": self.context, "key": name, "value": value, "seconds": seconds}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                size = file.seek(0, 2)
                if size:
                    file.seek(size - 1)
                    if file.read(1) != b"\n":  # what a killed run left torn
                        file.write(b"\n")
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {error.strerror or error}") from error


class Masks:
    """Mask IoU of assignments against the FP32 graphs, on images with the default clicks and boxes."""

    def __init__(self, subject: Subject, images: Sequence[Path], log: Log) -> None:
        """Raises InputError for images of several folders."""
        if len({path.parent for path in images}) != 1:
            raise InputError(f"a search needs images of one folder, got {len(images)} of several")
        self.subject, self.images, self.log = subject, images, log
        self.measured = 0
        self._answers: Answers | None = None
        self._embeddings: dict[frozenset[str], dict[bytes, dict[str, Array]]] = {}

    def iou(self, encoder: frozenset[str], decoder: frozenset[str]) -> float:
        """The mean over all prompts of all images, in 0..1; remembered in the log."""
        key = ("mask_iou", sorted(encoder), sorted(decoder))
        found = self.log.find(*key)
        if found is not None:
            return float(found)
        start = time.perf_counter()
        value = self._measure(encoder, decoder)
        self.measured += 1
        self.log.add(value, time.perf_counter() - start, *key)
        return value

    def _measure(self, encoder: frozenset[str], decoder: frozenset[str]) -> float:
        if self._answers is None:
            self._answers = self._reference()
        with (
            _Embedder(self.subject, encoder, self._known(encoder)) as embedder,
            open_session(self.subject.runnable("decoder", decoder)) as session,
        ):
            predictor = self._predictor(embedder, session)
            return float(compare(predictor, self._answers, self.images[0].parent, "typed").mask_iou.mean)

    def _reference(self) -> Answers:
        sources = self.subject.sources
        with open_session(sources["encoder"]) as encoder, open_session(sources["decoder"]) as decoder:
            return answer(self._predictor(encoder, decoder), self.images)

    def _predictor(self, encoder: Session, decoder: Session) -> Predictor:
        return Predictor(encoder, decoder, self.subject.recipe.geometry, self.subject.recipe.pixels)

    def _known(self, encoder: frozenset[str]) -> dict[bytes, dict[str, Array]]:
        """Embeddings by image of an encoder assignment. The one without INT8 stays, others go by turns."""
        if encoder not in self._embeddings:
            others = [key for key in self._embeddings if key]
            if len(others) >= _REMEMBERED:
                del self._embeddings[others[0]]
            self._embeddings[encoder] = {}
        return self._embeddings[encoder]


class _Embedder:
    """A session of a typed encoder that runs each image once, and is opened only if it has to."""

    def __init__(self, subject: Subject, int8: frozenset[str], known: dict[bytes, dict[str, Array]]) -> None:
        self._subject, self._int8, self._known = subject, int8, known
        self._stack = ExitStack()
        self._session: Session | None = None

    def __enter__(self) -> _Embedder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def specs(self) -> GraphContract:
        return self._opened().specs()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        key = hashlib.sha256(feeds[IMAGE].tobytes()).digest()
        if key not in self._known:
            self._known[key] = self._opened().run(feeds)
        return self._known[key]

    def _opened(self) -> Session:
        if self._session is None:
            graph = self._subject.runnable("encoder", self._int8)
            self._session = self._stack.enter_context(open_session(graph))
        return self._session
