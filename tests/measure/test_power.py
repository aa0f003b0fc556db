"""Power: lines that real boards printed, integrals with a known value, and the sampler against programs of our own."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesam_deploy.errors import InputError
from edgesam_deploy.measure import power, power_sources
from edgesam_deploy.measure.memory import peak_rss_mb
from edgesam_deploy.measure.power import PowerSampler, PowerTrace, energy_mj, energy_per_inference_mj
from edgesam_deploy.measure.tegrastats import TOTALS, parse_line


@dataclass(frozen=True)
class Line:
    """A line as somebody published it, and what it says, read off by hand."""

    board: str
    source: str
    text: str
    rails_w: dict[str, float]
    total_w: float | None
    total_of: str | None
    gpu_load_percent: int | None
    ram_used_mib: int


LINES = [
    Line(
        board="AGX Orin 64 GB, JetPack 5",
        source="https://catid.io/posts/orin_opt/ (github.com/catid/blog2022, content/posts/orin_opt.md)",
        text="04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) CPU [0%@729,0%@729,"
        "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@0 "
        "GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 CV0@-256C CPU@42.593C Tboard@32C SOC2@39.343C Tdiode@33.25C "
        "SOC0@39.375C CV1@-256C GPU@-256C tj@42.593C SOC1@40.468C CV2@-256C VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV "
        "400mW/400mW VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW",
        rails_w={"VDD_GPU_SOC": 2.399, "VDD_CPU_CV": 0.4, "VIN_SYS_5V0": 4.032, "VDDQ_VDD2_1V8AO": 0.301},
        total_w=6.831,
        total_of="VDD_GPU_SOC VDD_CPU_CV VIN_SYS_5V0",
        gpu_load_percent=0,
        ram_used_mib=1282,
    ),
    Line(
        board="AGX Orin 64 GB, release not told",
        source="https://github.com/GDWR/jetson_exporter/issues/14",
        text="04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729,"
        "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,"
        "0] VIC_FREQ 729 APE 174 CV0@-256C CPU@44.562C Tboard@32C SOC2@40.093C Tdiode@33C SOC0@41.093C CV1@-256C "
        "GPU@-256C tj@44.343C SOC1@41.25C CV2@-256C VDD_GPU_SOC 2340mW/2340mW VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 "
        "4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW",
        rails_w={"VDD_GPU_SOC": 2.34, "VDD_CPU_CV": 0.39, "VIN_SYS_5V0": 4.025, "VDDQ_VDD2_1V8AO": 0.301},
        total_w=6.755,
        total_of="VDD_GPU_SOC VDD_CPU_CV VIN_SYS_5V0",
        gpu_load_percent=0,
        ram_used_mib=4321,
    ),
    Line(
        board="AGX Orin developer kit, JetPack 7.2 (L4T 39.2)",
        source="https://github.com/rbonghi/jetson_stats/blob/0db437a32f137cd836d71f9c0ba3f422d96cdd01/jtop/tests/"
        "test_06_tegra_parse.py",
        text="07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201,4%@2201,14%@2201,30%@2201,"
        "18%@2201,10%@2201,10%@2201,33%@2201,7%@2201,5%@2201,27%@2201] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] "
        "NVENC0 off NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA off NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 "
        "cpu@52.968C/52.968C soc2@48.406C/48.406C soc0@49.531C/49.531C gpu@47.625C/47.625C VDD_GPU_SOC "
        "5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW",
        rails_w={"VDD_GPU_SOC": 5.139, "VDD_CPU_CV": 3.268, "VIN_SYS_5V0": 5.5},
        total_w=13.907,
        total_of="VDD_GPU_SOC VDD_CPU_CV VIN_SYS_5V0",
        gpu_load_percent=12,
        ram_used_mib=20642,
    ),
    Line(
        board="Orin Nano 8 GB, L4T 36 (kernel 5.15.148-tegra)",
        source="https://github.com/henrygd/beszel/blob/04600d83cc01b1c009f4f8dccb60d4c7754a7bde/agent/gpu_test.go "
        "(from https://github.com/henrygd/beszel/issues/286)",
        text="11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) CPU [15%@729,11%@729,"
        "14%@729,13%@729,11%@729,8%@729] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] NVDEC off NVJPG off NVJPG1 off VIC "
        "off OFA off APE 200 cpu@53.968C soc2@52.437C soc0@50.75C gpu@53.343C tj@53.968C soc1@51.656C VDD_IN "
        "12479mW/12479mW VDD_CPU_GPU_CV 4667mW/4667mW VDD_SOC 2817mW/2817mW",
        rails_w={"VDD_IN": 12.479, "VDD_CPU_GPU_CV": 4.667, "VDD_SOC": 2.817},
        total_w=12.479,
        total_of="VDD_IN",
        gpu_load_percent=63,
        ram_used_mib=6185,
    ),
    Line(
        board="Orin Nano 8 GB, release not told",
        source="https://github.com/henrygd/beszel/blob/04600d83cc01b1c009f4f8dccb60d4c7754a7bde/agent/gpu_test.go",
        text="06-18-2025 11:25:24 RAM 3452/7620MB (lfb 25x4MB) SWAP 1518/16384MB (cached 174MB) CPU [1%@1420,"
        "2%@1420,0%@1420,2%@1420,2%@729,1%@729] GR3D_FREQ 0% cpu@50.031C soc2@49.031C soc0@50C gpu@49.031C "
        "tj@50.25C soc1@50.25C VDD_IN 4824mW/4824mW VDD_CPU_GPU_CV 518mW/518mW VDD_SOC 1475mW/1475mW",
        rails_w={"VDD_IN": 4.824, "VDD_CPU_GPU_CV": 0.518, "VDD_SOC": 1.475},
        total_w=4.824,
        total_of="VDD_IN",
        gpu_load_percent=0,
        ram_used_mib=3452,
    ),
    Line(
        board="Orin NX 16 GB, JetPack 6.2",
        source="a public test on GitHub (repository not certain, by its text github.com/logikos33/Recognition): "
        "'Linha REAL capturada do box (pandora, JetPack 6.2, 2026-07-16)'; 8 CPUs and 15656 MiB are an Orin NX 16 GB",
        text="07-16-2026 13:03:45 RAM 1224/15656MB (lfb 8x4MB) SWAP 0/7828MB (cached 0MB) CPU [1%@729,0%@729,"
        "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] GR3D_FREQ 0% cv0@41.156C cpu@45.843C soc2@39.593C soc0@42.562C "
        "cv1@42.156C gpu@43.406C tj@45.843C soc1@40.25C cv2@38.593C VDD_IN 4304mW/4304mW VDD_CPU_GPU_CV "
        "573mW/573mW VDD_SOC 1218mW/1218mW",
        rails_w={"VDD_IN": 4.304, "VDD_CPU_GPU_CV": 0.573, "VDD_SOC": 1.218},
        total_w=4.304,
        total_of="VDD_IN",
        gpu_load_percent=0,
        ram_used_mib=1224,
    ),
    Line(
        board="AGX Thor developer kit, L4T 38.4",
        source="a public guide on GitHub, 'Reading tegrastats output' (repository not known); it gives "
        "/etc/nv_tegra_release as '# R38 (release), REVISION: 4.0, GCID: 43443517'",
        text="04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,"
        "1%@972,0%@972,0%@972,0%@972,0%@972,8%@972,0%@972,0%@972] EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] "
        "NVENC0_FREQ @314 NVENC1_FREQ @314 NVDEC0_FREQ @314 NVDEC1_FREQ @314 NVJPG0_FREQ @314 VIC off OFA_FREQ "
        "@315 PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C soc345@37.406C VDD_GPU "
        "1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW",
        rails_w={"VDD_GPU": 1.962, "VDD_CPU_SOC_MSS": 5.887, "VIN_SYS_5V0": 5.635, "VIN": 19.78},
        total_w=19.78,
        total_of="VIN",
        gpu_load_percent=None,
        ram_used_mib=105265,
    ),
    Line(
        board="AGX Thor, JetPack 7.2 (L4T 39.2): the mean of VIN shows that its first reading was 0",
        source="https://github.com/wendylabsinc/wendy-agent/blob/d4beff84c1a311299057beb7efc204bdad82d3be/go/internal/"
        "agent/hoststats/gpu_test.go",
        text="07-02-2026 13:45:44 RAM 36529/125749MB (lfb 12x4MB) SWAP 11/4096MB (cached 9MB) CPU [2%@972,1%@972,"
        "0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,2%@972] cpu@60.406C "
        "tj@63.281C soc012@58.468C gpu@62.906C soc345@63.281C VDD_GPU 37528mW/37528mW/37528mW VDD_CPU_SOC_MSS "
        "18961mW/18961mW/18961mW VIN_SYS_5V0 18331mW/18331mW/18331mW VIN 87426mW/43713mW/87426mW",
        rails_w={"VDD_GPU": 37.528, "VDD_CPU_SOC_MSS": 18.961, "VIN_SYS_5V0": 18.331, "VIN": 87.426},
        total_w=87.426,
        total_of="VIN",
        gpu_load_percent=None,
        ram_used_mib=36529,
    ),
    Line(
        board="AGX Thor, JetPack 7.2: a line published without its last two rails",
        source="https://github.com/wendylabsinc/wendy-agent/blob/d4beff84c1a311299057beb7efc204bdad82d3be/go/internal/"
        "agent/hoststats/gpu_test.go",
        text="07-02-2026 20:41:39 RAM 37755/125749MB (lfb 529x4MB) SWAP 31/4096MB (cached 16MB) CPU [2%@972,"
        "0%@972] cpu@40.281C/40.281C tj@41.843C/41.843C soc012@39.281C/39.281C gpu@41.843C/41.843C "
        "soc345@40.437C/40.437C VDD_GPU 1975mW/1975mW/1975mW VDD_CPU_SOC_MSS 5530mW/5530mW/5530mW",
        rails_w={"VDD_GPU": 1.975, "VDD_CPU_SOC_MSS": 5.53},
        total_w=None,
        total_of=None,
        gpu_load_percent=None,
        ram_used_mib=37755,
    ),
    Line(
        board="TX2, JetPack 4: no units, and the mean is not the reading",
        source="https://github.com/FindHao/tx-utils/issues/3",
        text="RAM 2020/7852MB (lfb 1164x4MB) CPU [9%@345,21%@345,25%@345,3%@345,1%@345,1%@345] EMC_FREQ 0% "
        "GR3D_FREQ 0% PLL@42.5C MCPU@42.5C PMIC@100C Tboard@40C GPU@41C BCPU@42.5C thermal@41.9C Tdiode@41.25C "
        "VDD_SYS_GPU 153/158 VDD_SYS_SOC 536/547 VDD_4V0_WIFI 633/527 VDD_IN 3140/3208 VDD_SYS_CPU 536/590 "
        "VDD_SYS_DDR 557/601",
        rails_w={
            "VDD_SYS_GPU": 0.153,
            "VDD_SYS_SOC": 0.536,
            "VDD_4V0_WIFI": 0.633,
            "VDD_IN": 3.14,
            "VDD_SYS_CPU": 0.536,
            "VDD_SYS_DDR": 0.557,
        },
        total_w=3.14,
        total_of="VDD_IN",
        gpu_load_percent=0,
        ram_used_mib=2020,
    ),
]


@pytest.mark.parametrize("line", LINES, ids=[line.board for line in LINES])
def test_a_published_line_says_what_a_person_reads_in_it(line: Line) -> None:
    reading = parse_line(line.text)
    assert reading is not None
    assert reading.rails_w == pytest.approx(line.rails_w)
    assert reading.total_w == (None if line.total_w is None else pytest.approx(line.total_w))
    assert (reading.rule and " ".join(reading.rule.rails)) == line.total_of
    assert reading.gpu_load_percent == line.gpu_load_percent
    assert reading.ram_used_mib == line.ram_used_mib


def test_temperatures_are_read_in_both_forms_and_sensors_that_are_off_are_left_out() -> None:
    old, new = parse_line(LINES[0].text), parse_line(LINES[8].text)
    assert old is not None
    assert new is not None
    assert {"tj", "CPU", "Tboard"} <= set(old.temperatures_c)
    assert not {"GPU", "CV0", "CV1", "CV2"} & set(old.temperatures_c)
    assert new.temperatures_c == {"cpu": 40.281, "tj": 41.843, "soc012": 39.281, "gpu": 41.843, "soc345": 40.437}


@pytest.mark.parametrize("text", ["", "tegrastats: not found", "RAM 1/2MB CPU [1%@100] GR3D_FREQ 3%", "VDD_IN 12"])
def test_a_line_without_a_power_rail_is_none(text: str) -> None:
    assert parse_line(text) is None


def test_a_total_of_nothing_is_no_total() -> None:
    """The line of L4T 39.2 with the VIN that its own mean gives for the first reading."""
    first = parse_line(LINES[7].text.replace("VIN 87426mW/43713mW/87426mW", "VIN 0mW/0mW/0mW"))
    assert first is not None
    assert first.rails_w["VIN"] == 0
    assert first.total_w is None


def test_a_rail_may_read_slightly_below_zero() -> None:
    """Two rails of a Thor at rest, as a public script on GitHub (repository not known) quotes them."""
    reading = parse_line("VDD_GPU -392mW/-392mW VIN 15004mW/15096mW")
    assert reading is not None
    assert reading.rails_w == {"VDD_GPU": -0.392, "VIN": 15.004}


def test_every_total_says_what_it_covers_and_why() -> None:
    assert {rule.scope for rule in TOTALS} == {"module", "module and carrier board"}
    assert all(rule.reason and rule.boards for rule in TOTALS)


def irregular_times(end_s: float, step_s: float) -> np.ndarray:
    """Times from 0 to beyond ``end_s``, at steps between a half and one and a half of ``step_s``."""
    steps = np.random.default_rng(7).uniform(0.5, 1.5, int(end_s / step_s) + 50) * step_s
    return np.concatenate([[0.0], np.cumsum(steps)])


def test_energy_of_a_sine_is_its_integral() -> None:
    """P(t) = 10 + 6 sin(2 pi t / 0.7) W, read at irregular times; the interval's ends lie between readings."""
    period, start, end = 0.7, 1.2345, 8.7654
    times = irregular_times(10.0, 0.03)
    trace = PowerTrace(times, 10 + 6 * np.sin(2 * np.pi * times / period))
    wave = 6 * period / (2 * np.pi) * (np.cos(2 * np.pi * start / period) - np.cos(2 * np.pi * end / period))
    joules = 10 * (end - start) + wave
    assert energy_mj(trace, start, end) == pytest.approx(joules * 1e3, rel=0.001)
    assert energy_per_inference_mj(trace, start, end, 500) == pytest.approx(joules * 1e3 / 500, rel=0.001)
    # Half a period, where the sine is what counts.
    half = 6 * period / np.pi + 10 * period / 2
    assert energy_mj(trace, 2.1, 2.45) == pytest.approx(half * 1e3, rel=0.01)


