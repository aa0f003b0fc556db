"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgesam_deploy.errors import OutputError
from edgesam_deploy.files import (
    TEMPORARY_PREFIX,
    check_writable,
    clean_unfinished,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
    writing,
    writing_folder,
)

OLD, NEW = b"old content", b"new content, and more of it"


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir())


def fill(folder: Path, **content: str) -> Path:
    """Make a folder with text files ``name=content``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text)
    return folder


def stop_half_way(path: Path, error: type[BaseException]) -> None:
    """Write the beginning of a file, then fail."""
    path.write_bytes(NEW[:5])
    raise error


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
        (b"b" * ((1 << 20) * 2 + 1), None),
    ],
    ids=["empty", "abc", "fips-180-million-a", "over-two-chunks"],
)
def test_hashes_of_bytes_and_of_files_agree(tmp_path: Path, data: bytes, digest: str | None) -> None:
    """The published test vectors of SHA-256, and a file longer than the chunks it is read in."""
    path = tmp_path / "file"
    path.write_bytes(data)
    assert sha256_file(path) == sha256_bytes(data)
    assert digest is None or sha256_file(path) == digest


def test_a_file_is_written_whole_with_the_folders_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert names(path.parent) == ["file.bin"]


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    write_bytes(path, NEW)
    assert path.read_bytes() == NEW
    assert names(tmp_path) == ["file"]


def test_until_it_is_complete_nobody_sees_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "file.onnx"
    path.write_bytes(OLD)
    with writing(path) as temporary:
        temporary.write_bytes(NEW)
        assert path.read_bytes() == OLD
        assert temporary.parent == path.parent, "a rename is atomic inside one folder only"
        assert temporary.name.startswith(TEMPORARY_PREFIX)
        assert temporary.suffix == ".onnx"
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=["error", "control-c"])
def test_a_failure_half_way_leaves_the_old_file_and_no_rubbish(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(error), writing(path) as temporary:
        stop_half_way(temporary, error)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    """mkstemp's files are private (0600); results are for everybody that the umask admits."""
    write_bytes(tmp_path / "ours", NEW)
    (tmp_path / "plain").write_bytes(NEW)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_json_that_only_python_reads_is_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(OLD)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": value})
    assert path.read_bytes() == OLD


def test_json_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"a": [1, 2.5, None, "ü"]})
    assert json.loads((tmp_path / "file.json").read_text(encoding="utf-8")) == {"a": [1, 2.5, None, "ü"]}


def _below_a_file(folder: Path) -> tuple[Path, str]:
    (folder / "file").write_bytes(OLD)
    return folder / "file" / "result", f"{folder / 'file'} is not a folder"


def _far_below_a_file(folder: Path) -> tuple[Path, str]:
    (folder / "file").write_bytes(OLD)
    return folder / "file" / "deep" / "result", f"{folder / 'file'} is not a folder"


def _a_folder(folder: Path) -> tuple[Path, str]:
    (folder / "result").mkdir()
    return folder / "result", "is a folder"


def _name_too_long(folder: Path) -> tuple[Path, str]:
    return folder / ("x" * 300), "File name too long"


def _proc(_: Path) -> tuple[Path, str]:
    return Path("/proc/result"), "cannot write /proc/result"


# Situations in which nobody can write, not even root.
UNWRITABLE = [_below_a_file, _far_below_a_file, _a_folder, _name_too_long]
if Path("/proc/self").exists():
    UNWRITABLE.append(_proc)
SITUATIONS = pytest.mark.parametrize("situation", UNWRITABLE, ids=lambda f: f.__name__.strip("_"))


@SITUATIONS
def test_what_cannot_be_written_is_one_line_that_names_the_path(
    tmp_path: Path, situation: Callable[[Path], tuple[Path, str]]
) -> None:
    path, reason = situation(tmp_path)
    before = names(tmp_path)
    with pytest.raises(OutputError) as caught:
        write_bytes(path, NEW)
    message = str(caught.value)
    assert message.startswith(f"cannot write {path}: ")
    assert reason in message
    assert len(message.splitlines()) == 1
    assert names(tmp_path) == before


@pytest.mark.parametrize("situation", [s for s in UNWRITABLE if s is not _name_too_long], ids=lambda f: f.__name__)
def test_it_can_be_asked_beforehand_whether_a_file_can_be_written(
    tmp_path: Path, situation: Callable[[Path], tuple[Path, str]]
) -> None:
    path, reason = situation(tmp_path)
    with pytest.raises(OutputError) as caught:
        check_writable(path)
    assert reason in str(caught.value)


def test_asking_beforehand_writes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file")
    assert names(tmp_path / "new") == []
    (tmp_path / "old").write_bytes(OLD)
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == OLD


