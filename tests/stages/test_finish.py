"""From a kit to engines with the real TensorRT for RTX, which compiles without a GPU; refusals of what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgesam_deploy.bundle import GRAPHS, MANIFEST, NODES, load_bundle
from edgesam_deploy.cli import main
from edgesam_deploy.files import sha256_file
from edgesam_deploy.measure.audit import WEIGHTED
from edgesam_deploy.measure.explain import read_nodes
from edgesam_deploy.runtime.plans import MAGIC, platform_tag

pytest.importorskip("torch", reason="building needs the export extra")
rtx = pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")

PRECISIONS = ("fp32", "fp16", "int8")
NO_DRIVER = "no NVIDIA driver on this machine"
HAS_GPU = Path("/dev/nvidia0").exists() or Path("/dev/nvhost-gpu").exists()
needs_no_gpu = pytest.mark.skipif(HAS_GPU, reason="tells what a machine without a GPU says")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words], prog_name="sam-export")


def alone(*words: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the first logger of a process is the only one that TensorRT uses."""
    command = [sys.executable, "-m", "edgesam_deploy", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def kits(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit per precision of the tiny model, by its name."""
    folder = tmp_path_factory.mktemp("kits")
    for precision in PRECISIONS:
        result = run("build", tiny_recipe, "--target", "rtx", "--precision", precision, "-o", folder / precision)
        assert result.exit_code in (0, 3), result.output  # the tiny model may miss the threshold of its full size
    return folder


@pytest.fixture(scope="module")
def compiled(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Each kit compiled for one architecture into a folder beside it: the command's JSON by precision."""
    folder = tmp_path_factory.mktemp("compiled")
    answers = {}
    for precision in PRECISIONS:
        done = alone(
            "compile", kits / precision, "-o", folder / precision, "--compute-capability", "8.6", "--audit", "--json"
        )
        assert done.returncode == 0, done.stderr
        answers[precision] = json.loads(done.stdout)
    return answers


@pytest.fixture
def bundle(compiled: dict[str, dict[str, object]], tmp_path: Path) -> Path:
    """A copy of the compiled INT8 bundle, to damage."""
    return Path(shutil.copytree(str(compiled["int8"]["bundle"]), tmp_path / "bundle"))


def change(bundle: Path, **engines: object) -> None:
    """Other entries in the manifest's record of the engines."""
    path = bundle / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["engines"] |= engines
    path.write_text(json.dumps(manifest))


def test_a_kit_is_verified_on_the_host_and_refuses_to_run(kits: Path) -> None:
    kit = load_bundle(kits / "int8")
    assert not kit.compiled
    assert kit.manifest["results"]["witness"] == "emulated fp16", "what is not INT8 is FP16"
    assert load_bundle(kits / "fp16").manifest["results"]["witness"] == "emulated fp16"
    assert load_bundle(kits / "fp32").manifest["results"]["witness"] == "typed graph on onnxruntime"
    result = run("predict", "photo.jpg", "--point", "1,1", "--bundle", kits / "int8")
    assert result.exit_code == 1
    result = run("bench", kits / "int8")
    assert result.exit_code == 1
    path = kits / "int8"
    says = f"error: {path} is a kit for 'rtx': finish it on that device with  sam-export compile {path}\n"
    assert result.stderr == says
    result = run("verify", kits / "int8", "--json")
    assert json.loads(result.stdout)["witness"] == "emulated fp16"


def test_a_compiled_kit_is_a_whole_bundle(compiled: dict[str, dict[str, object]]) -> None:
    bundle = load_bundle(str(compiled["int8"]["bundle"]))
    assert bundle.compiled
    record = bundle.manifest["engines"]
    assert record["library"] == "tensorrt_rtx"
    assert record["version"] == rtx.__version__
    assert record["compute_capabilities"] == ["8.6"]
    assert record["platform"] == platform_tag()
    assert record["settings"]["tf32"] is True
    for name in GRAPHS:
        assert bundle.engine(name).read_bytes()[:4] == MAGIC["tensorrt_rtx"]
        assert record["built_from"][name] == sha256_file(bundle.graph(name))
        entry = bundle.manifest["files"][f"{name}.engine"]
        assert entry["sha256"] == sha256_file(bundle.engine(name))
        assert entry["parents"] == [{"stage": "kit", "sha256": record["built_from"][name]}]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_compiled_otherwise_than_meant(compiled: dict[str, dict[str, object]], precision: str) -> None:
    """What ``explain`` says of each node is what TensorRT for RTX compiles: by the builder's own list of layers."""
    audits = compiled[precision]["audits"]
    assert isinstance(audits, dict)
    assert set(audits) == set(GRAPHS)
    assert [a["mismatched"] for a in audits.values()] == [[], []]
    told = read_nodes(load_bundle(str(compiled[precision]["bundle"]))).graphs
    for name in GRAPHS:
        wanted = {record.node: (record.op, record.precision) for record in told[name]}
        rows = {row["node"]: (row["op"], row["wanted"]) for row in audits[name]["rows"]}
        assert rows.items() <= wanted.items()
        assert {*rows, *audits[name]["missing"]} == set(wanted)
        multiply = [row for row in audits[name]["rows"] if row["op"] in WEIGHTED]
        assert all(row["compiled"] == row["wanted"] for row in multiply)
        assert len(multiply) == sum(record.weighted for record in told[name]), "none is folded away unseen"
    kinds = {row["compiled"] for row in audits["encoder"]["rows"] if row["op"] == "Conv"}
    assert kinds == ({"int8", "fp16"} if precision == "int8" else {precision}), "its grouped convolutions stay FP16"


@needs_no_gpu
def test_without_a_gpu_engines_are_compiled_but_not_verified(compiled: dict[str, dict[str, object]]) -> None:
    assert compiled["int8"]["accuracy"] is None
    bundle = load_bundle(str(compiled["int8"]["bundle"]))
    assert bundle.verified is False
    for command in (("verify", bundle.path), ("bench", bundle.path)):
        result = run(*command)
        assert result.exit_code == 1
        assert NO_DRIVER in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_the_kit_itself_becomes_the_bundle(kits: Path, tmp_path: Path) -> None:
    kit = Path(shutil.copytree(kits / "int8", tmp_path / "kit"))
    done = alone("compile", kit)
    assert done.returncode == 0, done.stderr
    assert "portable" not in done.stdout
    assert f"bundle: {kit}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kit"]
    assert load_bundle(kit).compiled
    assert load_bundle(kit).manifest["engines"]["compute_capabilities"] == []


def test_control_c_during_a_compile_leaves_the_kit_as_it_was(kits: Path, tmp_path: Path) -> None:
    kit = Path(shutil.copytree(kits / "int8", tmp_path / "kit"))
    script = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from edgesam_deploy.cli import main\n"
        "from edgesam_deploy.stages import compile\n"
        "parse = compile._parse\n"
        "def interrupted(*a):\n"
        "    parse(*a)\n"
        "    import threading; threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "compile._parse = interrupted\n"
        f"main(['compile', {str(kit)!r}], prog_name='sam-export')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300, env={**os.environ}
    )
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert "Traceback" not in done.stderr
    assert not load_bundle(kit).compiled
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kit"]