def test_energy_of_a_ramp_is_exact_whatever_the_ends() -> None:
    """P(t) = 2 t W: the integral from a to b is b^2 - a^2 joules."""
    times = irregular_times(5.0, 0.4)
    trace = PowerTrace(times, 2 * times)
    for start, end in ((0.0, 4.0), (0.123, 0.124), (1.0, 3.999), (float(times[3]), float(times[4]))):
        assert energy_mj(trace, start, end) == pytest.approx((end**2 - start**2) * 1e3)


def test_idle_power_is_taken_off_before_sharing_out() -> None:
    trace = PowerTrace(np.array([0.0, 10.0]), np.array([12.0, 12.0]))
    assert energy_per_inference_mj(trace, 2.0, 6.0, 8) == pytest.approx(6000)  # 12 W x 4 s / 8
    assert energy_per_inference_mj(trace, 2.0, 6.0, 8, idle_w=5.0) == pytest.approx(3500)  # 7 W x 4 s / 8


def test_a_counter_is_believed_before_readings_of_power() -> None:
    counter = np.array([1000.0, 3000.0, 9000.0])
    trace = PowerTrace(np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0]), counter)
    assert energy_mj(trace, 0.5, 1.5) == pytest.approx(6000 - 2000)


@pytest.mark.parametrize(
    ("times", "watts", "message"),
    [
        ([0.0], [1.0], "at least 2"),
        ([0.0, 1.0], [1.0], "of one length"),
        ([0.0, 0.0], [1.0, 1.0], "increasing"),
        ([0.0, 1.0], [1.0, np.nan], "finite"),
    ],
)
def test_a_trace_that_cannot_be_integrated_is_refused(times: list[float], watts: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PowerTrace(np.array(times), np.array(watts))


@pytest.mark.parametrize(("start", "end"), [(-0.1, 0.5), (0.5, 1.1), (0.5, 0.5), (0.7, 0.3)])
def test_energy_is_not_made_up_outside_the_trace(start: float, end: float) -> None:
    with pytest.raises(InputError, match="must lie within"):
        energy_mj(PowerTrace(np.array([0.0, 1.0]), np.array([1.0, 1.0])), start, end)


def test_no_inferences_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        energy_per_inference_mj(PowerTrace(np.array([0.0, 1.0]), np.array([1.0, 1.0])), 0.0, 1.0, 0)


NANO = LINES[4].text  # 4.824 W
FAKE = """
import os, signal, subprocess, sys, time
from pathlib import Path
here = Path(__file__).parent
(here / "pids").write_text(str(os.getpid()))
(here / "words").write_text(" ".join(sys.argv[1:]))
def say(text):
    print(text, flush=True)
"""
FOREVER = FAKE + "while True:\n    say({text!r})\n    time.sleep(0.01)\n"


def running(folder: Path) -> list[int]:
    """Which of the processes that the fake wrote down still run; one that ended but was not waited for does not."""
    found = []
    for pid in map(int, (folder / "pids").read_text().split()):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name == "power"] == []


