"""Which TensorRT is used, what is said when none can be, and where its log goes."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from edgesam_deploy.errors import BackendError, InputError, MissingExtraError
from edgesam_deploy.runtime import bindings
from edgesam_deploy.runtime.bindings import Library, last_error, listen, logger, parse_release, trt, use

from . import fake_tensorrt
from .fake_cudart import FakeCudart


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has loaded no TensorRT; a module that is not given is not installed."""
    monkeypatch.setattr(bindings, "_state", bindings._State())
    for name in bindings.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> ModuleType:
    module = fake_tensorrt.make(FakeCudart(), version, name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    ("name", "version", "release"),
    [
        ("tensorrt", "10.3.0", (10, 3)),
        ("tensorrt", "10.16.1.11", (10, 16)),
        ("tensorrt", "11.4.0.106", (11, 4)),
        ("tensorrt_rtx", "1.7.1.116", (1, 7)),
    ],
)
def test_a_supported_release_is_taken(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, release: tuple[int, int]
) -> None:
    module = install(monkeypatch, name, version)
    assert use(name) == Library(name, version)
    assert use(name).release == release
    assert trt.Runtime is module.Runtime
    assert trt.__version__ == version


@pytest.mark.parametrize(
    ("name", "version", "least"),
    [("tensorrt", "8.6.1", "10.3"), ("tensorrt", "10.2.0", "10.3"), ("tensorrt_rtx", "1.1.0", "1.2")],
)
def test_an_old_release_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, version: str, least: str) -> None:
    install(monkeypatch, name, version)
    with pytest.raises(BackendError) as caught:
        use(name)
    assert str(caught.value).startswith(f"{name} {version} is too old: expected {least} or newer")
    with pytest.raises(BackendError, match="no TensorRT was chosen yet"):
        _ = trt.Runtime


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "gpu"), ("tensorrt_rtx", "rtx")])
def test_a_missing_package_names_its_extra(name: str, extra: str) -> None:
    with pytest.raises(MissingExtraError, match=rf"'{name}'.*edgesam-deploy\[{extra}\]"):
        use(name)


def test_a_process_uses_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "10.3.0")
    install(monkeypatch, "tensorrt_rtx", "1.7.1")
    use("tensorrt")
    with pytest.raises(BackendError, match="already uses tensorrt; run what needs tensorrt_rtx in a process of its"):
        use("tensorrt_rtx")
    assert use("tensorrt").name == "tensorrt"


@pytest.mark.parametrize(
    "raised",
    [
        'ImportError("libnvinfer.so.10: cannot open shared object file: No such file or directory")',
        'OSError("libnvinfer.so.10: undefined symbol: createInferRuntime\\nmore")',
        'RuntimeError("libnvinfer.so.10 is of another release")',
        "ImportError()",
    ],
    ids=["import", "os", "runtime", "no-words"],
)
def test_a_package_whose_libraries_do_not_load_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: str
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tensorrt.py").write_text(f"raise {raised}\n", encoding="utf-8")
    with pytest.raises(BackendError, match="tensorrt is installed but cannot be loaded") as caught:
        use("tensorrt")
    assert len(str(caught.value).splitlines()) == 1
    assert "libnvinfer.so.10" in str(caught.value) or raised == "ImportError()"


def test_a_part_of_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As tensorrt without tensorrt_libs: the module that is missing is not the one that was asked for."""
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tensorrt.py").write_text("import tensorrt_libs_of_nobody\n", encoding="utf-8")
    with pytest.raises(MissingExtraError, match=r"'tensorrt_libs_of_nobody'.*edgesam-deploy\[gpu\]"):
        use("tensorrt")


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(InputError, match="unknown TensorRT library 'trt', expected one of tensorrt, tensorrt_rtx"):
        use("trt")


@pytest.mark.parametrize("version", ["", "11", "x.y", "v10.3"])
def test_a_version_that_cannot_be_read_is_refused(version: str) -> None:
    with pytest.raises(BackendError, match="cannot read the version"):
        parse_release(version)


def test_the_one_logger_goes_to_logging_and_to_who_listens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "tensorrt", "10.3.0")
    use("tensorrt")
    made = logger()
    assert logger() is made
    severity = trt.ILogger.Severity
    with caplog.at_level(logging.DEBUG, "edgesam_deploy.tensorrt"), listen("WARNING") as heard, listen() as errors:
        for level in severity:
            made.log(level, f"{level.name.lower()}, said TensorRT")
    assert [m.severity for m in heard] == ["INTERNAL_ERROR", "ERROR", "WARNING"]
    assert [m.severity for m in errors] == ["INTERNAL_ERROR", "ERROR"]
    assert [r.levelno for r in caplog.records] == [50, 40, 30, 20, 10]
    made.log(severity.ERROR, "nobody listens any more")
    assert len(errors) == 2


def test_the_last_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "10.3.0")
    use("tensorrt")
    severity = trt.ILogger.Severity
    with listen("VERBOSE") as messages:
        assert last_error(messages) == "TensorRT gave no reason"
        for level, text in ((severity.ERROR, "first"), (severity.ERROR, " second\nat x.cpp:1"), (severity.INFO, "no")):
            logger().log(level, text)
        assert last_error(messages) == "second"
        logger().log(severity.ERROR, " \n")
        assert last_error(messages) == "TensorRT gave no reason"


def test_messages_from_tensorrts_own_threads_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "10.3.0")
    use("tensorrt")
    made = logger()
    with listen() as messages:
        threads = [threading.Thread(target=made.log, args=(trt.ILogger.ERROR, str(i))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(m.text for m in messages) == [str(i) for i in range(8)]
