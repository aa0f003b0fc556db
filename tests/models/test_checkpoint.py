"""From published files to a network: under its own names, joined from parts, and nothing lost on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="weights need the export extra")

from edgesam_deploy.cli import main
from edgesam_deploy.download import Consent
from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.files import sha256_file
from edgesam_deploy.models import ARCHITECTURES, timm_fpn
from edgesam_deploy.models.architecture import Architecture
from edgesam_deploy.models.checkpoint import checkpoint_path, join, load_model
from edgesam_deploy.recipe import Recipe, load_recipe

PARTS = """[checkpoint]
licence = "Apache-2.0"
[[checkpoint.parts]]
url = "https://example.org/encoder.pt"
{encoder}
prefix = "image_encoder."
takes = ["image_encoder."]
[[checkpoint.parts]]
url = "https://example.org/whole.pt"
{whole}
takes = ["prompt_encoder.", "mask_decoder."]
"""


def published_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A publisher who calls the mask decoder ``decoder``, and keeps two of its tensors in one."""
    named = {re.sub(r"^decoder\.", "mask_decoder.", name): tensor for name, tensor in state.items()}
    if (both := named.pop("mask_decoder.tokens", None)) is not None:
        named["mask_decoder.iou_token.weight"], named["mask_decoder.mask_tokens.weight"] = both[:1], both[1:]
    return named


@pytest.fixture(autouse=True)
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own, and an architecture whose publisher has other names."""
    monkeypatch.setenv("EDGESAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(ARCHITECTURES, "theirs", Architecture(timm_fpn.build, published_names))


@pytest.fixture
def ours(checkpoint: Path) -> dict[str, Any]:
    return dict(torch.load(checkpoint, weights_only=True))


@pytest.fixture
def theirs(ours: dict[str, Any]) -> dict[str, Any]:
    """The reference weights as that publisher has them."""
    state = {re.sub(r"^mask_decoder\.", "decoder.", name): tensor for name, tensor in ours.items()}
    state["decoder.tokens"] = torch.cat(
        [state.pop("decoder.iou_token.weight"), state.pop("decoder.mask_tokens.weight")]
    )
    return state


def recipe_of(tiny_recipe: Path, tmp_path: Path, checkpoint: str | None = None) -> Recipe:
    text = tiny_recipe.read_text(encoding="utf-8").replace('"timm_fpn"', '"theirs"')
    if checkpoint is not None:
        text, count = re.subn(r"\[checkpoint\]\n(?:.+\n)+", checkpoint, text)
        assert count == 1
    path = tmp_path / "theirs.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def fits(model: Any, ours: Mapping[str, Any]) -> bool:
    state = model.state_dict()
    return set(state) == set(ours) and all(torch.equal(state[k].float(), v.float()) for k, v in ours.items())


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "training"])
def test_published_names_and_our_own_load_alike(
    tiny_recipe: Path, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], wrapped: bool
) -> None:
    recipe = recipe_of(tiny_recipe, tmp_path)
    for state in (ours, theirs):
        torch.save({"model": state, "epoch": 1} if wrapped else state, tmp_path / "a.pt")
        assert fits(load_model(recipe, tmp_path / "a.pt"), ours)


def test_errors_name_tensors_as_the_file_does(tiny_recipe: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe, tmp_path)
    name = "decoder.iou_prediction_head.layers.0.weight"
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({**theirs, "decoder.surplus": torch.zeros(1)}, r"1 unexpected \(decoder.surplus\)"),
        ({**theirs, name: torch.zeros(1, 2)}, rf"1 misshapen \({name} is \(1, 2\), expected \("),
        ({**theirs, name: torch.full_like(theirs[name], float("inf"))}, f"inf or NaN, the first is {name}"),
        ({**theirs, "decoder.tokens": torch.zeros(5, 3)}, r"2 misshapen \(decoder.tokens is \(1, 3\), expected"),
        ({k: v for k, v in theirs.items() if k != name}, r"1 missing \(mask_decoder.iou_prediction_head.layers.0"),
        ({**theirs, "decoder.tokens": torch.tensor(0.0)}, "its tensors are not those of 'theirs' .IndexError"),
    )
    for state, says in cases:
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=says) as caught:
            load_model(recipe, tmp_path / "a.pt")
        assert len(str(caught.value).splitlines()) == 1


def parts_of(theirs: Mapping[str, Any], folder: Path, **more: Any) -> list[Path]:
    """The encoder alone, under bare names, and everything, with another encoder: what one publisher's readme says."""
    encoder = {k.removeprefix("image_encoder."): v for k, v in theirs.items() if k.startswith("image_encoder.")}
    whole = {k: torch.zeros_like(v) if k.startswith("image_encoder.") else v for k, v in theirs.items()}
    torch.save(encoder, folder / "encoder.pt")
    torch.save({"model": {**whole, **more}, "epoch": 9}, folder / "whole.pt")
    return [folder / "encoder.pt", folder / "whole.pt"]


