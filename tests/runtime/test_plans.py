"""Engines that belong elsewhere are refused by what differs, one thing at a time."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from edgesam_deploy.errors import BackendError, BundleError
from edgesam_deploy.runtime import plans
from edgesam_deploy.runtime.bindings import Library
from edgesam_deploy.runtime.plans import EngineRecord, check_machine, check_record, platform_tag, read_plan

BUNDLE = Path("engines/x")
HERE = Library("tensorrt", "10.3.0")
RECORD = EngineRecord(
    library="tensorrt",
    version="10.3.0",
    compute_capabilities=("8.7",),
    platform=platform_tag(),
    driver="12.6",
    version_compatible=False,
    hardware_compatible=False,
    built_from={"encoder": "aa", "decoder": "bb"},
    settings={"workspace_mb": 1024},
)
RTX = replace(RECORD, library="tensorrt_rtx", version="1.7.1", compute_capabilities=("8.6", "8.9"))


def check(record: EngineRecord, library: Library = HERE, capability: str = "8.7") -> None:
    check_machine(record, BUNDLE, library, capability)


FITS: dict[str, tuple[EngineRecord, Library, str]] = {
    "the-same": (RECORD, HERE, "8.7"),
    "one-of-a-list": (RTX, Library("tensorrt_rtx", "1.7.1"), "8.9"),
    "portable": (replace(RTX, compute_capabilities=()), Library("tensorrt_rtx", "1.7.1"), "12.0"),
    "a-later-release": (replace(RECORD, version_compatible=True), Library("tensorrt", "10.16.1"), "8.7"),
    "a-later-gpu": (replace(RECORD, hardware_compatible=True, compute_capabilities=("8.0",)), HERE, "12.0"),
}


@pytest.mark.parametrize(("record", "library", "capability"), FITS.values(), ids=FITS)
def test_engines_of_this_machine_pass(record: EngineRecord, library: Library, capability: str) -> None:
    check(record, library, capability)


COMPATIBLE = replace(RECORD, version_compatible=True)
FOREIGN: dict[str, tuple[EngineRecord, Library, str, str]] = {
    "version": (
        RECORD,
        Library("tensorrt", "10.16.1"),
        "8.7",
        r"built by tensorrt 10\.3\.0, this machine has tensorrt 10",
    ),
    "patch": (RECORD, Library("tensorrt", "10.3.1"), "8.7", r"this machine has tensorrt 10\.3\.1"),
    "older": (COMPATIBLE, Library("tensorrt", "10.2.0"), "8.7", r"this machine has tensorrt 10\.2\.0"),
    "major": (COMPATIBLE, Library("tensorrt", "11.4.0"), "8.7", r"this machine has tensorrt 11\.4\.0"),
    "library": (RECORD, Library("tensorrt_rtx", "10.3.0"), "8.7", r"this machine has tensorrt_rtx 10\.3\.0"),
    "capability": (RECORD, HERE, "8.6", r"for compute capability 8\.7, this GPU has 8\.6"),
    "of-a-list": (RTX, Library("tensorrt_rtx", "1.7.1"), "9.0", r"compute capability 8\.6 or 8\.9, this GPU has 9\.0"),
    "before-ampere": (replace(RECORD, hardware_compatible=True, compute_capabilities=("8.0",)), HERE, "7.5", "has 7.5"),
    "platform": (replace(RECORD, platform="win32-AMD64"), HERE, "8.7", "for win32-AMD64, this machine is "),
}


@pytest.mark.parametrize(("record", "library", "capability", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_engines_are_refused_by_name(
    record: EngineRecord, library: Library, capability: str, message: str
) -> None:
    with pytest.raises(
        BackendError, match=rf"^the engines of engines/x .*{message}.*; rebuild it here: sam-export"
    ) as caught:
        check(record, library, capability)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_are_compared_as_numbers() -> None:
    """10.16 is later than 10.3, and 12.0 than 8.0: not so as text."""
    check(replace(COMPATIBLE, version="10.3.0"), Library("tensorrt", "10.16.1"))
    with pytest.raises(BackendError):
        check(replace(COMPATIBLE, version="10.16.1"), Library("tensorrt", "10.3.0"))
    check(replace(RECORD, hardware_compatible=True, compute_capabilities=("8.6",)), capability="10.0")


def test_the_platform_is_named_by_system_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans.sys, "platform", "linux")
    monkeypatch.setattr(plans.platform, "machine", lambda: "aarch64")
    assert platform_tag() == "linux-aarch64"


@pytest.mark.parametrize(("graphs", "stale"), [({"encoder": "aa", "decoder": "cc"}, "decoder"), ({"x": "aa"}, "x")])
def test_engines_of_other_graphs_are_stale(graphs: dict[str, str], stale: str) -> None:
    with pytest.raises(BundleError, match=rf"engines/x: {stale}\.engine is stale.*; rebuild it here"):
        check_record(RECORD, BUNDLE, graphs)


def test_engines_of_these_graphs_are_not() -> None:
    check_record(RECORD, BUNDLE, {"encoder": "aa", "decoder": "bb"})


def test_a_record_survives_the_manifest() -> None:
    raw = {**asdict(RECORD), "compute_capabilities": ["8.7"]}
    assert EngineRecord.parse(raw, BUNDLE) == RECORD


GARBLED: dict[str, Any] = {
    "nothing": None,
    "a-list": [],
    "a-field-less": {k: v for k, v in asdict(RECORD).items() if k != "driver"},
    "a-field-more": {**asdict(RECORD), "compute_capabilities": ["8.7"], "gpu": "Orin"},
    "text-for-a-list": {**asdict(RECORD), "compute_capabilities": "8.7"},
    "a-list-for-hashes": {**asdict(RECORD), "compute_capabilities": ["8.7"], "built_from": ["aa"]},
    "a-number-for-a-version": {**asdict(RECORD), "compute_capabilities": ["8.7"], "version": 10.3},
    "words-for-a-capability": {**asdict(RECORD), "compute_capabilities": ["Orin"]},
}


@pytest.mark.parametrize("raw", GARBLED.values(), ids=GARBLED)
def test_a_garbled_record_is_refused(raw: Any) -> None:
    with pytest.raises(BundleError, match=r"engines/x .*garbles the entry 'engines'.*; rebuild it here"):
        EngineRecord.parse(raw, BUNDLE)


@pytest.mark.parametrize(("library", "magic"), [("tensorrt", b"ftrt"), ("tensorrt_rtx", b"vtrt")])
def test_a_plan_is_read_whole(tmp_path: Path, library: str, magic: bytes) -> None:
    path = tmp_path / "encoder.engine"
    path.write_bytes(magic + b"\0rest")
    assert read_plan(path, library) == magic + b"\0rest"


@pytest.mark.parametrize(
    ("library", "data", "message"),
    [
        ("tensorrt", b"vtrt\0", "is a plan of tensorrt_rtx, expected one of tensorrt; rebuild it here"),
        ("tensorrt_rtx", b"ftrt\0", "is a plan of tensorrt, expected one of tensorrt_rtx; rebuild it here"),
        ("tensorrt", b"\x08\x0a\x12\x07", r"is not a plan \(it begins with b'\\x08\\n\\x12\\x07', not b'ftrt'\)"),
        ("tensorrt", b"ftr", "is not a plan"),
    ],
    ids=["of-rtx", "not-of-rtx", "onnx", "cut-off"],
)
def test_what_is_not_a_plan_of_the_library_is_refused(tmp_path: Path, library: str, data: bytes, message: str) -> None:
    path = tmp_path / "encoder.engine"
    path.write_bytes(data)
    with pytest.raises(BackendError, match=rf"encoder\.engine {message}"):
        read_plan(path, library)


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot read the engine .*none\.engine: No such file"):
        read_plan(tmp_path / "none.engine", "tensorrt")
    with pytest.raises(BackendError, match=r"cannot read the engine .*: Is a directory"):
        read_plan(tmp_path, "tensorrt")
