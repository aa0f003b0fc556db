"""``sam-export targets`` and what ``doctor`` says of the machine it runs on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgesam_deploy import device
from edgesam_deploy.cli import main
from edgesam_deploy.device import Machine
from edgesam_deploy.target import available_targets, load_target

H200 = Machine(compute_capability="9.0", driver="13.0", gpu_names=("NVIDIA H200",), memory_gb=137.4, os="Linux x86_64")
OLD_ORIN = Machine(l4t="35.4.1", jetpack="5.1", model="NVIDIA Jetson AGX Orin Developer Kit", os="Linux aarch64")
ORIN = Machine(l4t="36.4.3", jetpack="6.2", module="p3767-0005", gpu_names=("Orin",), compute_capability="8.7")


def run(*words: str) -> Result:
    result = CliRunner().invoke(main, list(words), prog_name="sam-export")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this machine another one."""

    def become(machine: Machine) -> None:
        monkeypatch.setattr(device, "examine_machine", lambda: machine)

    return become


def test_the_table_has_a_line_per_device_and_says_which_target_this_machine_is(be: Any) -> None:
    be(H200)
    result = run("targets")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in available_targets():
        for one in load_target(name).devices:
            line = next(line for line in lines if one.name in line)
            assert line.startswith(name)
            for figure in (one.compute_capability, f"{one.memory_gb:g}", f"{one.int8_dense_tops:g}"):
                assert f" {figure} " in line
    assert next(line for line in lines if line.startswith("cpu"))
    assert lines[-1] == "this machine: x86-gpu: this is NVIDIA H200 of compute capability 9.0."


def test_json_has_everything(be: Any) -> None:
    be(H200)
    answer = json.loads(run("targets", "--json").stdout)
    assert [t["name"] for t in answer["targets"]] == list(available_targets())
    assert all(d["sources"]["int8_dense_tops"] for t in answer["targets"] for d in t["devices"])
    assert answer["target"] == "x86-gpu"
    assert answer["machine"]["gpu_names"] == ["NVIDIA H200"]


def test_a_machine_that_is_refused_still_gets_the_table(be: Any) -> None:
    be(OLD_ORIN)
    result = run("targets")
    assert result.exit_code == 0
    assert "this machine: no target: JetPack 5.1 (Jetson Linux 35.4.1) is not supported" in result.stdout
    assert json.loads(run("targets", "--json").stdout)["target"] is None


@pytest.mark.parametrize("name", available_targets())
def test_one_target_shows_each_figure_with_its_source(name: str) -> None:
    result = run("targets", name)
    assert result.exit_code == 0
    target = load_target(name)
    # Long sources are folded: compare without spaces and line ends.
    text = "".join(result.stdout.split())
    assert result.stdout.startswith(f"{name}: ")
    for one in target.devices:
        for figure, source in one.sources.items():
            assert figure in text
            assert "".join(source.split())[:80] in text
        assert all(mode.name.replace(" ", "") in text for mode in one.power_modes)
    for release in target.releases:
        assert f"{release.jetpack}{release.l4t}{release.tensorrt}" in text
    assert all("".join(note.split()) in text for note in target.notes)
    assert json.loads(run("targets", name, "--json").stdout)["name"] == name


def test_an_unknown_target_is_refused() -> None:
    result = run("targets", "toaster")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: unknown target 'toaster': expected one of agx-orin-64gb, cpu, orin-nano-8gb, orin-nx-16gb, rtx, thor, "
        "x86-gpu\n"
    )


def ability(answer: dict[str, Any], what: str) -> dict[str, Any]:
    return next(a for a in answer["abilities"] if a["what"] == what)


def test_doctor_names_the_machine_and_what_engines_need(be: Any) -> None:
    be(Machine(os="Linux x86_64"))
    answer = json.loads(run("doctor", "--json").stdout)
    assert (answer["here"]["target"], answer["here"]["why"]) == ("cpu", "there is no NVIDIA driver on this machine.")
    for what, extra in (("run TensorRT engines", "gpu"), ("run TensorRT for RTX engines", "rtx")):
        row = ability(answer, what)
        assert not row["ready"]
        assert row["packages"]["GPU"] == "missing"
        assert row["cure"] == f"on a machine with an NVIDIA GPU: pip install 'edgesam-deploy[{extra}]'"
    assert "this machine: cpu: there is no NVIDIA driver on this machine." in run("doctor").stdout


VERSIONS = {"in-range": ("10.16.1", True), "too-old": ("8.6.2", False), "too-new": ("12.0", False)}


@pytest.mark.parametrize(("version", "ready"), VERSIONS.values(), ids=VERSIONS)
def test_doctor_wants_a_supported_tensorrt(be: Any, monkeypatch: pytest.MonkeyPatch, version: str, ready: bool) -> None:
    be(H200)
    monkeypatch.setattr("edgesam_deploy.cli.doctor._version", lambda package: version)
    row = ability(json.loads(run("doctor", "--json").stdout), "run TensorRT engines")
    assert row["packages"] == {"tensorrt": version, "GPU": "NVIDIA H200"}
    assert row["ready"] is ready
    assert row["cure"] == "pip install 'edgesam-deploy[gpu]'"


def test_doctor_takes_tensorrt_from_jetpack(be: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    be(ORIN)
    monkeypatch.setattr("edgesam_deploy.cli.doctor._version", lambda package: "10.3.0")
    answer = json.loads(run("doctor", "--json").stdout)
    row = ability(answer, "run TensorRT engines")
    assert row["ready"]
    assert row["cure"] == "sudo apt install nvidia-jetpack && python3 -m venv --system-site-packages .venv"
    assert any("--system-site-packages" in note for note in answer["notes"])


def test_doctor_works_where_the_jetpack_is_refused(be: Any) -> None:
    be(OLD_ORIN)
    result = run("doctor")
    assert result.exit_code == 0
    assert "this machine: no target: JetPack 5.1 (Jetson Linux 35.4.1) is not supported" in result.stdout
