"""Finished stages, kept and reused while nothing they depend on has changed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import OutputError
from edgesam_deploy.files import clean_unfinished, sha256_bytes, sha256_file, write_json, writing_folder
from edgesam_deploy.recipe import PACKAGE

RECORD = "stage.json"
TOOLS = (
    "edgesam-deploy",
    "torch",
    "timm",
    "segment-anything",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "onnxslim",
    "openvino",
)


@dataclass(frozen=True, slots=True)
class StageRun:
    """One stage of a build. folder: its files. detail: what its function returned, as JSON. seconds: wall-clock."""

    name: str
    folder: Path
    reused: bool
    seconds: float
    detail: Mapping[str, Any]


class StageCache:
    """Runs stages into sub-folders of one work folder.

    A stage is reused if its key (inputs, parameters, tool versions, our code) is the recorded one and its files still
    have their recorded hashes; a stage that was killed left no record and runs again.
    """

    def __init__(self, folder: Path, force: bool = False) -> None:
        self.folder = folder
        self.force = force
        self.runs: list[StageRun] = []

    def run(self, name: str, inputs: Mapping[str, object], action: Callable[[Path], Mapping[str, Any]]) -> StageRun:
        """Run ``action(folder)`` or reuse what it left. inputs: JSON values that its result depends on."""
        started = time.perf_counter()
        key = sha256_bytes(json.dumps([name, inputs, tool_versions(), code_digest()], sort_keys=True).encode())
        record = None if self.force else self._intact(name, key)
        if record is None:
            with writing_folder(self.folder / name) as temporary:
                detail = dict(action(temporary))
                files = {
                    str(p.relative_to(temporary)): sha256_file(p) for p in sorted(temporary.rglob("*")) if p.is_file()
                }
                write_json(temporary / RECORD, {"key": key, "files": files, "detail": detail})
        else:
            detail = record["detail"]
        run = StageRun(name, self.folder / name, record is not None, time.perf_counter() - started, detail)
        self.runs.append(run)
        return run

    def _intact(self, name: str, key: str) -> dict[str, Any] | None:
        folder = self.folder / name
        try:
            record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            same = record["key"] == key and all(sha256_file(folder / f) == h for f, h in record["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if same else None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a work folder for one build at a time, and clear what a killed one left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(
            f"cannot use the work folder {folder}: {error.strerror or error}; give another --output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another build is at work in {folder}; wait for it or give another --output") from error
        clean_unfinished(folder)
        yield


@lru_cache(maxsize=1)
def tool_versions() -> dict[str, str]:
    """Versions of everything that shapes an artifact; "missing" for what is not installed."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


@lru_cache(maxsize=1)
def code_digest() -> str:
    """sha256 over the package's own Python files, so that a changed stage never reuses an old result."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if "cli" not in path.relative_to(PACKAGE).parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()
