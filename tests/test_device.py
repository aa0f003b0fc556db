"""What a machine is told by: files of Jetson Linux below a root of our own, and a driver that answers as we say."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgesam_deploy.device import (
    JETPACKS,
    MODULES,
    Machine,
    _query_driver,
    choose_target,
    cpu_features,
    examine_machine,
    find_jetpack,
    parse_l4t,
)
from edgesam_deploy.errors import TargetError
from edgesam_deploy.target import available_targets, load_target

NO_DRIVER = "libcuda-of-no-machine.so.1"

# First lines of /etc/nv_tegra_release as boards print them, each below its release, its JetPack and where it was found.
FOUND = """
32.7.1 | 4 | jetson_containers/l4t_version.py of github.com/dusty-nv/jetson-containers, comments
# R32 (release), REVISION: 7.1, GCID: 29689809, BOARD: t186ref, EABI: aarch64, DATE: Wed Feb  2 21:33:23 UTC 2022
32.5.1 | 4 | nvidia-jetson-tx2/L4T.md of github.com/pokusew/ros-setup
# R32 (release), REVISION: 5.1, GCID: 26202423, BOARD: t186ref, EABI: aarch64, DATE: Fri Feb 19 16:50:29 UTC 2021
34.1.1 | 5.0 | jetson_containers/l4t_version.py of github.com/dusty-nv/jetson-containers, comments
# R34 (release), REVISION: 1.1, GCID: 30414990, BOARD: t186ref, EABI: aarch64, DATE: Tue May 17 04:20:55 UTC 2022
35.3.1 | 5.1 | jetson_containers/l4t_version.py of github.com/dusty-nv/jetson-containers, comments
# R35 (release), REVISION: 3.1, GCID: 32790763, BOARD: t186ref, EABI: aarch64, DATE: Wed Mar 15 07:54:12 UTC 2023
36.3.0 | 6.0 | "Jetson Setup" of NVIDIA's Sionna Research Kit, github.com/NVlabs/sionna-rk
# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic, EABI: aarch64, DATE: Fri Jul 19 23:24:25 UTC 2024
36.4.3 | 6.2 | "Compiling and Loading an Out-of-Tree Kernel Driver on Jetson", by Eduardo Hernández Valdez
# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025
36.4.7 | 6.2.1 | a public benchmark log of an Orin Nano, 2026-09-01
# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, DATE: Thu Sep 18 22:54:44 UTC 2025
38.2.0 | 7.0 | public notes on a Thor, beside JETPACK_VERSION=7.1 of its container
# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: Fri Aug 22 00:55:42 UTC 2025
38.4.0 | 7.1 | public notes on tegrastats of the Jetson AGX Thor Developer Kit
# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, DATE: Wed Dec 31 00:15:19 UTC 2025
39.2.0 | 7.2 | a public benchmark log of a Jetson AGX Orin Developer Kit, 2026-07-24
# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, DATE: Mon Jun  1 09:28:48 PM UTC 2026
39.2.1 | 7.2.1 | Juxi Technology's public Orin Nano tutorial, "system check"
# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64, DATE: Fri Aug 7 05:54:22 AM UTC 2026
"""
# Line -> (Jetson Linux release, JetPack).
RELEASES = {
    line: tuple(head.split(" | ")[:2])
    for head, line in zip(FOUND.split("\n")[1::2], FOUND.split("\n")[2::2], strict=False)
}
# What follows the first line from R36 on; the same sources.
REST = """
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""
RELEASE_OF = {l4t: line for line, (l4t, _) in RELEASES.items()}
NANO_KIT = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
NX_KIT = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"


def fake_root(folder: Path, **files: str) -> Path:
    """A root with the files of a machine: release, model, compatible, boot, memory_kb."""
    places = {
        "release": "etc/nv_tegra_release",
        "model": "proc/device-tree/model",
        "compatible": "proc/device-tree/compatible",
        "boot": "etc/nv_boot_control.conf",
        "meminfo": "proc/meminfo",
    }
    for name, text in files.items():
        path = folder / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("line", "expected"), RELEASES.items(), ids=[l4t for l4t, _ in RELEASES.values()])
def test_release_lines(line: str, expected: tuple[str, str]) -> None:
    l4t = parse_l4t(line + REST)
    assert (l4t, find_jetpack(l4t or "")) == expected


