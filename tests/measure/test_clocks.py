"""Power mode and clocks: what the two commands printed on real boards, and what is said where they do not answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgesam_deploy.measure.clocks import Clock, parse_jetson_clocks, parse_nvpmodel, read_clocks

# https://catid.io/posts/orin_opt/ (JetPack 5; 12 CPUs there, of which three are kept)
AGX_ORIN = """SOC family:tegra234  Machine:Jetson AGX Orin
Online CPUs: 0-11
cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=1 c7=1 
cpu1: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=1 c7=1 
cpu10: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=1113600 IdleStates: WFI=1 c7=1 
GPU MinFreq=306000000 MaxFreq=1300500000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1600000000 CurrentFreq=1600000000
DLA0_FALCON: Online=1 MinFreq=0 MaxFreq=844800000 CurrentFreq=844800000
PVA0_VPS0: Online=1 MinFreq=0 MaxFreq=1152000000 CurrentFreq=1152000000
FAN Dynamic Speed control=active hwmon2_pwm1=55
NV Power Mode: MAXN
"""  # noqa: W291

# A public article on GitHub about a Jetson AGX Thor developer kit, read through an index that does not name the
# repository (by its content of wang-junjian), after `sudo jetson_clocks`; 14 CPUs there, of which two are kept.
AGX_THOR_LOCKED = """SOC family:tegra264  Machine:NVIDIA Jetson AGX Thor Developer Kit
Online CPUs: 0-13, Offline CPUs:
cpu0:  Governor=schedutil MinFreq=2601000 MaxFreq=2601000 CurrentFreq=2601000 IdleStates: WFI=0 cc7=0
cpu10: Governor=schedutil MinFreq=2601000 MaxFreq=2601000 CurrentFreq=2601000 IdleStates: WFI=0 cc7=0
gpu-gpc-0 MinFreq=1575000000 MaxFreq=1575000000 CurrentFreq=1575000000
gpu-nvd-0 MinFreq=1692000000 MaxFreq=1692000000 CurrentFreq=1692000000
EMC MinFreq=665600000 MaxFreq=4266000000 CurrentFreq=4266000000 FreqOverride=1
PVA0_VPS0: Online=0 MinFreq=0 MaxFreq=1215000000 CurrentFreq=1215000000
FAN Dynamic Speed Control=nvfancontrol hwmon1_pwm1=73
NV Power Mode: MAXN
"""

# A public test on GitHub with the output of an Orin Nano Super developer kit, read through the same index.
ORIN_NANO_SUPER = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super

Online CPUs: 0-5
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1267200 IdleStates: WFI=1 c7=1
cpu4:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1728000 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=1020000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=kernel hwmon0_pwm1=88
NV Power Mode: MAXN_SUPER
"""


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", ("MAXN_SUPER", 2)),
        ("NV Power Mode: 15W\n0", ("15W", 0)),
        ("NV Power Mode: 120W\n1\n", ("120W", 1)),
        ("NV Fan Mode:cool\nNV Power Mode: MODE_30W_4CORE\n5\n", ("MODE_30W_4CORE", 5)),
        # https://github.com/NVIDIA-AI-IOT/jetbot/issues/49: without root
        ("NV Power Mode: 5W\n1\nNVPM ERROR: Error opening /sys/kernel/nvpmodel_emc_cap/emc_iso_cap: 13\n", ("5W", 1)),
        # --verbose
        ("NVPM VERB: Current mode: NV Power Mode: MAXN_SUPER\n2\nNVPM VERB: PARAM CPU_ONLINE: ARG", ("MAXN_SUPER", 2)),
        ("NV Power Mode: MAXN", ("MAXN", None)),
        ("NV Power Mode: MAXN\n12 is no mode\n", ("MAXN", None)),
        ("", None),
        ("NVPM ERROR: optMask is 1, no request for power mode", None),
    ],
)
def test_the_power_mode_is_read(text: str, mode: tuple[str, int | None] | None) -> None:
    assert parse_nvpmodel(text) == mode


def test_clocks_of_an_agx_orin() -> None:
    clocks = parse_jetson_clocks(AGX_ORIN)
    assert clocks.gpu == Clock(306, 1300.5, 306)
    assert clocks.memory == Clock(204, 3199, 2133)
    assert clocks.cpus == {
        "cpu0": Clock(729.6, 2201.6, 2201.6),
        "cpu1": Clock(729.6, 2201.6, 2201.6),
        "cpu10": Clock(729.6, 2201.6, 1113.6),
    }
    assert clocks.locked is False
    assert clocks.power_mode == "MAXN"


def test_clocks_of_a_thor_after_jetson_clocks() -> None:
    clocks = parse_jetson_clocks(AGX_THOR_LOCKED)
    assert clocks.gpu == Clock(1575, 1575, 1575)
    assert clocks.memory == Clock(665.6, 4266, 4266)
    assert clocks.cpus == {"cpu0": Clock(2601, 2601, 2601), "cpu10": Clock(2601, 2601, 2601)}
    assert clocks.locked is True


def test_clocks_of_an_orin_nano() -> None:
    clocks = parse_jetson_clocks(ORIN_NANO_SUPER)
    assert clocks.gpu == Clock(306, 1020, 306)
    assert clocks.locked is False
    assert clocks.power_mode == "MAXN_SUPER"


