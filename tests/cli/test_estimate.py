"""sam-export estimate on the tiny model: against the roofline by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch", reason="needs the export extra")

from edgesam_deploy.cli import main
from edgesam_deploy.measure.efficiency import load_fit
from edgesam_deploy.stages.node_work import graph_cost
from edgesam_deploy.target import available_targets, load_target


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["estimate", *map(str, arguments)])


def answer(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture(scope="module")
def everywhere(tiny_recipe: Path) -> dict[str, Any]:
    return answer(tiny_recipe, "--all-targets")


def test_every_device_with_peaks_in_both_precisions(everywhere: dict[str, Any]) -> None:
    devices = [d.name for name in available_targets() for d in load_target(name).devices]
    found = [(e["device"], e["precision"]) for e in everywhere["estimates"]]
    assert sorted(found) == sorted((d, p) for d in devices for p in ("fp16", "int8"))


def test_numbers_hang_together(everywhere: dict[str, Any]) -> None:
    by = {(e["device"], e["precision"]): e for e in everywhere["estimates"]}
    for e in everywhere["estimates"]:
        assert e["ms"] == pytest.approx(sum(g["ms"] for g in e["graphs"]))
        assert e["low_ms"] < e["ms"] < e["high_ms"]
        for graph in e["graphs"]:
            assert sum(graph["bound_ms"].values()) == pytest.approx(graph["ms"])
    nano, agx = (by[f"Jetson {n}", "fp16"] for n in ("Orin Nano 8GB", "AGX Orin 64GB"))
    assert nano["ms"] > agx["ms"], "the same graphs at 2.5 times the peaks"
    assert by["Jetson Orin Nano 8GB", "int8"]["graphs"][0]["weights_mb"] < 0.7 * nano["graphs"][0]["weights_mb"]
    assert nano["energy_mj"] == pytest.approx(nano["ms"] * 25), "of its 25 W mode"


def test_a_bundle_is_priced_as_it_is(built: SimpleNamespace) -> None:
    target = load_target("orin-nano-8gb")
    found = answer(built.bundle, "--target", target.name)["estimates"][0]
    fit = load_fit()
    expected = [
        graph_cost(built.bundle / f"{name}.onnx", target.devices[0], fit.efficiency).ms
        for name in ("encoder", "decoder")
    ]
    assert [g["ms"] for g in found["graphs"]] == pytest.approx(expected)
    assert found["precision"] == "int8"


def test_the_table_tells_its_range_and_what_it_is(built: SimpleNamespace) -> None:
    result = run(built.bundle, "--target", "orin-nano-8gb", "--layers")
    assert result.exit_code == 0, result.output
    assert "estimated, not measured" in result.stdout
    assert "9 of 10 published latencies" in result.stdout
    assert "longest kernels" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "--target NAME"),
        (("--target", "cpu", "--all-targets"), 2, "--target NAME"),
        (("--target", "toaster"), 2, "unknown target 'toaster'"),
        (("--target", "cpu", "--precision", "int4"), 2, "int4"),
        (("nothing", "--target", "rtx"), 2, "unknown recipe 'nothing'"),
        (("gone.onnx", "--target", "rtx"), 1, "gone.onnx"),
    ],
    ids=str,
)
def test_refusals(arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, says in result.output) == (code, True), result.output


def test_a_cpu_is_measured_instead(built: SimpleNamespace) -> None:
    result = run(built.bundle, "--target", "cpu")
    assert result.exit_code == 2, result.output
    assert "sam-export bench" in result.output