REFUSED = {
    "another-version": ({"version": "1.0.0"}, "were built by tensorrt_rtx 1.0.0, this machine has tensorrt_rtx"),
    "another-system": ({"platform": "linux-aarch64"}, "are for linux-aarch64, this machine is"),
    "stale": ({"built_from": {"encoder": "0" * 64, "decoder": "0" * 64}}, "encoder.engine is stale"),
    "garbled": ({"compute_capabilities": "8.6"}, "garbles the entry 'engines'"),
}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU of compute capability 8.6: what comes before any CUDA call is what is tested."""

    class Gpu:
        def compute_capability(self) -> str:
            return "8.6"

    monkeypatch.setattr("edgesam_deploy.runtime.cuda.open_cuda", lambda _="ctypes": Gpu())


@pytest.mark.parametrize(("engines", "says"), REFUSED.values(), ids=REFUSED)
def test_foreign_and_stale_engines_are_refused_by_name(
    bundle: Path, on_a_gpu: None, engines: dict[str, object], says: str
) -> None:
    change(bundle, **engines)
    result = run("verify", bundle)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "rebuild it here: sam-export compile BUNDLE" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_engines_of_another_gpu_are_refused(bundle: Path, on_a_gpu: None) -> None:
    change(bundle, compute_capabilities=["12.0"])
    result = run("verify", bundle)
    assert (result.exit_code, "are for compute capability 12.0, this GPU has 8.6" in result.stderr) == (1, True)


def test_a_cut_plan_never_reaches_tensorrt_and_is_rebuilt(bundle: Path) -> None:
    plan = bundle / "encoder.engine"
    plan.write_bytes(plan.read_bytes()[:1000])
    (bundle / "decoder.engine").unlink()
    result = run("verify", bundle)
    assert result.exit_code == 1
    assert "decoder.engine is missing" in result.stderr or "encoder.engine has sha256" in result.stderr
    assert f"Rebuild it on this device: sam-export compile {bundle}" in result.stderr
    done = alone("compile", bundle)
    assert done.returncode == 0, done.stderr
    assert load_bundle(bundle).compiled


def test_a_plan_that_is_none_is_refused_by_its_first_bytes(bundle: Path, on_a_gpu: None) -> None:
    """With its hash recorded, so that only a look into the file can tell."""
    plan = bundle / "encoder.engine"
    plan.write_bytes(b"this is no plan, but long enough")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"]["encoder.engine"]["sha256"] = sha256_file(plan)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    result = run("verify", bundle)
    assert result.exit_code == 1
    assert "encoder.engine is not a plan (it begins with b'this', not b'vtrt')" in result.stderr


COMPILE = {
    "unknown-capability": (("--compute-capability", "8.7"), 2, "cannot compile for 8.7, only for 7.5"),
    "version-compatible": (("--version-compatible",), 2, "tensorrt_rtx makes no version-compatible plans"),
    "too-few-points": (("--max-points", "1"), 2, "'--max-points'"),
}


@pytest.mark.parametrize(("words", "code", "says"), COMPILE.values(), ids=COMPILE)
def test_what_cannot_be_compiled_is_said(kits: Path, words: tuple[str, ...], code: int, says: str) -> None:
    done = alone("compile", kits / "int8", *words)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not load_bundle(kits / "int8").compiled


def test_a_kit_is_not_exchanged_under_the_shells_feet(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = Path(shutil.copytree(kits / "int8", tmp_path / "kit"))
    monkeypatch.chdir(kit)
    result = run("compile", ".")
    assert result.exit_code == 1
    assert "you are in it: run the command from outside" in result.stderr
    assert not load_bundle(kit).compiled


def test_a_plan_for_another_gpu_is_finished_unverified(
    kits: Path, tmp_path: Path, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a PC whose GPU is not the one compiled for; in this process, for its stand-in of a GPU."""
    from edgesam_deploy.runtime.cuda import Driver
    from edgesam_deploy.stages import finish

    monkeypatch.setattr(finish, "probe", lambda: Driver((13, 0), 1))
    monkeypatch.setattr(
        finish, "open_cuda", lambda: __import__("types").SimpleNamespace(compute_capability=lambda: "8.6")
    )
    kit = Path(shutil.copytree(kits / "int8", tmp_path / "kit"))
    result = run("compile", kit, "--compute-capability", "12.0")
    assert result.exit_code == 0, result.output
    assert "the engines were not run: the engines of this bundle are for compute capability 12.0" in result.stderr
    assert load_bundle(kit).compiled
    assert load_bundle(kit).verified is False


