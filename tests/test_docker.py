"""docker/: what every Dockerfile promises, the compose file, and bench.sh against a stand-in for sam-export."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
BENCH = DOCKER / "bench.sh"
COLLECT = ROOT / "benchmarks" / "collect.py"
CONSTRAINTS = {
    re.split(r"==", line)[0]
    for line in (DOCKER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line and not line.startswith("#")
}

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")

# Does what sam-export does to files and streams, at once: `build` leaves a manifest (a kit for a tensorrt target),
# `compile` adds engines, every command answers in JSON; $FAIL names what exits with 3. What was called goes to $CALLS.
FAKE = """
import json, os, sys
from pathlib import Path

command, first, *rest = sys.argv[1:]
options = {"--runs": None, **dict(zip(rest, rest[1:]))}
with open(os.environ["CALLS"], "a") as calls:
    print(command, *(a for a in sys.argv[2:]), file=calls)
folder = Path(options.get("-o", first))
if command == "build":
    folder.mkdir(parents=True)
    backend = "onnxruntime" if options["--target"] == "cpu" else "tensorrt"
    files = {"encoder.onnx": {"sha256": "00", "size_bytes": 1}, "verify/answers.npz": {"sha256": "11", "size_bytes": 2}}
    manifest = {
        "recipe": {"name": first, "digest": "22"}, "precision": options["--precision"], "target": options["--target"],
        "backend": backend, "engines": None, "verified": True, "files": files, "tools": {"numpy": "1.26.4"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
elif command == "compile":
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"engines": {"library": "tensorrt"}}))
noise = 0.4 if options["--runs"] == "7" else 0.02
failing = os.environ.get("FAIL", "").split()
answers = {
    "build": {"bundle": str(folder), "stages": [{"folder": str(folder.parent / ".stages" / folder.name)}]},
    "compile": {"bundle": str(folder), "engines": {"encoder": {"seconds": 3.5}}},
    "verify": {"bundle": str(folder), "mask_iou": {"mean": 0.98}, "passed": True},
    "bench": {"bundle": str(folder), "parts": {"total": {"median_ms": 12.5, "cv": noise}}},
}
print(json.dumps(answers[command]) if "cut" not in failing else '{"cut')
sys.exit(3 if command in failing and "int8" in folder.name else 0)
"""


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def test_there_is_one_dockerfile_per_platform() -> None:
    names = [path.name.removesuffix(".Dockerfile") for path in DOCKERFILES]
    assert names == ["cpu", "jetson-jp6", "jetson-jp7", "x86"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda p: p.stem)
class TestDockerfile:
    def test_the_base_is_an_argument_with_a_fixed_tag(self, dockerfile: Path) -> None:
        first, *rest = instructions(dockerfile)
        assert first[0] == "ARG"
        name, _, base = first[1].partition("=")
        assert name == "BASE_IMAGE"
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", base), base
        assert not base.endswith(":latest")
        assert [rest.split()[0] for name, rest in rest if name == "FROM"] == ["${BASE_IMAGE}"] * 2

    def test_the_user_is_not_root(self, dockerfile: Path) -> None:
        users = [rest for name, rest in instructions(dockerfile) if name == "USER"]
        assert len(users) == 1
        assert int(users[0].split(":")[0]) > 0

    def test_packages_are_pinned_and_leave_no_cache(self, dockerfile: Path) -> None:
        runs = [rest for name, rest in instructions(dockerfile) if name == "RUN"]
        pip = [run for run in runs if re.search(r"\bpip\b.* install\b", run)]
        assert len(pip) == 1
        assert "--no-cache-dir" in pip[0]
        assert "PIP_CONSTRAINT=docker/constraints.txt" in pip[0]
        named = re.search(r"--no-cache-dir (.*?) && ", f"{pip[0]} && ")
        assert named is not None
        assert all(word.strip("'").startswith(".") or "==" in word for word in named[1].split()), named[1]
        for run in runs:
            if "apt-get install" in run:
                assert "--no-install-recommends" in run
                assert "rm -rf /var/lib/apt/lists/*" in run
                packages = re.search(r"--no-install-recommends (.*?) && ", run)
                assert packages is not None
                assert all("=" in package for package in packages[1].split()), packages[1]

    def test_what_it_copies_is_there_and_not_ignored(self, dockerfile: Path) -> None:
        kept = [
            line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"
        ]
        copies = [rest.split() for name, rest in instructions(dockerfile) if name == "COPY" and "--from" not in rest]
        for source in (word for words in copies for word in words[:-1]):
            assert (ROOT / source).exists(), source
            assert source in kept, source

    def test_no_index_host_and_no_label_is_missing(self, dockerfile: Path) -> None:
        text = dockerfile.read_text(encoding="utf-8")
        assert "://" not in text
        for label in ("title", "description", "licenses", "revision", "base.name"):
            assert f"org.opencontainers.image.{label}=" in text

    def test_the_jetson_images_bring_no_pytorch(self, dockerfile: Path) -> None:
        if dockerfile.name.startswith("jetson"):
            assert ".[" not in dockerfile.read_text(encoding="utf-8")
            assert "--system-site-packages" in dockerfile.read_text(encoding="utf-8")


def test_the_constraints_cover_what_the_package_asks_for() -> None:
    from edgesam_deploy.recipe import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["export"], "hatchling"]
    assert {re.split(r"[>=;\s]", name)[0] for name in wanted} <= CONSTRAINTS


def test_compose_has_a_service_per_image() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    assert sorted(services) == [path.name.removesuffix(".Dockerfile") for path in DOCKERFILES]
    for name, service in services.items():
        assert service["image"] == f"edgesam-deploy:{name}"
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["read_only"] is True
        assert service["user"] == "${BENCH_UID:-1000}:${BENCH_GID:-1000}"
        assert "../benchmarks/results:/results" in service["volumes"]
        assert (service.get("runtime") == "nvidia") == (name != "cpu")
        assert ("../engines:/kits:ro" in service["volumes"]) == name.startswith("jetson")


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """Runs bench.sh with the stand-in first on PATH; results under tmp_path/results, bundles under tmp_path/work."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sam-export").write_text(f"#!{sys.executable}\n{FAKE}", encoding="utf-8")
    (tools / "sam-export").chmod(0o755)
    (tools / "python3").symlink_to(sys.executable)

    def run(*options: str | Path, fail: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BENCH_", "EDGESAM_"))}
        own = {"PATH": f"{tools}:{os.environ['PATH']}", "FAIL": fail, "CALLS": str(tmp_path / "calls"), **environment}
        folders = ("--results", tmp_path / "results", "--work", tmp_path / "work")
        command = ["bash", str(BENCH), *map(str, (*folders, *options))]
        return subprocess.run(command, capture_output=True, text=True, env={**clean, **own}, cwd=tmp_path)

    return run


def written(tmp_path: Path) -> list[str]:
    return sorted(
        p.relative_to(tmp_path / "results").as_posix() for p in (tmp_path / "results").rglob("*") if p.is_file()
    )


@needs_bash
class TestBench:
    def test_its_syntax(self) -> None:
        done = subprocess.run(["bash", "-n", str(BENCH)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert os.access(BENCH, os.X_OK)

    def test_builds_measures_and_writes_a_result_per_precision(self, bench: Any, tmp_path: Path) -> None:
        done = bench(EDGESAM_IMAGE="an image", EDGESAM_REVISION="abc")
        assert done.returncode == 0, done.stderr
        assert written(tmp_path) == ["cpu/reference-fp32.json", "cpu/reference-int8.json"]
        assert done.stdout.splitlines() == [
            f"{tmp_path}/results/cpu/reference-{p}.json: mask IoU 0.9800 against PyTorch FP32, "
            "12.5 ms from image to mask (median)"
            for p in ("fp32", "int8")
        ]
        result = json.loads((tmp_path / "results" / "cpu" / "reference-int8.json").read_text(encoding="utf-8"))
        assert (result["target"], result["recipe"], result["precision"]) == ("cpu", "reference", "int8")
        assert (result["image"], result["revision"]) == ("an image", "abc")
        assert result["bundle"]["recipe"] == {"name": "reference", "digest": "22"}
        assert result["bundle"]["files"] == {"encoder.onnx": {"sha256": "00", "size_bytes": 1}}
        assert result["verify"] == {"bundle": "cpu/reference-int8", "mask_iou": {"mean": 0.98}, "passed": True}
        assert result["build"]["stages"] == [{"folder": "cpu/.stages/reference-int8"}]
        assert str(tmp_path) not in json.dumps(result)

    @pytest.mark.parametrize("stage", ["build", "verify", "bench"])
    def test_a_bundle_that_fails_is_named_and_the_rest_goes_on(self, bench: Any, tmp_path: Path, stage: str) -> None:
        done = bench("--precisions", "int8 fp32", fail=stage)
        assert done.returncode == 1
        assert f"failed: cpu/reference-int8: {stage} ended with exit code 3" in done.stderr
        assert done.stderr.splitlines()[-1] == "error: failed: cpu/reference-int8"
        assert written(tmp_path) == ["cpu/reference-fp32.json"]

    def test_an_answer_that_is_cut_short_gives_no_result(self, bench: Any, tmp_path: Path) -> None:
        done = bench("--precisions", "fp32", fail="cut")
        assert done.returncode == 1
        assert "cannot read" in done.stderr
        assert "Traceback" not in done.stderr
        assert written(tmp_path) == []

    def test_a_gpu_target_is_compiled_after_it_is_built(self, bench: Any, tmp_path: Path) -> None:
        done = bench("--target", "x86-gpu", "--precisions", "fp32", "--runs", "7")
        assert done.returncode == 0, done.stderr
        calls = [line.split() for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()]
        assert [call[0] for call in calls] == ["build", "compile", "verify", "bench"]
        assert calls[-1][-3:] == ["--runs", "7", "--json"]
        assert "noisy, times vary by 40%" in done.stdout
        result = json.loads((tmp_path / "results" / "x86-gpu" / "reference-fp32.json").read_text(encoding="utf-8"))
        assert result["compile"]["engines"]["encoder"]["seconds"] == 3.5
        assert result["bundle"]["engines"] == {"library": "tensorrt"}

    @pytest.fixture
    def kits(self, tmp_path: Path) -> Path:
        """Kits for two devices and a CPU bundle, as builds on a host leave them."""
        folder = tmp_path / "kits"
        for target, precision in (("orin", "fp32"), ("orin", "int8"), ("thor", "fp32"), ("cpu", "fp32")):
            arguments = ["reference", "--precision", precision, "--target", target]
            output = folder / target / f"reference-{precision}"
            subprocess.run(
                [sys.executable, "-c", FAKE, "build", *arguments, "-o", str(output)],
                env={"CALLS": os.devnull},
                check=True,
                capture_output=True,
            )
        (folder / "orin" / ".stages").mkdir()
        shutil.copytree(folder / "orin" / "reference-fp32", folder / "orin" / ".stages" / "reference-fp32")
        return folder

    def test_kits_are_compiled_where_they_may_be_written(self, bench: Any, kits: Path, tmp_path: Path) -> None:
        before = {p: p.read_bytes() for p in kits.rglob("*") if p.is_file()}
        for _ in range(2):  # the second time over the first one's bundles
            done = bench("--kits", kits)
            assert done.returncode == 0, done.stderr
        assert written(tmp_path) == ["orin/reference-fp32.json", "orin/reference-int8.json", "thor/reference-fp32.json"]
        assert {p: p.read_bytes() for p in kits.rglob("*") if p.is_file()} == before
        assert "build" not in (tmp_path / "calls").read_text(encoding="utf-8")

    def test_kits_of_one_device(self, bench: Any, kits: Path, tmp_path: Path) -> None:
        done = bench("--kits", kits, "--target", "orin", fail="compile")
        assert done.returncode == 1
        assert "failed: orin/reference-int8: compile ended with exit code 3" in done.stderr
        assert written(tmp_path) == ["orin/reference-fp32.json"]

    def test_no_kits_is_an_error(self, bench: Any, kits: Path, tmp_path: Path) -> None:
        done = bench("--kits", kits, "--target", "agx")
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: no kits for agx in {kits}")

    def test_a_broken_manifest_fails_alone(self, bench: Any, kits: Path, tmp_path: Path) -> None:
        (kits / "orin" / "reference-int8" / "manifest.json").write_text(
            '{"target": "../..", "recipe"', encoding="utf-8"
        )
        done = bench("--kits", kits)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert written(tmp_path) == ["orin/reference-fp32.json", "thor/reference-fp32.json"]

    def test_a_results_folder_that_cannot_be_written_stops_it_before_any_work(self, bench: Any, tmp_path: Path) -> None:
        (tmp_path / "results").write_text("a file in the way", encoding="utf-8")
        done = bench()
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: cannot write to the results folder {tmp_path}/results")
        assert not (tmp_path / "calls").exists()

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (["--precision", "int8"], "unknown option --precision"),
            (["--runs", "0"], "--runs must be a whole number from 1 on, got '0'"),
            (["--target"], "--target needs a value"),
            (["--kits", "nowhere"], "--kits nowhere is not a folder"),
        ],
    )
    def test_wrong_usage(self, bench: Any, options: list[str], problem: str) -> None:
        done = bench(*options)
        assert done.returncode == 2
        assert problem in done.stderr


def test_a_manifest_cannot_send_a_result_elsewhere(tmp_path: Path) -> None:
    manifest = {"target": "../../etc", "recipe": {"name": "x"}, "precision": "int8", "backend": "onnxruntime"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    done = subprocess.run([sys.executable, str(COLLECT), "describe", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be part of a file name" in done.stderr