@pytest.mark.parametrize("text", ["", "Ubuntu 22.04\n", "# R36", "# R36 (release), REVISION: , GCID: 1\n"])
def test_other_texts_are_no_release(text: str) -> None:
    assert parse_l4t(text) is None


@pytest.mark.parametrize("l4t", ["40.1", "39.9", "36.9.1", "38", "1"])
def test_a_release_that_is_not_in_the_table_has_no_jetpack(l4t: str) -> None:
    assert find_jetpack(l4t) is None


def test_the_table_agrees_with_the_targets() -> None:
    releases = [r for name in available_targets() for r in load_target(name).releases]
    assert releases
    assert {find_jetpack(r.l4t) for r in releases} == {"6.1", "6.2", "7.0", "7.1", "7.2"}
    assert all(find_jetpack(r.l4t) == r.jetpack for r in releases)
    assert {name for name, _ in MODULES.values()} <= set(available_targets())
    assert all(v.count(".") <= 2 for v in JETPACKS.values())


def test_an_orin_nano_is_told_by_its_files(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        release=RELEASE_OF["36.4.3"] + REST,
        model=NANO_KIT + "\0",
        compatible="nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        meminfo="MemTotal:        7802060 kB\nMemFree: 1 kB\n",
    )
    machine = examine_machine(root, NO_DRIVER)
    assert machine.memory_gb == pytest.approx(7.99, abs=0.01)
    assert (machine.l4t, machine.jetpack, machine.model, machine.module) == ("36.4.3", "6.2", NANO_KIT, "p3767-0005")
    assert (machine.compute_capability, machine.driver, machine.gpu_names) == (None, None, ())
    assert choose_target(machine) == (
        "orin-nano-8gb",
        "this is module p3767-0005 with JetPack 6.2, Jetson Linux 36.4.3.",
    )


def test_the_flashed_module_wins_over_the_carrier_board(tmp_path: Path) -> None:
    """Seen on a reComputer with an Orin Nano 8GB, whose device tree says Orin NX (a public thermal report, 2026-08)."""
    root = fake_root(
        tmp_path,
        release=RELEASE_OF["39.2.0"] + REST,
        model=f"{NX_KIT} Super\0",
        compatible="nvidia,p3768-0000+p3767-0000-super\0nvidia,p3767-0000\0nvidia,tegra234\0",
        boot="TNSPEC 3767-301-0003-F.1-1-0-recomputer-orin-j401-\nCOMPATIBLE_SPEC 3767-000-0003--1--x-\n",
    )
    machine = examine_machine(root, NO_DRIVER)
    assert machine.module == "p3767-0003"
    assert choose_target(machine)[0] == "orin-nano-8gb"


def test_a_machine_with_nothing_is_a_cpu(tmp_path: Path) -> None:
    machine = examine_machine(tmp_path, NO_DRIVER)
    assert machine == Machine(os=machine.os)
    assert choose_target(machine) == ("cpu", "there is no NVIDIA driver on this machine.")


def test_a_library_that_is_no_driver_is_said(tmp_path: Path) -> None:
    machine = examine_machine(tmp_path, "libc.so.6")
    assert "libc.so.6 is no CUDA driver" in (machine.gpu_problem or "")
    name, why = choose_target(machine)
    assert name == "cpu"
    assert why.startswith("libc.so.6 is no CUDA driver")


def test_this_machine_can_be_examined() -> None:
    """Whatever it is: with a driver there are GPUs or a reason, without one there are neither."""
    machine = examine_machine()
    if machine.driver is None and machine.gpu_problem is None:
        assert machine.gpu_names == ()
    else:
        assert bool(machine.gpu_names) != bool(machine.gpu_problem)
    assert bool(machine.gpu_names) == (machine.compute_capability is not None)


class Driver:
    """libcuda, as far as we call it: ``gpus`` are (name, major, minor), ``fails`` is the call that returns ``code``."""

    def __init__(
        self, gpus: list[tuple[str, int, int]], version: int = 13000, fails: str = "", code: int = 999
    ) -> None:
        self.gpus, self.version, self.fails, self.code = gpus, version, fails, code
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        answer = {
            "cuInit": lambda flags: None,
            "cuDriverGetVersion": lambda out: self.put(out, self.version),
            "cuDeviceGetCount": lambda out: self.put(out, len(self.gpus)),
            "cuDeviceGet": lambda out, index: self.put(out, 100 + index),
            "cuDeviceGetName": self.name,
            "cuDeviceGetAttribute": lambda out, which, device: self.put(
                out, self.gpus[device.value - 100][{75: 1, 76: 2}[which]]
            ),
        }[name]

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fails:
                return self.code
            answer(*arguments)
            return 0

        return call

    @staticmethod
    def put(out: Any, value: int) -> None:
        out._obj.value = value

    def name(self, buffer: ctypes.Array[ctypes.c_char], size: int, device: ctypes.c_int) -> None:
        assert size == ctypes.sizeof(buffer)
        buffer.value = self.gpus[device.value - 100][0].encode()


