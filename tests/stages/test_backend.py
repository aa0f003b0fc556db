"""Which backend is taken: the rule as a table, and real graphs on real backends. No times are asserted."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest

from edgesam_deploy import load_bundle, shipped_bundle
from edgesam_deploy.errors import BackendError, InputError, MissingExtraError
from edgesam_deploy.files import write_json
from edgesam_deploy.runtime import CPU_BACKENDS, SessionOptions, open_session
from edgesam_deploy.stages import backend as stage
from edgesam_deploy.stages.backend import Candidate, candidates_for, choose_backend, example_feeds, pick

GRAPH = Path("encoder.onnx")
BOTH = {"cpu": Path("a.onnx"), "tensorrt": Path("b.onnx")}
ORT_CPU, ORT_TRT = (Candidate("onnxruntime", encoding, False, BOTH[encoding]) for encoding in BOTH)
OV_CPU, OV_TRT = (Candidate("openvino", encoding, False, BOTH[encoding]) for encoding in BOTH)
OV_BF16 = Candidate("openvino", "tensorrt", True, BOTH["tensorrt"])

# milliseconds of each candidate -> the one that is taken
RULE = {
    "much-faster": ({ORT_CPU: 23.5, ORT_TRT: 40.0, OV_CPU: 9.1, OV_TRT: 6.7}, OV_TRT),
    "slower": ({ORT_CPU: 46.0, OV_CPU: 67.0}, ORT_CPU),
    "within-the-noise": ({ORT_CPU: 10.0, OV_CPU: 9.6}, ORT_CPU),
    "beyond-the-noise": ({ORT_CPU: 10.0, OV_CPU: 9.4}, OV_CPU),
    "the-faster-encoding": ({ORT_CPU: 12.0, ORT_TRT: 11.9}, ORT_TRT),
    "bf16-for-nothing": ({ORT_CPU: 23.5, OV_TRT: 6.7, OV_BF16: 6.5}, OV_TRT),
    "bf16-for-something": ({ORT_CPU: 23.5, OV_TRT: 6.7, OV_BF16: 5.0}, OV_BF16),
    "bf16-beside-onnx-runtime": ({ORT_CPU: 10.0, OV_TRT: 12.0, OV_BF16: 9.0}, OV_BF16),
    "openvino-alone": ({OV_CPU: 9.1, OV_TRT: 6.7}, OV_TRT),
    "one": ({OV_CPU: 9.1}, OV_CPU),
}


@pytest.mark.parametrize(("median_ms", "taken"), RULE.values(), ids=RULE)
def test_the_rule(median_ms: dict[Candidate, float], taken: Candidate) -> None:
    named = {candidate.label: [value, value, value] for candidate, value in median_ms.items()}
    assert pick(list(median_ms), named) == taken
    assert pick(list(reversed(median_ms)), named) == taken


# rounds of ONNX Runtime and of OpenVINO -> whether OpenVINO is taken, whose median is a third lower each time
ROUNDS = {
    "all-won": ([9.0] * 10, [6.0] * 10, True),
    "eight-of-ten": ([9.0] * 10, [6.0] * 8 + [20.0] * 2, True),
    "seven-of-ten": ([9.0] * 10, [6.0] * 7 + [20.0] * 3, False),
    "a-disturbed-machine": ([9.0, 5.0] * 5 + [9.0], [6.0] * 11, False),
}


@pytest.mark.parametrize(("onnxruntime", "openvino", "taken"), ROUNDS.values(), ids=ROUNDS)
def test_a_lower_median_is_not_enough(onnxruntime: list[float], openvino: list[float], taken: bool) -> None:
    assert median(openvino) <= median(onnxruntime) * 2 / 3
    choice = pick([ORT_CPU, OV_CPU], {ORT_CPU.label: onnxruntime, OV_CPU.label: openvino})
    assert choice == (OV_CPU if taken else ORT_CPU)


INSTALLED = {
    "both": (CPU_BACKENDS, True, {"onnxruntime", "openvino", "openvino bf16"}),
    "no-bf16": (CPU_BACKENDS, False, {"onnxruntime", "openvino"}),
    "onnxruntime": (("onnxruntime",), True, {"onnxruntime"}),
    "openvino": (("openvino",), False, {"openvino"}),
}


@pytest.mark.parametrize(("there", "half", "names"), INSTALLED.values(), ids=INSTALLED)
def test_candidates_are_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], half: bool, names: set[str]
) -> None:
    monkeypatch.setattr(stage, "installed", lambda backend: backend in there)
    monkeypatch.setattr(stage, "_has_bf16", lambda: half)
    assert {c.label for c in candidates_for({None: GRAPH}, bf16=True)} == names
    assert {(c.label, c.graph) for c in candidates_for(BOTH, bf16=True)} == {
        (f"{name}, {encoding} encoding", graph) for name in names for encoding, graph in BOTH.items()
    }
    # Nobody gets bfloat16 without asking.
    assert not any(c.bf16 for c in candidates_for(BOTH))


def test_no_backend_at_all_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "installed", lambda backend: False)
    with pytest.raises(MissingExtraError, match=r"edgesam-deploy\[cpu\]"):
        candidates_for({None: GRAPH})


WRONG = {
    "engine": (("tensorrt", None, False), "backend must be one of onnxruntime, openvino, got 'tensorrt'"),
    "bf16": (("onnxruntime", None, True), "bf16 is for openvino, got 'onnxruntime'"),
}


@pytest.mark.parametrize(("fields", "says"), WRONG.values(), ids=WRONG)
def test_a_candidate_that_cannot_be(fields: tuple[str, None, bool], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Candidate(*fields, GRAPH)


@pytest.mark.parametrize(("candidates", "runs"), [([], 1), ([ORT_CPU], 0), ([ORT_CPU, ORT_CPU], 1)])
def test_nothing_to_choose_from(candidates: list[Candidate], runs: int) -> None:
    with pytest.raises(InputError, match="expected different candidates and at least one run"):
        choose_backend(candidates, runs=runs)


def test_a_choice_states_what_it_rests_on(built: SimpleNamespace, tmp_path: Path) -> None:
    """Both encodings on all that is installed, made-up feeds; and the choice can be written as JSON."""
    graphs = {
        "cpu": built.stages / "encode-encoder" / "encoder.onnx",
        "tensorrt": built.stages / "quantize-encoder" / "encoder.onnx",
    }
    candidates = candidates_for(graphs)
    choice = choose_backend(candidates, threads=1, runs=2)
    assert set(choice.median_ms) == {c.label for c in candidates}
    assert all(value > 0 for value in choice.median_ms.values())
    assert (choice.backend, choice.encoding, choice.bf16) in {(c.backend, c.encoding, c.bf16) for c in candidates}
    assert (choice.runs, choice.threads) == (2, 1)
    assert set(choice.versions) == {c.backend for c in candidates}
    assert all(version[0].isdigit() for version in choice.versions.values())
    write_json(tmp_path / "choice.json", asdict(choice))


def test_a_candidate_that_cannot_run_is_not_passed_over() -> None:
    graph = load_bundle(shipped_bundle()).graph("encoder")
    with pytest.raises(BackendError, match="failed to run"):
        choose_backend(candidates_for({None: graph}), {"image": np.zeros((1, 3, 7, 7), np.uint8)}, threads=1, runs=1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_made_up_feeds_fit_both_graphs(backend: str) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    bundle = load_bundle(shipped_bundle())
    shapes = {}
    for name in ("encoder", "decoder"):
        with open_session(bundle.graph(name), backend, SessionOptions(threads=1)) as session:
            feeds = example_feeds(session.specs())
            shapes |= {name: value.shape for name, value in session.run(feeds).items()}
            assert feeds.keys() == {spec.name for spec in session.specs().inputs}
    side, geometry = bundle.geometry.mask_size, bundle.geometry
    assert shapes["low_res_masks"] == (1, geometry.num_masks, side, side)
    assert shapes["iou_predictions"] == (1, geometry.num_masks)
