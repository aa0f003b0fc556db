"""``sam-export models``: the list by family, and one model in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgesam_deploy.cli import main
from edgesam_deploy.recipe import available_recipes, load_recipe


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words), prog_name="sam-export")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.split()[:1] == [name])


def test_the_list_has_a_line_per_model_grouped_by_family() -> None:
    result = run("models")
    assert result.exit_code == 0
    lines = {name: line_of(result.stdout, name) for name in available_recipes()}
    order = sorted(available_recipes(), key=lambda name: result.stdout.splitlines().index(lines[name]))
    families = [load_recipe(name).family for name in order]
    runs = [family for i, family in enumerate(families) if i == 0 or families[i - 1] != family]
    assert len(runs) == len(set(families)), "a family's models stand together"
    assert all(load_recipe(name).family in line for name, line in lines.items())
    assert families[-1] == "Students", "what is yet to be trained comes last"
    assert order.index("sam_vit_b") < order.index("sam_vit_l") < order.index("sam_vit_h")


# What a line must show: parameters, multiply-adds, image size, contract, MB to download, licence, published accuracy.
LINES = {
    "mobile_sam": ("10.1", "40.6", "1024", "sam", "41", "Apache-2.0", "41 COCO val2017 mask AP, boxes of ViTDet ["),
    "edge_sam": ("9.6", "21.8", "1024", "39", "S-Lab License 1.0 (non-commercial)", "42.2 COCO val2017 mask AP"),
    "efficientvit_sam_l0": ("34.8", "36.6", "512", "sam", "Apache-2.0", "45.7 COCO val2017 mask AP"),
    "efficient_sam_ti": ("10.2", "points", "41"),
    "sam2.1_hiera_tiny": ("high-res", "156", "76.5 SA-V test J&F, video"),
    "sam_vit_h": ("641.1", "2982.4", "2565"),
    "reference": ("9.0", "4.3", "512", "shipped", "–"),
    "student_resnet18": ("untrained", "–"),
    "slim_sam_77": ("9.7", "~39", "67.4 SA-1B mIoU"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_shows_what_decides(name: str) -> None:
    line = line_of(run("models").stdout, name)
    for shown in LINES[name]:
        assert shown in line


def test_every_number_of_a_source_is_spelt_out_below() -> None:
    text = run("models").stdout
    for name in available_recipes():
        for quote in load_recipe(name).published.accuracy[:1]:
            number = line_of(text, name).rpartition("[")[2].rstrip().removesuffix("]")
            assert f"[{number}] {quote.source}" in text.splitlines()


def test_only_weights_that_forbid_commerce_are_marked() -> None:
    marked = {line.split()[0] for line in run("models").stdout.splitlines() if "(non-commercial)" in line}
    assert marked == {name for name in available_recipes() if not load_recipe(name).checkpoint.commercial}
    assert marked == {"edge_sam", "edge_sam_3x"}


def test_json_has_everything() -> None:
    models = json.loads(run("models", "--json").stdout)
    assert [model["name"] for model in models] == list(available_recipes())
    edge = next(model for model in models if model["name"] == "edge_sam")
    assert edge["family"] == "EdgeSAM"
    assert edge["contract"] == load_recipe("edge_sam").geometry.variant
    assert edge["download_bytes"] == edge["checkpoint"]["size_bytes"] == 38807540
    assert edge["counts"]["encoder_params"] > 5_000_000
    assert edge["published"]["accuracy"][0]["value"] == 42.2
    assert json.loads(run("models", "edge_sam", "--json").stdout) == edge


@pytest.mark.parametrize("name", available_recipes())
def test_one_model_shows_every_figure_with_its_source(name: str) -> None:
    result = run("models", name)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{name}: ")
    # Long sources are folded: compare without spaces and line ends.
    text = "".join(result.stdout.split())
    recipe = load_recipe(name)
    published = recipe.published
    quotes = [(q.metric, f"{q.value:g}", q.source) for q in (*published.accuracy, *published.latency_ms)]
    files = [
        (file.url, file.sha256, file.sha256_source, file.licence, file.licence_url) for file in recipe.checkpoint.files
    ]
    rules = [*recipe.fp16.keep, *map(str, recipe.int8.keep)]
    for shown in (*(part for quote in quotes for part in quote), *published.sources.values(), *published.notes, *rules):
        assert "".join(shown.split()) in text
    for shown in (part for file in files for part in file if part is not None):
        assert "".join(shown.split()) in text
    assert "countedfromthisnetwork" in text


def test_a_recipe_of_ones_own_is_shown_by_its_path(tiny_recipe: Path) -> None:
    text = run("models", str(tiny_recipe)).stdout
    assert text.startswith("tiny: ")
    assert "counted from this network" not in text, "another size: nobody counted it"
    assert "weights: shipped, " in text
    assert "tests/data/tiny.pt" in "".join(text.split()), "however long the path is"


def test_missing_facts_are_said_to_be_missing() -> None:
    unverified = run("models", "slim_sam_77").stdout
    assert "not known: downloading it takes --accept-unverified" in unverified
    assert "weights: none published; give yours with --checkpoint FILE" in run("models", "student_resnet18").stdout


def test_an_unknown_model_is_refused() -> None:
    result = run("models", "gpt")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: unknown recipe 'gpt': expected one of ")