def test_gpus_are_asked_for_by_name_and_capability() -> None:
    driver = Driver([("NVIDIA H200", 9, 0), ("NVIDIA GeForce RTX 5090", 12, 0)], version=12080)
    assert _query_driver(driver) == {
        "driver": "12.8",
        "gpu_names": ("NVIDIA H200", "NVIDIA GeForce RTX 5090"),
        "compute_capability": "9.0",
    }
    assert driver.calls[:3] == ["cuDriverGetVersion", "cuInit", "cuDeviceGetCount"]


@pytest.mark.parametrize(
    "call",
    ["cuDriverGetVersion", "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"],
)
def test_a_call_that_fails_ends_the_questions(call: str) -> None:
    driver = Driver([("NVIDIA H200", 9, 0)], fails=call, code=804)
    found = _query_driver(driver)
    assert found.pop("driver", "13.0") == "13.0"
    assert found == {"gpu_problem": f"the NVIDIA driver answers {call} with code 804"}
    assert driver.calls[-1] == call
    assert choose_target(Machine(**found)) == ("cpu", f"the NVIDIA driver answers {call} with code 804.")


def test_a_driver_without_gpus() -> None:
    assert _query_driver(Driver([])) == {"driver": "13.0", "gpu_problem": "the NVIDIA driver sees no GPU"}


def test_a_driver_that_lacks_a_call_is_for_the_caller() -> None:
    with pytest.raises(AttributeError):
        _query_driver(SimpleNamespace(cuInit=lambda flags: 0))


OLD = {
    "JetPack 4": ("32.7.1", "JetPack 4 (Jetson Linux 32.7.1) is not supported: its TensorRT, 8.2 or older,"),
    "JetPack 5.0": ("34.1.1", "JetPack 5.0 (Jetson Linux 34.1.1) is not supported: its TensorRT, 8.4,"),
    "JetPack 5.1": ("35.3.1", "JetPack 5.1 (Jetson Linux 35.3.1) is not supported: its TensorRT, 8.5,"),
    "JetPack 6.0": ("36.3.0", "JetPack 6.0 (Jetson Linux 36.3.0) is not supported: its TensorRT, 8.6,"),
}


@pytest.mark.parametrize(("l4t", "message"), OLD.values(), ids=OLD)
def test_old_jetpacks_are_refused_with_the_reason(tmp_path: Path, l4t: str, message: str) -> None:
    root = fake_root(tmp_path, release=RELEASE_OF[l4t] + REST, model=NX_KIT + "\0")
    with pytest.raises(TargetError) as caught:
        choose_target(examine_machine(root, NO_DRIVER))
    assert str(caught.value).startswith(message)
    assert "weakly typed" in str(caught.value)
    assert "upgrade to JetPack 6.2 or newer" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def jetson(**known: Any) -> Machine:
    return Machine(**{"l4t": "36.4.3", "jetpack": "6.2", "os": "Linux aarch64", **known})


def card(name: str, capability: str, os: str = "Linux x86_64") -> Machine:
    return Machine(gpu_names=(name,), compute_capability=capability, driver="13.0", os=os)