Programs = Callable[[str, str], Path]


def test_tegrastats_from_start_to_end(programs: Programs, no_nvml: None) -> None:
    folder = programs("tegrastats", FOREVER.format(text=NANO))
    with PowerSampler(interval_ms=10) as sampler:
        start = time.monotonic()
        time.sleep(0.3)
        end = time.monotonic()
        assert len(running(folder)) == 1
    assert running(folder) == []
    assert (folder / "words").read_text() == "--interval 10"
    result = sampler.result(start, end, inferences=10)
    assert sampler.reason is None
    assert result is not None
    assert (result.source, result.scope) == ("tegrastats", "module")
    assert result.rails_w == pytest.approx({"VDD_IN": 4.824, "VDD_CPU_GPU_CV": 0.518, "VDD_SOC": 1.475})
    assert (result.total_mean_w, result.total_max_w) == pytest.approx((4.824, 4.824))
    assert result.duration_s == pytest.approx(end - start)
    assert result.samples >= 1
    assert result.energy_per_inference_mj == pytest.approx(4824 * (end - start) / 10)
    assert "VDD_IN is the monitor at the module's input" in result.notes[0]
    less = sampler.result(start, end, inferences=10, idle_w=1.824)
    assert less is not None
    assert less.energy_per_inference_mj == pytest.approx(3000 * (end - start) / 10)
    assert any("1.824 W of idle power" in note for note in less.notes)