LIMITED = """
import resource, sys
from pathlib import Path
from edgesam_deploy.errors import OutputError
from edgesam_deploy.files import write_bytes, writing_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
kind, path = sys.argv[1], Path(sys.argv[2])
try:
    if kind == "file":
        write_bytes(path, b"n" * 10000)
    else:
        with writing_folder(path) as folder:
            (folder / "small").write_bytes(b"n")
            (folder / "large").write_bytes(b"n" * 10000)
except OutputError as error:
    sys.exit(f"OutputError: {error}")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_is_an_output_error_and_the_old_content_stays(tmp_path: Path, kind: str) -> None:
    """A limit on the file size stands for the full disk: the system refuses in the middle of a write."""
    path = tmp_path / "result"
    if kind == "file":
        path.write_bytes(OLD)
    else:
        fill(path, large="old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr == f"OutputError: cannot write {path}: File too large; nothing was changed there\n"
    assert names(tmp_path) == ["result"]
    if kind == "file":
        assert path.read_bytes() == OLD
    else:
        assert {p.name: p.read_text() for p in path.iterdir()} == {"large": "old"}


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a" / "result"
    with writing_folder(path) as folder:
        fill(folder, one="1")
        assert not path.exists()
    assert {p.name: p.read_text() for p in path.iterdir()} == {"one": "1"}
    assert names(path.parent) == ["result"]


def test_a_folder_replaces_the_old_one_with_all_that_was_in_it(tmp_path: Path) -> None:
    path = fill(tmp_path / "result", one="old", two="old")
    with writing_folder(path) as folder:
        fill(folder, one="new")
        assert {p.name: p.read_text() for p in path.iterdir()} == {"one": "old", "two": "old"}
    assert {p.name: p.read_text() for p in path.iterdir()} == {"one": "new"}
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=["error", "control-c"])
def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = fill(tmp_path / "result", one="old")
    with pytest.raises(error), writing_folder(path) as folder:
        stop_half_way(folder / "one", error)
    assert (path / "one").read_text() == "old"
    assert names(tmp_path) == ["result"]


def test_a_file_that_cannot_be_written_in_a_folder_is_the_folders_failure(tmp_path: Path) -> None:
    """The temporary folder that it was to be in is gone when the message is read."""
    with pytest.raises(OutputError) as caught, writing_folder(tmp_path / "result") as folder:
        write_bytes(folder, NEW)
    assert str(caught.value) == f"cannot write {tmp_path / 'result'}: is a folder; nothing was changed there"
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}: "), writing_folder(tmp_path / "result"):
        write_bytes(tmp_path, NEW)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path) -> None:
    """The new folder is gone when it should be renamed: the old one, already put aside, is put back."""
    path = fill(tmp_path / "result", one="old")
    with pytest.raises(OutputError, match="cannot write"), writing_folder(path) as folder:
        folder.rmdir()
    assert (path / "one").read_text() == "old"
    assert names(tmp_path) == ["result"]


def test_a_file_where_the_folder_should_go_stays(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(OLD)
    with pytest.raises(OutputError, match="is not a folder"), writing_folder(path):
        pytest.fail("nothing is to be computed for a place that cannot be written")
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["result"]


def test_a_folder_behind_a_symbolic_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    real, link = fill(tmp_path / "disk" / "real", one="old"), tmp_path / "link"
    link.symlink_to(real)
    with writing_folder(link) as folder:
        fill(folder, one="new")
    assert link.is_symlink()
    assert (real / "one").read_text() == "new"
    assert names(real.parent) == ["real"]


def test_a_folder_removes_what_a_killed_run_left_of_the_same_folder_only(tmp_path: Path) -> None:
    fill(tmp_path / f"{TEMPORARY_PREFIX}result-abcd1234", half="1")
    others = [f"{TEMPORARY_PREFIX}result-int8-abcd1234", f"{TEMPORARY_PREFIX}other-abcd1234", "result-abcd1234"]
    for name in others:
        fill(tmp_path / name, half="1")
    with writing_folder(tmp_path / "result"):
        pass
    assert names(tmp_path) == sorted([*others, "result"])


def test_a_name_that_looks_like_a_pattern_is_only_a_name(tmp_path: Path) -> None:
    fill(tmp_path / f"{TEMPORARY_PREFIX}result-abcd1234", half="1")
    with writing_folder(tmp_path / "r*"):
        pass
    assert names(tmp_path) == [f"{TEMPORARY_PREFIX}result-abcd1234", "r*"]


def test_cleaning_removes_unfinished_files_and_folders_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / f"{TEMPORARY_PREFIX}folder", one="1")
    fill(tmp_path, **{f"{TEMPORARY_PREFIX}file": "1", "kept": "1", ".lock": "", "unfinished-kept": ""})
    fill(tmp_path / "folder", one="1")
    clean_unfinished(tmp_path)
    assert names(tmp_path) == [".lock", "folder", "kept", "unfinished-kept"]


def test_a_folder_is_as_readable_as_any_other(tmp_path: Path) -> None:
    with writing_folder(tmp_path / "ours"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
