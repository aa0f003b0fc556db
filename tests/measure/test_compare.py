"""The alternating measurement: its order and its statistics, on actions that write down when they ran."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgesam_deploy import load_bundle, shipped_bundle
from edgesam_deploy.bundle import Bundle
from edgesam_deploy.errors import InputError, MissingExtraError
from edgesam_deploy.measure import compare as module
from edgesam_deploy.measure.compare import NO_BF16, CompareOptions, alternate, compare_backends

IMAGE = np.full((60, 90, 3), 100, dtype=np.uint8)
QUICK = CompareOptions(runs=2, warmup=1, threads=1, images=1)


@pytest.fixture
def bundle() -> Bundle:
    pytest.importorskip("onnxruntime", reason="needs the extra cpu")
    return load_bundle(shipped_bundle())


def test_they_take_turns_forth_and_back_and_warm_up() -> None:
    ran: list[str] = []
    samples = alternate({name: lambda n=name: ran.append(n) for name in "abc"}, runs=3, warmup=1)
    assert "".join(ran) == "abc" + "cba" + "abc" + "cba"
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in samples.values() for value in values)


def test_rows_and_ratios(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are put in here: what is compared is what the table makes of them."""
    pace = {"onnxruntime": 10.0, "openvino": 5.0, "openvino bf16": 2.0}
    monkeypatch.setattr(module, "alternate", lambda actions, runs, warmup, progress: {n: [pace[n]] for n in actions})
    result = compare_backends(bundle, IMAGE, QUICK)
    assert [row.label for row in result.rows] == list(pace)
    assert (result.runs_on, result.images, result.threads) == (bundle.runs_on, 1, 1)
    for row in result.rows:
        if row.note is None:
            assert {name: t.ratio for name, t in row.graphs.items()} == dict.fromkeys(
                ("encoder", "decoder"), pace[row.label] / 10
            )
            assert row.mask_iou is not None
            assert row.mask_iou.count == 8
            assert row.mask_iou.mean > 0.9
        else:
            assert (row.graphs, row.mask_iou) == ({}, None)


def test_what_is_not_installed_is_a_row_that_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed", lambda backend: backend == "onnxruntime")
    result = compare_backends(bundle, IMAGE, QUICK)
    assert {row.label: row.note for row in result.rows} == {
        "onnxruntime": None,
        "openvino": "not installed: pip install 'edgesam-deploy[openvino]'",
        "openvino bf16": "not installed: pip install 'edgesam-deploy[openvino]'",
    }
    assert set(result.versions) == {"onnxruntime"}
    monkeypatch.setattr(module, "installed", lambda backend: False)
    with pytest.raises(MissingExtraError, match=r"edgesam-deploy\[cpu\]"):
        compare_backends(bundle, IMAGE, QUICK)


def test_a_cpu_without_bf16_is_a_row_that_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if not module.installed("openvino"):
        pytest.skip("needs the extra openvino")
    from edgesam_deploy.runtime import openvino

    monkeypatch.setattr(openvino, "native_bf16", lambda: False)
    result = compare_backends(bundle, IMAGE, QUICK)
    assert [row.note for row in result.rows] == [None, None, NO_BF16]


def test_a_bundle_without_answers_is_timed(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["verify/answers.npz"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = compare_backends(load_bundle(copy), IMAGE, QUICK)
    assert result.images == 0
    assert all(row.mask_iou is None for row in result.rows)
    assert set(result.rows[0].graphs) == {"encoder", "decoder"}


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warmup": -1}, {"images": 1.5}], ids=str)
def test_options_are_whole_numbers(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be a whole number"):
        CompareOptions(**wrong)
