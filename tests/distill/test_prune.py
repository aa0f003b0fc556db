"""``sam-export prune``: what goes, what is left, and that the files hold the network that was pruned, to the bit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("torch_pruning", reason="needs the prune extra")

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgesam_deploy.cli import main
from edgesam_deploy.contract import encoder_contract
from edgesam_deploy.distill.prune import PruneOptions, cut, find_cuts, layer_macs, silenced, toml_lines
from edgesam_deploy.errors import RecipeError
from edgesam_deploy.models import build_model, graph_modules
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.models.timm_fpn import TimmFpnEncoder
from edgesam_deploy.models.widths import resize, widths
from edgesam_deploy.recipe import load_recipe, read_toml, tomllib
from edgesam_deploy.stages import export as stage

SIZE = 128


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["prune", *map(str, arguments)], prog_name="sam-export")


def image() -> Any:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def encode(encoder: Any) -> Any:
    with torch.inference_mode():
        return encoder(image())


def trained_like(backbone: str) -> TimmFpnEncoder:
    """Random weights, with batch norms that are not all alike."""
    torch.manual_seed(0)
    encoder = TimmFpnEncoder(backbone, 32).eval()
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return encoder


@pytest.fixture(scope="module")
def pruned(tiny_recipe: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny model with 30 % fewer multiply-adds: ``answer``, the files ``recipe`` and ``checkpoint``."""
    output = tmp_path_factory.mktemp("pruned")
    result = run(tiny_recipe, "--checkpoint", checkpoint, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    files = {path.suffix: path for path in output.iterdir()}
    assert sorted(path.name for path in files.values()) == ["tiny_pruned30.pt", "tiny_pruned30.toml"]
    return SimpleNamespace(answer=json.loads(result.stdout), recipe=files[".toml"], checkpoint=files[".pt"])


def test_the_files_hold_the_network_that_was_pruned(
    pruned: SimpleNamespace, tiny_recipe: Path, checkpoint: Path
) -> None:
    whole = load_model(load_recipe(tiny_recipe), checkpoint)
    encoder: Any = whole.image_encoder
    in_memory = cut(encoder, find_cuts(encoder, layer_macs(encoder, SIZE), PruneOptions(0.3)))
    loaded: Any = load_model(load_recipe(pruned.recipe), pruned.checkpoint)
    assert torch.equal(encode(loaded.image_encoder), encode(in_memory))
    state = torch.load(pruned.checkpoint, weights_only=True)
    assert {tensor.dtype for tensor in state.values()} <= {torch.float32, torch.int64}  # and batches seen by norms
    for name, tensor in whole.state_dict().items():
        if not name.startswith("image_encoder."):
            assert torch.equal(state[name], tensor)


def test_what_goes_and_what_stays(pruned: SimpleNamespace, tiny_recipe: Path) -> None:
    answer, recipe = pruned.answer, load_recipe(pruned.recipe)
    before: Any = build_model(load_recipe(tiny_recipe)).image_encoder
    after: Any = build_model(recipe).image_encoder
    for encoder, when in ((before, "before"), (after, "after")):
        assert answer[f"parameters_{when}"] == sum(p.numel() for p in encoder.parameters())
        with FlopCounterMode(display=False) as counter:  # another counter: two operations a multiply-add
            encode(encoder)
        assert answer[f"macs_{when}"] == counter.get_total_flops() // 2
    assert 0.3 <= answer["reduction"] == 1 - answer["macs_after"] / answer["macs_before"] < 0.32
    own, now = widths(before), widths(after)
    changed = {name: width for name, width in now.items() if width != own[name]}
    assert recipe.options["widths"] == {name: list(width) for name, width in changed.items()}
    assert answer["layers"] == len(changed) > 50
    assert all(n % 8 == 0 or n == 1 for width in changed.values() for n in width)
    assert now["backbone.stem.stem1.conv"][0] == 3
    assert now["fuse.6"][1] == 256
    assert encode(after).shape == encode(before).shape


def test_the_recipe_is_the_old_one_but_for_names_weights_and_widths(pruned: SimpleNamespace, tiny_recipe: Path) -> None:
    old, new = read_toml(tiny_recipe), read_toml(pruned.recipe)
    assert new.pop("name") == "tiny_pruned30"
    assert new.pop("summary").startswith(old.pop("summary"))
    assert new["model"].pop("widths")
    old.pop("checkpoint")
    old.pop("name")
    assert new == old


def test_the_same_again_and_what_the_command_says(
    pruned: SimpleNamespace, tiny_recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    result = run(tiny_recipe, "--checkpoint", checkpoint, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    for before in (pruned.recipe, pruned.checkpoint):
        assert (tmp_path / before.name).read_bytes() == before.read_bytes()
    assert re.search(r"MACs, G +0\.250 +0\.17\d +30\.\d %", result.stdout)
    other = run(tiny_recipe, "--checkpoint", checkpoint, "-o", tmp_path, "--importance", "random")
    assert other.exit_code == 2
    assert "tiny_pruned30.toml is not of this pruning" in other.stderr
    assert (tmp_path / "tiny_pruned30.pt").read_bytes() == pruned.checkpoint.read_bytes()
    recovery = (
        f"recover it: sam-export distill {tmp_path}/tiny_pruned30.toml --teacher {tiny_recipe} "
        f"--checkpoint {checkpoint} --init {tmp_path}/tiny_pruned30.pt --images"
    )
    assert recovery in result.stdout


def test_a_pruned_encoder_is_exported(pruned: SimpleNamespace) -> None:
    """As sam-export export does; the decoder, which takes most of its time, is the one that was there."""
    recipe = load_recipe(pruned.recipe)
    contract = encoder_contract(recipe.geometry)
    encoder, _ = graph_modules(load_model(recipe, pruned.checkpoint), recipe)
    proto = stage._export(encoder, stage._examples(contract), contract, None, recipe)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {contract.inputs[0].name: pixels.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(found, encoder(pixels).numpy(), atol=1e-4)


def test_squeeze_and_excite_loses_the_same_channels() -> None:
    encoder = trained_like("tf_efficientnetv2_b0")
    cuts = find_cuts(encoder, layer_macs(encoder, 64), PruneOptions(0.4))
    whole, narrow, silent = encode(encoder), encode(cut(encoder, cuts)), encode(silenced(encoder, cuts))
    scale = float(silent.abs().max())
    assert (narrow - silent).abs().max() < 1e-4 * scale
    assert (whole - silent).abs().max() > 1e-2 * scale, "or the comparison could not fail"


def test_each_importance_its_own_channels() -> None:
    encoder = trained_like("mobilenetv4_conv_small")
    macs = layer_macs(encoder, 64)
    of = {
        (name, seed): find_cuts(encoder, macs, PruneOptions(0.3, name, seed=seed))
        for name, seed in (("magnitude", 0), ("magnitude", 1), ("bn-scale", 0), ("random", 0), ("random", 1))
    }
    assert of["magnitude", 0] == of["magnitude", 1]
    assert len({str(cuts) for cuts in of.values()}) == 4
    # The neck's first layer has no norm behind it: there the batch norms' measure is of the others.
    (by_scale,) = (each.channels for each in of["bn-scale", 0] if each.root == "fuse.0")
    norm = encoder.get_submodule("fuse.1")
    assert set(by_scale) == set(norm.weight.abs().argsort()[: len(by_scale)].tolist())


def test_wrong_requests_end_in_one_line(tiny_recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    transformer = tmp_path / "transformer.toml"
    transformer.write_text(tiny_recipe.read_text("utf-8").replace("hgnetv2_b0", "tiny_vit_5m_224"), "utf-8")
    weights = tmp_path / "transformer.pt"
    torch.save(build_model(load_recipe(transformer)).state_dict(), weights)
    table: list[tuple[list[object], int, str]] = [
        (["mobile_sam"], 2, "recipe mobile_sam is of architecture 'mobile_sam': only students, of 'timm_fpn', can be"),
        ([tiny_recipe, "--ratio", 0], 2, "ratio must be above 0 and at most 0.9, such as 0.3 for 30 % fewer"),
        ([tiny_recipe, "--ratio", 0.95], 2, "ratio must be above 0 and at most 0.9"),
        ([tiny_recipe, "--ratio", "nan"], 2, "ratio must be above 0 and at most 0.9"),
        ([tiny_recipe, "--round-to", 0], 2, "round_to must be at least 1, got 0"),
        ([tiny_recipe, "--round-to", 512, "--checkpoint", checkpoint], 2, "ratio 0.3 is out of reach: "),
        ([tiny_recipe, "--checkpoint", weights], 1, "does not fit recipe 'tiny'"),
        ([transformer, "--checkpoint", weights], 2, "backbone 'tiny_vit_5m_224' cannot be pruned: torch-pruning does"),
        (["nothing"], 2, "unknown recipe 'nothing'"),
    ]
    for words, code, says in table:
        result = run(*words, "-o", tmp_path / "out")
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        assert result.stderr.startswith("error: ")
        assert says in result.stderr
        assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_missing_extra_is_named(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.delitem(sys.modules, "edgesam_deploy.distill.prune")
    result = run(tiny_recipe, "-o", tmp_path)
    assert result.exit_code == 1
    assert "pip install 'edgesam-deploy[prune]'" in result.stderr


WRONG_WIDTHS: dict[str, tuple[Any, str]] = {
    "no table": ([8], "must be a table of layers and their widths"),
    "no layer": ({"7": [8]}, "names '7', which is no Conv2d, BatchNorm2d or Linear"),
    "no width": ({"2": [8]}, "names '2', which is no Conv2d"),
    "too few": ({"0": [3, 8]}, "'0' must be 3 positive integers such as [4, 8, 2], got [3, 8]"),
    "groups": ({"0": [4, 6, 4]}, "'0' must be 3 positive integers"),
    "zero": ({"1": [0]}, "'1' must be 1 positive integers"),
    "texts": ({"1": ["8"]}, "'1' must be 1 positive integers"),
}


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(5, 6, bias=False))


@pytest.mark.parametrize(("wanted", "says"), WRONG_WIDTHS.values(), ids=WRONG_WIDTHS)
def test_wrong_widths_are_named(wanted: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        resize(small(), wanted)


def test_layers_keep_all_but_their_width() -> None:
    network = small()
    resize(network, {"0": [4, 4, 4], "1": [4], "3": [5, 2]})
    assert widths(network) == {"0": (4, 4, 4), "1": (4,), "3": (5, 2)}
    assert network(torch.zeros(1, 4, 10, 10)).shape == (1, 4, 5, 2)
    assert str(network) == str(
        nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(5, 2, bias=False))
    )


def test_toml() -> None:
    table = {
        "a": 'x "y" \\ é\n',
        "b": {"c.d": [1, 2.5, True, "ü"], "e": {"f g": [[1], [2]], "h": {"i": False}}},
        "j": 1,
    }
    assert tomllib.loads("\n".join(toml_lines(table))) == table
