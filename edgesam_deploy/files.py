"""Files and folders that appear whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import OutputError

CHUNK_BYTES = 1 << 20
# Everything unfinished starts with this, so that a later run knows what a killed one left behind.
TEMPORARY_PREFIX = ".unfinished-"
LOCK = ".lock"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success fsync it and rename it to ``path``.

    Whatever goes wrong, ``path`` keeps its old content. Raises OutputError with the reason the system gave
    (no permission, no space, file too large).
    """
    temporary: Path | None = None
    try:
        _make_room(path)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp files are private; a result is as readable as any other file of the user's.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(_reason(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """What the system refuses while ``path`` is made becomes an OutputError that names it."""
    try:
        yield
    except OSError as error:
        raise OutputError(_reason(path, error)) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing; OutputError if it cannot be written."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN is refused: no reader but Python's takes it."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def check_writable(path: Path) -> None:
    """Raise OutputError now, rather than after minutes of work, if a file ``path`` cannot be made."""
    try:
        _make_room(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(_reason(path, error)) from error


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success it takes the place of ``path``.

    An existing folder is replaced only once the new one is complete. What a killed run left of the same folder is
    removed first: a folder must have one writer at a time.
    """
    final = path.resolve()  # through a symbolic link, so that the folder it leads to is the one replaced
    prefix = f"{TEMPORARY_PREFIX}{final.name}-"
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists() and not final.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder")
        _remove(final.parent.glob(f"{glob.escape(prefix)}{'?' * 8}"))  # mkdtemp's random part
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _exchange(temporary, final, prefix)
    except OutputError as error:
        # A file that could not be written in the temporary folder: nobody can look for it there.
        if isinstance(error.__cause__, OSError) and str(temporary) in str(error):
            raise OutputError(_reason(path, error.__cause__)) from error
        raise
    except OSError as error:
        raise OutputError(_reason(path, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def clean_unfinished(folder: Path) -> None:
    """Remove what a killed run left in ``folder``. Only for folders that one build at a time writes to."""
    _remove(folder.glob(f"{TEMPORARY_PREFIX}*"))


@contextmanager
def locked(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back when the process ends, however it does.

    busy: called where another process holds it; then waits. It may raise instead. Raises OutputError where no file can
    be made there.
    """
    import fcntl  # not everywhere; nothing else here needs it

    path = folder / LOCK
    with output_errors(path):
        _make_room(path)
        file = path.open("a")
    with file:
        # Not flock, whose lock a forked loader process would go on holding after its parent was killed.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            busy()
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _exchange(new: Path, path: Path, prefix: str) -> None:
    """Rename the folder ``new`` to ``path``; one that is there is put aside, and put back should that fail."""
    if not path.exists():
        new.replace(path)
        return
    old = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        path.replace(old)
        try:
            new.replace(path)
        except OSError:
            old.replace(path)
            raise
    except OSError:
        with contextlib.suppress(OSError):
            old.rmdir()  # never what was put aside: only an empty folder can be removed so
        raise
    shutil.rmtree(old, ignore_errors=True)


def _make_room(path: Path) -> None:
    """Make the folder that the file ``path`` will be in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(path: Path, error: OSError) -> str:
    # Where a folder should be and a file is, the system says "File exists" or "Not a directory", but not which.
    blocking = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
    reason = f"{blocking} is not a folder" if blocking else error.strerror or str(error)
    return f"cannot write {path}: {reason}; nothing was changed there"