def test_lines_that_are_not_understood_are_counted_and_passed_over(programs: Programs, no_nvml: None) -> None:
    garbage = 'sys.stdout.buffer.write(b"\\xff\\xfe garbage\\n\\n")\nsay("VDD_IN 4mW")\n'
    folder = programs("tegrastats", FAKE + garbage + f"while True:\n    say({NANO!r})\n    time.sleep(0.01)\n")
    with PowerSampler(interval_ms=10) as sampler:
        start = time.monotonic()
        time.sleep(0.1)
        end = time.monotonic()
    result = sampler.result(start, end, 1)
    assert result is not None
    assert result.total_mean_w == pytest.approx(4.824)
    assert any(note.startswith("3 lines of tegrastats without power") for note in result.notes)
    assert running(folder) == []


def test_the_first_reading_of_thor_does_not_count(programs: Programs, no_nvml: None) -> None:
    thor = LINES[7].text
    zero = thor.replace("VIN 87426mW/43713mW/87426mW", "VIN 0mW/0mW/0mW")
    programs("tegrastats", FAKE + f"say({zero!r})\nwhile True:\n    say({thor!r})\n    time.sleep(0.01)\n")
    with PowerSampler(interval_ms=10) as sampler:
        start = time.monotonic()
        time.sleep(0.1)
        end = time.monotonic()
    result = sampler.result(start, end)
    assert result is not None
    assert result.scope == "module and carrier board"
    assert result.total_mean_w == pytest.approx(87.426)
    assert result.energy_per_inference_mj is None


