"""The device part, with nothing installed but the base and onnxruntime: also run on Python 3.10 (make runtime310).

EDGESAM_TEST_BUNDLE names a bundle that another Python built; without it, the bundle shipped in the package is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgesam_deploy import load_bundle, read_image, shipped_bundle
from edgesam_deploy.errors import BackendError, GraphError, InputError
from edgesam_deploy.runtime import SessionOptions, open_session
from edgesam_deploy.stages.verify import verify

PHOTO = Path(__file__).resolve().parents[2] / "edgesam_deploy" / "assets" / "photos" / "verify" / "duck.jpg"


@pytest.fixture(scope="module")
def bundle_path() -> Path:
    return Path(os.environ.get("EDGESAM_TEST_BUNDLE") or shipped_bundle())


def test_it_predicts_and_agrees_with_the_recorded_answers(bundle_path: Path) -> None:
    bundle = load_bundle(bundle_path)
    assert bundle.verified
    result = verify(bundle, threads=1)
    assert result.mask_iou.mean >= bundle.manifest["min_mask_iou"]
    # Another machine rounds differently, but not by much.
    assert result.mask_iou.mean == pytest.approx(bundle.manifest["results"]["mask_iou"]["mean"], abs=0.02)


def test_the_command_line_writes_a_mask_without_torch_or_onnx(bundle_path: Path, tmp_path: Path) -> None:
    picture, mask = tmp_path / "out.png", tmp_path / "mask.png"
    arguments = ["predict", str(PHOTO), "--point", "300,350", "-o", str(picture), "--save-mask", str(mask), "--json"]
    script = (
        "import sys; from edgesam_deploy.cli import main; main(standalone_mode=False); "
        "sys.exit(sorted({'torch', 'onnx', 'timm', 'onnxsim'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--bundle", str(bundle_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["masks"][0]
    written = read_image(mask)[..., 0]
    assert set(np.unique(written)) <= {0, 255}
    assert int((written > 0).sum()) == answer["area_px"]
    assert read_image(picture).shape == read_image(PHOTO).shape


def test_threads_are_what_was_asked_for(bundle_path: Path) -> None:
    with open_session(load_bundle(bundle_path).graph("decoder"), options=SessionOptions(threads=1)) as session:
        assert getattr(session, "threads", None) == 1
        assert getattr(session, "provider", None) == "CPUExecutionProvider"
    with pytest.raises(InputError, match="threads must be at least 1"):
        open_session(load_bundle(bundle_path).graph("decoder"), options=SessionOptions(threads=0))
    with pytest.raises(InputError, match="unknown backend 'tpu'"):
        open_session(load_bundle(bundle_path).graph("decoder"), backend="tpu")


def test_a_session_refuses_what_does_not_fit(bundle_path: Path, tmp_path: Path) -> None:
    graph = load_bundle(bundle_path).graph("encoder")
    with (
        open_session(graph, options=SessionOptions(threads=1)) as session,
        pytest.raises(BackendError, match=r"failed to run encoder\.onnx"),
    ):
        session.run({"image": np.zeros((1, 3, 7, 7), dtype=np.uint8)})
    with pytest.raises(BackendError, match="closed"):
        session.run({"image": np.zeros((1, 3, 7, 7), dtype=np.uint8)})
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(GraphError, match="cannot load"):
        open_session(broken)
