"""Backends: one file each, behind four methods. Nothing here imports torch.

A session runs one graph. Tensors go in and out by name; a backend is a context manager, so that what it holds is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import numpy.typing as npt

from edgesam_deploy.contract import GraphContract
from edgesam_deploy.errors import InputError


class Session(Protocol):
    """One loaded graph."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def specs(self) -> GraphContract:
        """Names, dtypes and shapes of the inputs and outputs, as the backend sees them."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run once: arrays by input name -> arrays by output name."""


# name -> module:class; imported only when a session is opened.
BACKENDS = {
    "onnxruntime": "edgesam_deploy.runtime.onnxruntime:OnnxRuntimeSession",
}
DEFAULT_BACKEND = "onnxruntime"


def open_session(graph: Path, backend: str = DEFAULT_BACKEND, threads: int | None = None) -> Session:
    """A session for a graph file. threads: CPU threads inside an operator, None for all cores."""
    try:
        module, _, name = BACKENDS[backend].partition(":")
    except KeyError:
        raise InputError(f"unknown backend '{backend}', expected one of {sorted(BACKENDS)}") from None
    return cast(Callable[..., Session], getattr(import_module(module), name))(graph, threads=threads)