def test_a_tegrastats_that_ends_early_gives_no_energy_and_says_so(programs: Programs, no_nvml: None) -> None:
    lines = f"for _ in range(5):\n    say({NANO!r})\n    time.sleep(0.01)\n"
    folder = programs("tegrastats", FAKE + lines + '(here / "over").touch()\nsys.exit(3)\n')
    with PowerSampler(interval_ms=10) as sampler:
        start = time.monotonic()
        until((folder / "over").exists)
        until(lambda: running(folder) == [])
    result = sampler.result(start, time.monotonic() + 60, 4)
    assert result is not None
    assert result.total_mean_w == pytest.approx(4.824)
    assert result.energy_per_inference_mj is None
    assert any("no energy per inference" in note for note in result.notes)
    assert "tegrastats ended by itself with exit status 3" in result.notes
    # An interval after its end has no power at all.
    assert sampler.result(time.monotonic() + 60, time.monotonic() + 61, 4) is None
    assert "no readings" in str(sampler.reason)


@pytest.mark.parametrize(
    ("source", "wait_s", "reason"),
    [
        (FAKE + 'say("Error: no power monitor")\nsys.exit(1)\n', 20.0, "Error: no power monitor"),
        (FAKE + "sys.exit(7)\n", 20.0, "exit status 7"),
        (FAKE + "time.sleep(600)\n", 0.5, "no reading"),
        (FAKE + 'while True:\n    say("POM_5V_IN 2345/3000")\n    time.sleep(0.01)\n', 3.0, "POM_5V_IN"),
    ],
    ids=["an-error", "nothing", "silence", "a-board-we-do-not-know"],
)
def test_a_tegrastats_without_power_is_a_reason_not_an_error(
    programs: Programs, no_nvml: None, monkeypatch: pytest.MonkeyPatch, source: str, wait_s: float, reason: str
) -> None:
    monkeypatch.setattr(power, "START_S", wait_s)
    folder = programs("tegrastats", source)
    with PowerSampler(interval_ms=10) as sampler:
        pass
    assert sampler.result(0.0, 1.0, 1) is None
    assert reason in str(sampler.reason)
    assert "nvidia-ml-py is not installed" in str(sampler.reason)
    until(lambda: not (folder / "pids").exists() or running(folder) == [])


