"""A kit finished where there is neither torch nor onnx, as on a Jetson. EDGESAM_TEST_KIT names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgesam_deploy.bundle import load_bundle

KIT = os.environ.get("EDGESAM_TEST_KIT")
pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
pytestmark = pytest.mark.skipif(KIT is None, reason="EDGESAM_TEST_KIT names no kit; make test gives one")

# What a device must do without.
HEAVY = ("torch", "onnx", "onnxscript", "onnxsim", "onnxslim", "timm", "segment_anything")
SCRIPT = """
import atexit, json, sys
heavy = {heavy!r}
atexit.register(lambda: print("\\n" + json.dumps([m for m in heavy if m in sys.modules])))
from edgesam_deploy.cli import main
main({words!r}, prog_name="sam-export")
"""


def test_a_kit_is_finished_and_audited_without_torch_or_onnx(tmp_path: Path) -> None:
    kit = shutil.copytree(str(KIT), tmp_path / "kit")
    script = SCRIPT.format(heavy=HEAVY, words=["compile", str(kit), "--audit", "--json"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    answer, _, loaded = done.stdout.rstrip().rpartition("\n")
    assert json.loads(loaded) == []
    audit = json.loads(answer)["audits"]["encoder"]
    assert audit["mismatched"] == []
    meant = [row["compiled"] for row in audit["rows"] if row["wanted"] == "int8"]
    assert len(meant) == 37, "the reference encoder's convolutions, but for the depthwise ones and its first block"
    assert set(meant) == {"int8"}
    bundle = load_bundle(kit)
    assert bundle.compiled
    assert sorted(p.suffix for p in Path(kit).glob("*.engine")) == [".engine", ".engine"]
