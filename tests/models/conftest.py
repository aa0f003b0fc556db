"""The largest error of each test goes into pytest's report, where ``benchmarks/families.py`` reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(autouse=True)
def reported(record_property: Callable[[str, object], None]) -> Iterator[None]:
    pytest.importorskip("torch", reason="needs the export extra")
    from .upstream_error import MEASURED

    MEASURED.clear()
    yield
    if MEASURED:
        record_property("largest_error", max(MEASURED))
