"""sam-export profile: table, JSON, Markdown and chart tell the same, of recipes and of graphs; wrong requests end in
one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgesam_deploy.cli import main

pytest.importorskip("torch", reason="profiling needs the export extra")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["profile", *(str(w) for w in words)], prog_name="sam-export")


def answer(*words: object) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_one_recipe_in_every_form(tiny_recipe: Path, tmp_path: Path) -> None:
    result = run(
        tiny_recipe, "--no-latency", "--markdown", tmp_path / "p.md", "--chart", tmp_path / "p.svg", "--top", 3
    )
    assert result.exit_code == 0, result.output
    assert "tiny at 128 px: counting" in result.stderr
    (model,) = answer(tiny_recipe, "--no-latency")["models"]
    macs, parameters = f"{model['macs'] / 1e9:.2f}", f"{model['parameters'] / 1e6:.2f}"
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    for place in (result.stdout, text):
        assert macs in place
        assert parameters in place
        for part in ("image_encoder", "prompt_encoder", "mask_decoder", "backbone.stem", "One MAC is"):
            assert part in place
    assert text.count("| Conv2d |") + text.count("| Linear |") + text.count("DecoderGraph") == 3
    assert f"{model['macs'] / 1e9:.4g} GMACs" in (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert model["macs"] == sum(sum(part["macs"].values()) for part in model["parts"])
    assert (model["latency_ms"], model["run"], model["weights"]) == (None, None, "none")


def test_a_sweep_is_one_table(tiny_recipe: Path) -> None:
    result = run(tiny_recipe, "--no-latency", "--image-size", "64,100,128", "--batch", "1,2")
    assert result.exit_code == 0, result.output
    assert "left out: tiny does not run at 100 px: its encoder needs a multiple of 16" in result.stderr
    assert [line.split()[1:3] for line in result.stdout.splitlines() if line.startswith("tiny")] == [
        ["64", "1"],
        ["64", "2"],
        ["128", "1"],
        ["128", "2"],
    ]


def test_a_bundle_and_its_graphs(built: SimpleNamespace, tiny_recipe: Path) -> None:
    """The graphs' MACs, counted from ONNX shapes, are those counted in PyTorch of the modules that were exported."""
    of_bundle = answer(built.bundle)["graphs"]
    assert [Path(graph["file"]).name for graph in of_bundle] == ["encoder.onnx", "decoder.onnx"]
    typed = answer(built.bundle / "encoder.onnx")["graphs"]
    assert typed == of_bundle[:1]
    (source,) = answer(built.stages / "simplify-encoder" / "encoder.onnx")["graphs"]
    (model,) = answer(tiny_recipe, "--no-latency")["models"]
    assert sum(source["macs"].values()) == sum(typed[0]["macs"].values()) == model["exported_macs"]
    assert sum(of_bundle[1]["macs"].values()) == sum(sum(part["macs"].values()) for part in model["parts"][1:])
    # INT8 in place of FP32: fewer bytes.
    assert typed[0]["moved_bytes"] < source["moved_bytes"]
    shown = run(built.bundle)
    assert shown.exit_code == 0, shown.output
    assert "encoder.onnx" in shown.stdout
    assert "its heaviest layers" in shown.stdout


# words, exit code, what the last line on stderr says
WRONG: dict[str, tuple[str, int, str]] = {
    "unknown-recipe": ("gpt", 2, "unknown recipe 'gpt'"),
    "unknown-after-a-good-one": ("reference gpt", 2, "unknown recipe 'gpt'"),
    "batch-0": ("--batch 0", 2, "expected positive integers between commas, such as 512,1024, got '0'"),
    "size-text": ("--image-size large", 2, "got 'large'"),
    "size-that-does-not-divide": ("--image-size 500 --no-latency", 2, "reference does not run at 500 px"),
    "no-graph": ("{gone.onnx}", 1, "cannot read the ONNX graph"),
    "no-bundle": ("{.}", 1, "manifest.json"),
    "size-of-a-graph": ("{gone.onnx} --image-size 512", 2, "--image-size and --batch are for recipes"),
    "checkpoint-of-two": ("reference mobile_sam --checkpoint x.pt", 2, "--checkpoint is of one recipe, got 2"),
    "chart-in-no-folder": ("--chart {file}/x.svg", 1, "cannot write"),
}


@pytest.mark.parametrize(("line", "code", "says"), WRONG.values(), ids=WRONG)
def test_a_request_that_cannot_be_met(tmp_path: Path, line: str, code: int, says: str) -> None:
    (tmp_path / "file").write_text("in the way")
    words = [word.replace("{", f"{tmp_path}/").replace("}", "") for word in line.split()]
    result = run(*words)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert says in result.stderr.splitlines()[-1]