CHOICES = {
    "nano-kit": (jetson(module="p3767-0005"), "orin-nano-8gb", "p3767-0005"),
    "nano-4gb": (jetson(module="p3767-0004"), "orin-nano-8gb", "memory may not be enough"),
    "nx-16gb": (jetson(module="p3767-0000"), "orin-nx-16gb", "p3767-0000"),
    "nx-8gb": (jetson(module="p3767-0001"), "orin-nano-8gb", "the nearest to an Orin NX 8GB"),
    "agx-64gb": (jetson(module="p3701-0005"), "agx-orin-64gb", "p3701-0005"),
    "agx-32gb": (jetson(module="p3701-0004"), "agx-orin-64gb", "the nearest to an AGX Orin of 32 GB"),
    "thor": (jetson(module="p3834-0008", l4t="38.4.0", jetpack="7.1"), "thor", "JetPack 7.1, Jetson Linux 38.4.0"),
    "thor-by-gpu": (Machine(model="NVIDIA Jetson", compute_capability="11.0"), "thor", "JetPack unknown"),
    "thor-by-model": (jetson(model="NVIDIA Jetson AGX Thor Developer Kit"), "thor", "Thor Developer Kit"),
    "nano-by-memory": (jetson(model=NX_KIT, memory_gb=8.0), "orin-nano-8gb", "8 GB of memory fit that target best"),
    "nx-by-memory": (jetson(model=NX_KIT, memory_gb=16.2), "orin-nx-16gb", "16 GB of memory fit that target best"),
    "agx-by-memory": (jetson(compute_capability="8.7", memory_gb=65.9), "agx-orin-64gb", "of unknown module"),
    "orin-of-unknown-memory": (jetson(model=NX_KIT), "orin-nano-8gb", "the safe choice"),
    "in-a-container": (Machine(model="NVIDIA Jetson", module="p3767-0000"), "orin-nx-16gb", "Jetson Linux unknown"),
    "newer-release": (jetson(module="p3767-0005", l4t="40.1", jetpack=None), "orin-nano-8gb", "JetPack unknown"),
    "unknown-jetson": (jetson(model="NVIDIA Jetson of 2030"), "cpu", "no target is for its GPU"),
    "h200": (card("NVIDIA H200", "9.0"), "x86-gpu", "NVIDIA H200 of compute capability 9.0"),
    "a100": (card("NVIDIA A100-SXM4-80GB", "8.0"), "x86-gpu", "NVIDIA A100-SXM4-80GB"),
    "l4": (card("NVIDIA L4", "8.9"), "x86-gpu", "compute capability 8.9"),
    "rtx-4090": (card("NVIDIA GeForce RTX 4090", "8.9"), "rtx", "compute capability 8.9"),
    "rtx-5090": (card("NVIDIA GeForce RTX 5090", "12.0"), "rtx", "compute capability 12.0"),
    "a10": (card("NVIDIA A10", "8.6"), "rtx", "compute capability 8.6"),
    "v100": (card("Tesla V100-SXM2-16GB", "7.0"), "cpu", "no target is for its compute capability, 7.0"),
    "b200": (card("NVIDIA B200", "10.0"), "cpu", "no target is for its compute capability, 10.0"),
    "gh200": (card("NVIDIA GH200 480GB", "9.0", os="Linux aarch64"), "cpu", "a machine of this kind (Linux aarch64)"),
    "no-gpu": (Machine(os="Linux x86_64"), "cpu", "no NVIDIA driver"),
}


@pytest.mark.parametrize(("machine", "name", "why"), CHOICES.values(), ids=CHOICES)
def test_the_target_that_fits(machine: Machine, name: str, why: str) -> None:
    chosen, reason = choose_target(machine)
    assert chosen == name
    assert why in reason
    assert reason.endswith(".")
    assert len(reason.splitlines()) == 1


FEATURES = {
    "x86": (
        "model name\t: x\nflags\t\t: fpu avx512_vnni amx_int8 avx512_bf16\n",
        ("avx512_vnni", "avx512_bf16", "amx_int8"),
    ),
    "arm": ("Features\t: fp asimd asimddp i8mm bf16\n", ("asimddp", "i8mm", "bf16")),
    "old": ("flags\t\t: fpu avx2\n", ()),
    "silent": ("processor\t: 0\n", None),
    "nothing": (None, None),
}


@pytest.mark.parametrize(("cpuinfo", "features"), FEATURES.values(), ids=FEATURES)
def test_what_a_cpu_has_for_int8_and_bf16(
    tmp_path: Path, cpuinfo: str | None, features: tuple[str, ...] | None
) -> None:
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo)
    assert cpu_features(tmp_path) == features


@pytest.mark.parametrize(
    ("machine", "features", "saturates"),
    [
        ("x86_64", (), True),
        ("x86_64", ("bf16",), True),
        ("x86_64", ("avx512_vnni",), False),
        ("x86_64", ("amx_int8",), False),
        ("x86_64", None, False),
        ("aarch64", ("asimddp",), False),
    ],
)
def test_which_cpus_saturate(
    machine: str, features: tuple[str, ...] | None, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgesam_deploy import device

    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(device, "cpu_features", lambda: features)
    assert device.int8_saturates() is saturates