def test_a_program_that_cannot_be_started_is_a_reason(programs: Programs, no_nvml: None) -> None:
    (programs("tegrastats", "") / "tegrastats").write_text("#!/no/such/interpreter\n")
    with PowerSampler() as sampler:
        pass
    assert "tegrastats: [Errno 2]" in str(sampler.reason)


def test_without_tegrastats_and_nvml_there_is_a_reason(programs: Programs, no_nvml: None) -> None:
    programs("something-else", "")
    with PowerSampler() as sampler:
        done = True
    assert done
    assert sampler.result(0.0, 1.0, 1) is None
    assert sampler.reason == (
        "power was not measured. tegrastats: not on PATH. "
        "NVML: the Python package nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    )


def test_no_process_is_left_even_if_it_does_not_want_to_end(
    programs: Programs, no_nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script around the program that ignores SIGTERM, and a child of it that holds the same output open."""
    monkeypatch.setattr(power_sources, "STOP_S", 0.2)
    child = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "(here / 'pids').write_text(f'{os.getpid()} {child.pid}')\n"
    )
    folder = programs("tegrastats", FAKE + child + f"while True:\n    say({NANO!r})\n    time.sleep(0.01)\n")
    with PowerSampler(interval_ms=10):
        assert len(running(folder)) == 2
    until(lambda: running(folder) == [])


def test_control_c_while_waiting_for_the_first_reading_leaves_no_process(
    programs: Programs, no_nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = programs("tegrastats", FAKE + "time.sleep(600)\n")

    def interrupt(self: PowerSampler, time_s: float, timeout_s: float) -> bool:
        until((folder / "words").exists)
        raise KeyboardInterrupt

    monkeypatch.setattr(PowerSampler, "_wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt), PowerSampler():
        pass
    assert running(folder) == []


def test_a_pause_between_readings_is_told(programs: Programs, no_nvml: None) -> None:
    pause = f"for _ in range(20):\n    say({NANO!r})\n    time.sleep(0.001)\ntime.sleep(1)\n"
    programs("tegrastats", FAKE + pause + f"while True:\n    say({NANO!r})\n    time.sleep(0.001)\n")
    with PowerSampler(interval_ms=1) as sampler:
        start = time.monotonic()
        time.sleep(1.5)
        end = time.monotonic()
    result = sampler.result(start, end)
    assert result is not None
    assert any(note.startswith("no readings for ") for note in result.notes)


def test_an_error_in_the_block_passes_through(programs: Programs, no_nvml: None) -> None:
    folder = programs("tegrastats", FOREVER.format(text=NANO))
    with pytest.raises(KeyError, match="ours"), PowerSampler(interval_ms=10):
        raise KeyError("ours")
    assert running(folder) == []


def test_nvml_with_a_counter(programs: Programs, fake_nvml: Any) -> None:
    programs("something-else", "")
    with PowerSampler(interval_ms=10) as sampler:
        start = time.monotonic()
        time.sleep(0.3)
        end = time.monotonic()
    result = sampler.result(start, end, 10)
    assert result is not None
    assert (result.source, result.scope) == ("nvml", "GPU board")
    assert result.rails_w == pytest.approx({"GPU": 50.0})
    assert result.total_max_w == pytest.approx(50.0)
    # The counter of this GPU stands still, whatever its power: energy is the counter's.
    assert (result.total_mean_w, result.energy_per_inference_mj) == (0.0, 0.0)
    assert "NVIDIA Test 50" in result.notes[0]
    assert "energy from its energy counter" in result.notes[0]
    assert fake_nvml.opened == 0


def test_nvml_without_a_counter(programs: Programs, fake_nvml: Any) -> None:
    programs("something-else", "")
    fake_nvml.missing.add("nvmlDeviceGetTotalEnergyConsumption")
    with PowerSampler(interval_ms=10, gpu="0000:01:00.0") as sampler:
        start = time.monotonic()
        time.sleep(0.1)
        end = time.monotonic()
    result = sampler.result(start, end, 10)
    assert result is not None
    assert result.energy_per_inference_mj == pytest.approx(50_000 * (end - start) / 10)
    assert "mean over a second" in result.notes[0]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("nvmlInit", "NVML: Not Supported"),
        ("nvmlDeviceGetHandleByIndex", "NVML: GPU 0: Not Supported"),
        ("nvmlDeviceGetPowerUsage", "NVML: NVIDIA Test 50 does not tell its power"),
    ],
)
def test_nvml_without_power_is_a_reason(programs: Programs, fake_nvml: Any, missing: str, reason: str) -> None:
    programs("something-else", "")
    fake_nvml.missing.add(missing)
    with PowerSampler() as sampler:
        pass
    assert sampler.result(0.0, 1.0, 1) is None
    assert str(sampler.reason).endswith(reason)
    assert fake_nvml.opened == 0


def test_a_tegrastats_without_power_gives_way_to_nvml(programs: Programs, fake_nvml: Any) -> None:
    programs("tegrastats", FAKE + "sys.exit(1)\n")
    with PowerSampler(interval_ms=10) as sampler:
        start = time.monotonic()
        time.sleep(0.05)
        end = time.monotonic()
    result = sampler.result(start, end, 1)
    assert result is not None
    assert result.source == "nvml"


def test_the_names_are_those_of_nvidia_ml_py(fake_nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the real package is installed, it has all that the stand-in has."""
    monkeypatch.delitem(sys.modules, "pynvml")
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    names = [n for n in vars(type(fake_nvml)) if n.startswith(("nvml", "NVML"))]
    assert [n for n in names if not hasattr(pynvml, n)] == []
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_FEATURE_ENABLED) == (1, 2, 1)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="interval_ms must be at least 1"):
        PowerSampler(interval_ms=0)


def test_peak_memory_is_at_least_what_is_held() -> None:
    held = np.ones(40_000_000 // 8)
    assert peak_rss_mb() >= held.nbytes / 1e6
    assert peak_rss_mb() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