def test_a_cpu_that_is_off_is_left_out() -> None:
    clocks = parse_jetson_clocks(AGX_ORIN.replace("cpu1: Online=1", "cpu1: Online=0"))
    assert set(clocks.cpus) == {"cpu0", "cpu10"}


@pytest.mark.parametrize("text", ["", "Error: Run this script(/usr/bin/jetson_clocks) as a root user\n", "GPU\n\x00"])
def test_what_is_not_clocks_gives_none(text: str) -> None:
    clocks = parse_jetson_clocks(text)
    assert (clocks.gpu, clocks.memory, clocks.cpus, clocks.locked, clocks.power_mode) == (None, None, {}, None, None)


Programs = Callable[[str, str], Path]


def test_a_jetson_with_root(programs: Programs, tmp_path: Path) -> None:
    programs("nvpmodel", "import sys\nassert sys.argv[1:] == ['-q']\nprint('NV Power Mode: MAXN_SUPER\\n2')\n")
    programs("jetson_clocks", f"import sys\nassert sys.argv[1:] == ['--show']\nprint({ORIN_NANO_SUPER!r})\n")
    clocks = read_clocks(root=tmp_path)
    assert (clocks.power_mode, clocks.power_mode_id) == ("MAXN_SUPER", 2)
    assert clocks.gpu == Clock(306, 1020, 306)
    assert clocks.source == "nvpmodel, jetson_clocks"
    assert clocks.notes == ()


def write(root: Path, path: str, number: int) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{number}\n", encoding="ascii")


@pytest.mark.parametrize("device", ["17000000.gpu", "17000000.ga10b", "gpu-gpc-0"])
def test_a_jetson_without_root(programs: Programs, tmp_path: Path, device: str) -> None:
    programs("nvpmodel", "print('NV Power Mode: 15W\\n0')\n")
    programs(
        "jetson_clocks", "print('Error: Run this script(/usr/bin/jetson_clocks) as a root user')\nraise SystemExit(1)\n"
    )
    for name, number in (("min_freq", 306000000), ("max_freq", 612000000), ("cur_freq", 408000000)):
        write(tmp_path, f"sys/class/devfreq/{device}/{name}", number)
    for name, number in (("min", 729600), ("max", 1497600)):
        write(tmp_path, f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{name}_freq", number)
    clocks = read_clocks(root=tmp_path)
    assert (clocks.power_mode, clocks.power_mode_id) == ("15W", 0)
    assert clocks.gpu == Clock(306, 612, 408)
    assert clocks.cpus == {"cpu0": Clock(729.6, 1497.6, None)}
    assert (clocks.memory, clocks.locked) == (None, None)
    assert clocks.source == "nvpmodel, sysfs"
    assert len(clocks.notes) == 1
    assert "exit status 1: Error: Run this script(/usr/bin/jetson_clocks) as a root user" in clocks.notes[0]


def test_commands_that_are_missing_or_fail_are_said(programs: Programs, tmp_path: Path) -> None:
    programs("nvpmodel", "import sys\nprint('NVPM ERROR: no config', file=sys.stderr)\nraise SystemExit(255)\n")
    clocks = read_clocks(root=tmp_path)
    assert (clocks.power_mode, clocks.power_mode_id, clocks.gpu) == (None, None, None)
    assert len(clocks.notes) == 2
    assert "jetson_clocks --show gave no clocks (not on PATH)" in clocks.notes[0]
    assert clocks.notes[1] == "nvpmodel -q gave no power mode (exit status 255: NVPM ERROR: no config)"


def test_a_command_that_hangs_is_given_up(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgesam_deploy.measure.clocks.TIMEOUT_S", 0.2)
    programs("nvpmodel", "import time\ntime.sleep(600)\n")
    clocks = read_clocks(root=tmp_path)
    assert clocks.power_mode is None
    assert "timed out" in clocks.notes[1]


def test_nvml(programs: Programs, fake_nvml: Any, tmp_path: Path) -> None:
    programs("something-else", "")
    clocks = read_clocks(root=tmp_path)
    assert clocks.source == "nvml"
    assert clocks.gpu_name == "NVIDIA Test 50"
    assert clocks.gpu == Clock(None, 2100, 1410)
    assert clocks.memory == Clock(None, 7001, 5001)
    assert clocks.persistence is True
    assert clocks.power_limit_w == 70.0
    assert clocks.locked is None
    assert fake_nvml.opened == 0


def test_what_a_gpu_does_not_tell_is_none(programs: Programs, fake_nvml: Any) -> None:
    programs("something-else", "")
    fake_nvml.missing |= {"nvmlDeviceGetClockInfo", "nvmlDeviceGetPersistenceMode", "nvmlDeviceGetEnforcedPowerLimit"}
    clocks = read_clocks()
    assert clocks.gpu == Clock(None, 2100, None)
    assert (clocks.persistence, clocks.power_limit_w) == (None, None)


def test_a_machine_without_any_of_it(programs: Programs, no_nvml: None) -> None:
    programs("something-else", "")
    clocks = read_clocks()
    assert clocks.source == "none"
    assert clocks.notes == (
        "nvpmodel and jetson_clocks: not on PATH",
        "NVML: the Python package nvidia-ml-py is not installed (pip install nvidia-ml-py)",
    )
