"""Weights in every format and wrapping that they are published in, and what is none."""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="weights need the export extra")
safetensors = pytest.importorskip("safetensors.torch", reason="weights need the export extra")

from edgesam_deploy.errors import CheckpointError, MissingExtraError
from edgesam_deploy.models import state_dict
from edgesam_deploy.models.state_dict import read_state_dict

STATE = {
    "image_encoder.conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "image_encoder.norm.num_batches_tracked": torch.tensor(7),
    "mask_decoder.half": torch.full((3,), 0.5, dtype=torch.float16),
}
EMA = {name: tensor + 1 for name, tensor in STATE.items()}
PARALLEL = {f"module.{name}": tensor for name, tensor in STATE.items()}
COMPILED = {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "legacy.pt", "a.safetensors"])
def test_the_format_makes_no_difference(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.save_file(STATE, path, metadata={"format": "pt"})
        assert same(dict(sorted(read_state_dict(path).items())), STATE)
        return
    torch.save(STATE, path, _use_new_zipfile_serialization=name != "legacy.pt")
    assert same(read_state_dict(path), STATE)


def test_an_archive_around_one_file_makes_no_difference(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.pt", "a.pt")
        archive.writestr("__MACOSX/._a.pt", b"attributes")
    assert same(read_state_dict(tmp_path / "a.pt.zip"), STATE)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(tmp_path / "a.pt", "a.pt")
        archive.write(tmp_path / "a.pt", "b.pt")
    with pytest.raises(CheckpointError, match="not a readable PyTorch checkpoint"):
        read_state_dict(tmp_path / "two.zip")


def test_an_archive_that_unpacks_to_more_than_any_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_dict, "CEILING_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pt", bytes(2 << 20))
    assert (tmp_path / "a.zip").stat().st_size < 1 << 14
    with pytest.raises(CheckpointError, match=r"a\.pt in it would have 2097152 bytes"):
        read_state_dict(tmp_path / "a.zip")


WRAPPED: dict[str, tuple[Any, str | None, dict[str, Any]]] = {
    "model": ({"model": STATE, "epoch": 3, "optimizer": OPTIMIZER}, None, STATE),
    "state_dict": ({"state_dict": STATE, "epoch": 3, "best": 0.7, "args": ["--lr", "1"]}, None, STATE),
    "model_state": ({"model_state": STATE, "scheduler": {"last": 3}}, None, STATE),
    "model_state_dict": ({"model_state_dict": STATE, "loss": None}, None, STATE),
    "ema-alone": ({"ema": EMA, "epoch": 3}, None, EMA),
    "ema-in-module": ({"ema": {"module": EMA, "updates": 12}, "epoch": 3}, None, EMA),
    "ema-by-key": ({"model": STATE, "model_ema": EMA, "epoch": 3}, "model_ema", EMA),
    "model-by-key": ({"model": STATE, "model_ema": EMA, "epoch": 3}, "model", STATE),
    "ema-that-is-none": ({"model": STATE, "ema": None, "epoch": 3}, None, STATE),
    "unusual-key": ({"student": STATE, "teacher": EMA, "epoch": 3}, "student", STATE),
    "plain-where-the-recipe-has-a-key": (STATE, "model_ema", STATE),
    "parallel": (PARALLEL, None, STATE),
    "parallel-and-compiled": (COMPILED, None, STATE),
    "wrapped-and-parallel": ({"state_dict": PARALLEL, "epoch": 3}, None, STATE),
    "one-name-is-not-all": ({**STATE, "module.x": torch.zeros(1)}, None, {**STATE, "module.x": torch.zeros(1)}),
    "in-tables": (
        {"PromtEncoder": {"a": torch.zeros(1), "b.c": torch.ones(1)}, "MaskDecoder": {"a": torch.ones(2)}},
        None,
        {"PromtEncoder.a": torch.zeros(1), "PromtEncoder.b.c": torch.ones(1), "MaskDecoder.a": torch.ones(2)},
    ),
}


@pytest.mark.parametrize(("saved", "key", "expected"), WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_in_what_they_are_wrapped_in(
    tmp_path: Path, saved: Any, key: str | None, expected: dict[str, Any]
) -> None:
    torch.save(saved, tmp_path / "a.pt")
    assert same(read_state_dict(tmp_path / "a.pt", key), expected)


REFUSED: dict[str, tuple[Any, str | None, str]] = {
    "two-sets": ({"model": STATE, "model_ema": EMA}, None, "holds several sets of weights, model and model_ema"),
    "key-that-is-not-there": (
        {"model": STATE, "epoch": 3},
        "model_ema",
        "has no 'model_ema', where the recipe looks for the weights: it is a dict with keys ['epoch', 'model']",
    ),
    "key-of-something-else": ({"model": STATE, "epoch": 3}, "epoch", "must hold a state dict"),
    "unknown-wrapper": ({"net": STATE, "epoch": 3}, None, "holds a dict with keys ['epoch', 'net']"),
    "optimizer-alone": ({"optimizer": OPTIMIZER}, None, "must hold a state dict"),
    "empty": ({}, None, "must hold a state dict"),
    "empty-model": ({"model": {}}, None, "must hold a state dict"),
    "number": (3, None, "holds int"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, None, "must hold a state dict"),
}


@pytest.mark.parametrize(("saved", "key", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_set_of_weights_is_refused_by_name(tmp_path: Path, saved: Any, key: str | None, says: str) -> None:
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(tmp_path / "a.pt", key)
    assert says in str(caught.value)
    assert str(tmp_path / "a.pt") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class Explosive:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_code_beside_the_weights_is_not_run(tmp_path: Path, where: str) -> None:
    torch.save({"model": STATE, where: Explosive(tmp_path / "exploded")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is refused: it holds Python objects or code"):
        read_state_dict(tmp_path / "a.pt")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Explosive(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists(), "without this the test could not fail"


@pytest.mark.parametrize("suffix", [".pt", ".legacy.pt", ".safetensors", ".zip"])
def test_a_file_that_was_damaged_anywhere_is_read_or_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    """Every 13th byte set to 255, and the file cut there."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        safetensors.save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=suffix == ".pt")
    if suffix == ".zip":
        with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, "a.pt")
        (tmp_path / "b.zip").replace(path)
    whole = path.read_bytes()
    messages = []
    for i in range(0, len(whole), 13):
        for damaged in (whole[:i] + b"\xff" + whole[i + 1 :], whole[:i]):
            path.write_bytes(damaged)
            try:
                read_state_dict(path)
            except CheckpointError as error:
                messages.append(str(error))
    assert len(messages) > len(whole) // 13
    assert all(str(path) in message and len(message.splitlines()) == 1 for message in messages)


def test_a_legacy_file_that_lacks_a_storage_is_refused(tmp_path: Path) -> None:
    """PyTorch asserts that it is there."""
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    key = re.findall(rb"\d{6,}", whole)[-1]  # of the list of storages, which comes last
    place = whole.rindex(key)
    path.write_bytes(whole[:place] + key[::-1] + whole[place + len(key) :])
    with pytest.raises(CheckpointError, match=r"is not a readable PyTorch checkpoint .* not found"):
        read_state_dict(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("gone.pt", "gone.safetensors"):
        with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path / name} does not exist"):
            read_state_dict(tmp_path / name)


def test_without_safetensors_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.save_file(STATE, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"'safetensors', which is not installed: run  pip install"):
        read_state_dict(tmp_path / "a.safetensors")
