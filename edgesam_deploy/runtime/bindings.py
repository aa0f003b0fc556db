"""Which TensorRT this process uses: ``tensorrt`` (10.3 and newer) or ``tensorrt_rtx``, behind one name, ``trt``.

The two share their API but for what the callers guard. A process uses one of them: each keeps global state, and the
first logger it is given is the only one it ever uses. ``trt`` is lazy, so importing this module costs nothing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesam_deploy.errors import BackendError, InputError, MissingExtraError

if TYPE_CHECKING:
    import tensorrt as trt
else:

    class _Chosen:
        def __getattr__(self, name: str) -> Any:
            return getattr(_state.module(), name)

    trt = _Chosen()

__all__ = [
    "LIBRARIES",
    "LOG",
    "Library",
    "Message",
    "last_error",
    "listen",
    "logger",
    "parse_release",
    "quiet",
    "trt",
    "use",
]

# library -> the extra that installs it where it is not part of the system
LIBRARIES = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
# TensorRT 10.3 is JetPack 6.1's. 8.x is weakly typed: it may run FP32 islands of a typed graph in FP16.
MINIMUM = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 2)}
LOG = logging.getLogger("edgesam_deploy.tensorrt")
LOG.addHandler(logging.NullHandler())  # silent unless the program that uses us sets up logging
JETSON_RELEASE = Path("/etc/nv_tegra_release")
_LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}


@dataclass(frozen=True, slots=True)
class Library:
    """The TensorRT in use. version: as it states it, ``10.3.0``."""

    name: str
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """(major, minor), to compare."""
        return parse_release(self.version)


@dataclass(frozen=True, slots=True)
class Message:
    """One line of TensorRT's log. severity: a name of ``trt.ILogger.Severity``."""

    severity: str
    text: str


class _State:
    """What of TensorRT is loaded in this process."""

    def __init__(self) -> None:
        self.library: Library | None = None
        self.loaded: Any = None
        self.logger: Any = None
        self.listeners: list[tuple[int, list[Message]]] = []

    def module(self) -> Any:
        if self.loaded is None:
            raise BackendError("no TensorRT was chosen yet: call runtime.bindings.use() first")
        return self.loaded

    def log(self, severity: str, text: str) -> None:
        level = _LEVELS[severity]
        LOG.log(level, text)
        for least, messages in self.listeners:
            if level >= least:
                messages.append(Message(severity, text))


_state = _State()


def use(library: str) -> Library:
    """Load ``tensorrt`` or ``tensorrt_rtx`` for this process and return its name and version.

    Raises MissingExtraError if it is not installed, BackendError if it is too old, or if the process uses the other.
    """
    if library not in LIBRARIES:
        raise InputError(f"unknown TensorRT library '{library}', expected one of {', '.join(LIBRARIES)}")
    if _state.library is not None:
        if _state.library.name != library:
            raise BackendError(
                f"this process already uses {_state.library.name}; run what needs {library} in a process of its own"
            )
        return _state.library
    module = _import(library)
    found = Library(library, str(module.__version__))
    if found.release < MINIMUM[library]:
        least = ".".join(map(str, MINIMUM[library]))
        raise BackendError(
            f"{library} {found.version} is too old: expected {least} or newer. TensorRT 8 may run FP32 layers in FP16 "
            "and cannot be told not to; on a Jetson, upgrade to JetPack 6.2"
        )
    _state.loaded, _state.library = module, found
    return found


def parse_release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as ``10.16.1.11``."""
    parts = version.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        raise BackendError(f"cannot read the version '{version}', expected major.minor…") from None


def _import(library: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if library == "tensorrt" and JETSON_RELEASE.exists():
            raise BackendError(
                "this Python does not see JetPack's tensorrt: make the environment with  python3 -m venv "
                "--system-site-packages  and install edgesam-deploy there, without the extra 'gpu'"
            ) from error
        raise MissingExtraError(error.name or library, LIBRARIES[library]) from error
    except (ImportError, OSError, RuntimeError) as error:
        # The bindings are there, and a library of TensorRT or CUDA is not, or is another release's.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendError(
            f"{library} is installed but cannot be loaded: {reason}. Its libraries must be of the same release; on a "
            "Jetson use JetPack's own (python -m venv --system-site-packages), elsewhere install it again"
        ) from error


def logger() -> Any:
    """The process's one ``trt.ILogger``: to Python's logging, and to whoever listens (``listen``)."""
    if _state.logger is None:
        names = {getattr(trt.ILogger, name): name for name in _LEVELS}

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
                _state.log(names.get(severity, "INFO"), msg)

        _state.logger = Logger()
    return _state.logger


@contextmanager
def listen(least: str = "ERROR") -> Iterator[list[Message]]:
    """Collect TensorRT's messages of at least one severity while the context lasts."""
    messages: list[Message] = []
    entry = (_LEVELS[least], messages)
    _state.listeners.append(entry)
    try:
        yield messages
    finally:
        # By identity: two lists that are still empty are equal.
        _state.listeners = [e for e in _state.listeners if e is not entry]


@contextmanager
def quiet() -> Iterator[None]:
    """Send what TensorRT's compiler prints to the process's standard output to the log instead.

    It prints past its logger, and standard output is for the answer: one line more, and JSON is none.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)  # the C library's own buffer, before its file is exchanged
            os.dup2(kept, 1)
            os.close(kept)
            printed.seek(0)
            for line in printed.read().decode(errors="replace").splitlines():
                _state.log("WARNING", line)


def last_error(messages: list[Message]) -> str:
    """The reason for a failed call: the last error's first line, without TensorRT's own source position."""
    errors = [m.text for m in messages if m.severity in ("ERROR", "INTERNAL_ERROR")]
    return errors[-1].strip().splitlines()[0] if errors and errors[-1].strip() else "TensorRT gave no reason"