def test_parts_are_joined_into_the_same_file_every_time(
    tiny_recipe: Path, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    recipe = recipe_of(tiny_recipe, tmp_path, PARTS.format(encoder="", whole=""))
    files = parts_of(theirs, tmp_path)
    path = join(recipe, files)
    assert fits(load_model(recipe, path), ours)
    digest = sha256_file(path)
    assert path == tmp_path / "cache" / f"tiny-{digest[:12]}.pt"
    for damage in (b"", None):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        assert join(recipe, files) == path
        assert sha256_file(path) == digest
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    changed = parts_of({**theirs, "decoder.tokens": theirs["decoder.tokens"] + 1}, tmp_path)
    assert join(recipe, changed) != path


def test_parts_that_do_not_go_together_are_refused(tiny_recipe: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe, tmp_path, PARTS.format(encoder="", whole=""))
    files = parts_of(theirs, tmp_path)
    with pytest.raises(CheckpointError, match=r"encoder.pt holds no prompt_encoder. or mask_decoder. of recipe 'tiny'"):
        join(recipe, [files[0], files[0]])
    with pytest.raises(InputError, match=r"or one for each of \['encoder.pt', 'whole.pt'\], in this order; got 3"):
        join(recipe, [*files, files[0]])
    greedy = PARTS.replace('["prompt_encoder.", "mask_decoder."]', '["image_encoder.", "mask_decoder."]')
    with pytest.raises(CheckpointError, match=r"whole.pt holds image_encoder..*, which an earlier part .* gave"):
        join(recipe_of(tiny_recipe, tmp_path, greedy.format(encoder="", whole="")), files)


def test_published_parts_are_fetched_and_joined(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Out of torch.hub's cache: how files come over the network is tests/test_download.py's."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    files = parts_of(theirs, folder)
    hashes = {f.stem: f'sha256 = "{sha256_file(f)}"\nsha256_source = "this test"' for f in files}
    recipe = recipe_of(tiny_recipe, tmp_path, PARTS.format(**hashes))
    told: list[str] = []
    path = checkpoint_path(recipe, Consent(tell=told.append))
    assert told == [f"found {file}; nothing is downloaded" for file in files]
    assert path == join(recipe, files)
    assert fits(load_model(recipe, path), ours)


def test_a_recipe_without_weights_says_how_to_give_some(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe, tmp_path, "")
    with pytest.raises(CheckpointError, match="recipe 'tiny' has no published weights: give yours with --checkpoint"):
        checkpoint_path(recipe)


def test_the_command_line_takes_a_checkpoint_for_each_part(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """As far as the network: that exporting goes on from there is tests/stages/test_export.py's."""
    loaded = []

    def export(recipe: Recipe, checkpoint: Path, output: Path) -> None:
        loaded.append(load_model(recipe, checkpoint))
        raise InputError("far enough")

    monkeypatch.setattr("edgesam_deploy.stages.export.export", export)
    recipe_of(tiny_recipe, tmp_path, PARTS.format(encoder="", whole=""))
    encoder, whole = map(str, parts_of(theirs, tmp_path))
    words = ["export", str(tmp_path / "theirs.toml"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*words, "--checkpoint", encoder, "--checkpoint", whole])
    assert (result.exit_code, result.stderr) == (2, "error: far enough\n")
    assert fits(loaded[0], ours)
    result = CliRunner().invoke(main, [*words, "--checkpoint", whole, "--checkpoint", encoder])
    assert (result.exit_code, len(loaded)) == (1, 1)
    assert "encoder.pt holds no prompt_encoder. or mask_decoder. of recipe 'tiny'" in result.stderr
