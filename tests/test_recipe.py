"""Recipes and targets: shipped ones validate, wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgesam_deploy.contract import Geometry, decoder_contract
from edgesam_deploy.errors import InputError, RecipeError, TargetError
from edgesam_deploy.published import Published, Quote
from edgesam_deploy.recipe import available_recipes, load_recipe
from edgesam_deploy.target import available_targets, load_target


def test_shipped_recipes_and_targets_load() -> None:
    assert set(available_recipes()) >= {"reference", "mobile_sam", "sam_vit_b"}
    for name in available_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.geometry.image_size % recipe.geometry.embedding_size == 0
    assert "cpu" in available_targets()
    assert all(load_target(name).name == name for name in available_targets())


def test_padding_is_the_colour_that_normalises_closest_to_zero() -> None:
    assert load_recipe("reference").pixels.padding == (124, 116, 104)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("opset = 19", "opset = 12", "opset must be 17..20"),
        ("embedding_size = 8", "embedding_size = 7", "must be a multiple of embedding_size"),
        ("image_size = 128", "image_size = -1", "positive integer"),
        ("image_size = 128", "", "image_size"),
        ("std = [58.395, 57.12, 57.375]", "std = [58.395, 0, 57.375]", "std must be positive"),
        ("mean = [123.675, 116.28, 103.53]", "mean = [1, 2]", "mean must be three numbers"),
        ("int8 = ", "int8 = 7 #", "must be a number in 0..1"),
        ("[geometry]", "[geometry]\ndepth = 3", "unknown entries ['depth']"),
        ("[export]", "[export", "not valid TOML"),
        ("[export]", "[exports]", "unknown entries ['exports'] for recipe"),
        ("sha256 = ", 'sha256 = "zz" #', "64 lower-case hex digits"),
        ("[export]", '[precision.int8]\ncalibrator = "best"\n[export]', "calibrator must be one of"),
        ("[export]", '[precision.int8]\nresidual_add = "some"\n[export]', "residual_add must be one of"),
        ("[export]", "[precision.int8]\nattention = 1\n[export]", "attention must be true or false"),
        ("[export]", "[precision.int8]\npercentile = true\n[export]", "percentile must be a number in (50, 100]"),
        ("[export]", "[precision.int8]\ndeptwise = true\n[export]", "unknown entries ['deptwise']"),
        ("file = ", 'url = "http://127.0.0.1/x"\nfile = ', "exactly one of"),
        ('family = "Reference"', "", "the entry 'family' is missing"),
        ('family = "Reference"', 'family = " "', "family must be a text"),
    ],
)
def test_wrong_recipes_are_refused(tiny_recipe: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    text = tiny_recipe.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "wrong.toml" in str(caught.value)


PUBLISHED = """
[published]
params_m = 9.66
notes = ["9.8 M elsewhere"]

[published.sources]
params_m = "the README, table 1"

[[published.accuracy]]
metric = "COCO val2017, ground-truth boxes, mIoU"
value = 0.728
source = "another README"
"""


def test_published_figures_are_read_with_their_sources_and_are_no_part_of_the_digest(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "published.toml"
    path.write_text(tiny_recipe.read_text(encoding="utf-8") + PUBLISHED, encoding="utf-8")
    recipe, plain = load_recipe(path), load_recipe(tiny_recipe)
    assert recipe.published == Published(
        params_m=9.66,
        sources={"params_m": "the README, table 1"},
        accuracy=(Quote("COCO val2017, ground-truth boxes, mIoU", 0.728, "another README"),),
        notes=("9.8 M elsewhere",),
    )
    assert plain.published == Published()
    assert recipe.digest == plain.digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("params_m = 9.66", "params_m = 0", "published.params_m must be a positive number, got 0"),
        ("params_m = 9.66", "params_m = true", "published.params_m must be a positive number, got True"),
        ("params_m = 9.66", "params_m = 9.66\nmacs_g = 38.2", "a source for each of ['params_m', 'macs_g']"),
        ("params_m = 9.66", "", "a source for each of [], got ['params_m']"),
        ("params_m = 9.66", "flops = 1", "unknown entries ['flops'] for published"),
        ('"the README, table 1"', '""', "published.sources.params_m must be a text"),
        ("[published.sources]", "[[published.sources]]", "published.sources must be a table"),
        ("[[published.accuracy]]", "[published.accuracy]", "published.accuracy must be a list"),
        ('source = "another README"', "", "published.accuracy: the entry 'source' is missing"),
        ('source = "another README"', 'sauce = "1"', "unknown entries ['sauce'] for published.accuracy"),
        ("value = 0.728", 'value = "0.728"', "must be a positive number, got '0.728'"),
        ("value = 0.728", "value = nan", "must be a positive number, got nan"),
        ('notes = ["9.8 M elsewhere"]', 'notes = "none"', "published.notes must be a list, got 'none'"),
    ],
)
def test_published_figures_without_a_source_are_refused(
    tiny_recipe: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in PUBLISHED
    path = tmp_path / "wrong.toml"
    path.write_text(tiny_recipe.read_text(encoding="utf-8") + PUBLISHED.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "wrong.toml" in str(caught.value)


def test_rules_come_from_defaults_then_the_target_then_the_recipe(tiny_recipe: Path, tmp_path: Path) -> None:
    text = tiny_recipe.read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(f"{text}\n[precision.int8]\ndepthwise = true\n", encoding="utf-8")
    plain, own = load_recipe(tiny_recipe), load_recipe(tmp_path / "own.toml")
    rtx, cpu = load_target("rtx"), load_target("cpu")
    assert rtx.int8 == {"depthwise": False}
    assert [t.rules_for(r).depthwise for t in (cpu, rtx) for r in (plain, own)] == [True, True, False, True]
    assert (rtx.int8_rest, cpu.int8_rest) == ("fp16", "fp32")


def test_comments_do_not_change_the_digest_and_values_do(tiny_recipe: Path, tmp_path: Path) -> None:
    text = tiny_recipe.read_text(encoding="utf-8")
    (tmp_path / "a.toml").write_text("# a comment\n" + text, encoding="utf-8")
    (tmp_path / "b.toml").write_text(text.replace("opset = 19", "opset = 18"), encoding="utf-8")
    assert load_recipe(tmp_path / "a.toml").digest == load_recipe(tiny_recipe).digest
    assert load_recipe(tmp_path / "b.toml").digest != load_recipe(tiny_recipe).digest


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=f"unknown recipe 'sam9': expected one of {', '.join(available_recipes())}"):
        load_recipe("sam9")
    with pytest.raises(TargetError, match="unknown target 'toaster': expected one of agx-orin-64gb, cpu, "):
        load_target("toaster")


def test_contract_shapes_follow_the_geometry() -> None:
    geometry = Geometry(image_size=512, prompt_size=1024, embedding_size=64, embedding_channels=256, num_masks=4)
    contract = decoder_contract(geometry)
    shapes = {s.name: s.shape for s in (*contract.inputs, *contract.outputs)}
    assert shapes["mask_input"] == ("prompts", 1, 256, 256)
    assert shapes["low_res_masks"] == ("prompts", 4, 256, 256)
    assert contract.inputs[1].accepts((7, 3, 2))
    assert not contract.inputs[1].accepts((7, 3, 3))
    with pytest.raises(InputError, match="positive integer"):
        Geometry(image_size=0, prompt_size=1, embedding_size=1, embedding_channels=1, num_masks=1)