def test_a_bundle_for_the_cpu_needs_no_compiling(built: object) -> None:
    path = built.bundle  # type: ignore[attr-defined]
    result = run("compile", path)
    assert result.exit_code == 1
    assert "runs onnxruntime and needs no compiling" in result.stderr


@needs_no_gpu
def test_tensorrt_itself_asks_for_the_driver_first(kits: Path, tmp_path: Path) -> None:
    """A kit for a Jetson on a PC without a GPU: no TensorRT call is made, whether or not it is installed."""
    kit = Path(shutil.copytree(kits / "int8", tmp_path / "kit"))
    manifest = json.loads((kit / MANIFEST).read_text())
    (kit / MANIFEST).write_text(json.dumps(manifest | {"target": "orin-nano-8gb", "backend": "tensorrt"}))
    result = run("compile", kit)
    assert result.exit_code == 1
    assert NO_DRIVER in result.stderr


def test_an_audit_needs_the_kits_list_of_nodes(kits: Path, tmp_path: Path) -> None:
    kit = Path(shutil.copytree(kits / "fp32", tmp_path / "kit"))
    (kit / NODES).unlink()
    manifest = json.loads((kit / MANIFEST).read_text())
    del manifest["files"][NODES]
    (kit / MANIFEST).write_text(json.dumps(manifest))
    done = alone("compile", kit, "--audit")
    assert done.returncode == 1
    assert f"has no {NODES}, which lists its nodes: build the bundle again" in done.stderr
