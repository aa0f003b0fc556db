"""What a line of ``tegrastats`` says about power, on the Jetsons of JetPack 5, 6 and 7.

A rail is printed as ``VDD_IN 4996mW/5027mW``: the reading now and the mean since tegrastats was started, from L4T 39 on
also the largest (``VDD_GPU_SOC 5139mW/5139mW/5139mW``). Only the reading now is of use here: the mean covers more than
what is measured. NVIDIA's table of the line: Jetson Linux Developer Guide, "Tegrastats Utility", e.g.
https://docs.nvidia.com/jetson/archives/r36.4.3/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# A rail that is wired to nothing.
NOT_CONNECTED = "NC"

# Old releases (JetPack 4) print milliwatts without the unit; memory ("RAM 2461/7620MB") does not match either way.
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?(?:/-?\d+(?:mW)?){1,2}(?!\S)")
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
# "GR3D_FREQ 63%@[621]", "GR3D_FREQ 0%"; Thor prints no load ("GR3D_FREQ @[314,314,314]") or no such field.
_GPU_LOAD = re.compile(r"\bGR3D_FREQ (\d+)%")
# "tj@53.968C", from L4T 39 on also "tj@41.843C/41.843C". A sensor that is switched off reads -256.
_TEMPERATURE = re.compile(r"(?<!\S)(\w+)@(-?\d+(?:\.\d+)?)C(?:/-?\d+(?:\.\d+)?C)?(?!\S)")
_SENSOR_OFF_C = -256.0


@dataclass(frozen=True, slots=True)
class TotalRule:
    """Which rails add up to the total on which boards, what the total covers, and how we know."""

    rails: tuple[str, ...]
    boards: str
    scope: str
    reason: str


# In order: the first rule all of whose rails are in a line is the one for its board.
TOTALS = (
    TotalRule(
        rails=("VIN",),
        boards="AGX Thor",
        scope="module and carrier board",
        reason="VIN is the INA238 at the board's power input, upstream of module and carrier board "
        "(https://forums.developer.nvidia.com/t/question-about-power-monitor-with-additional-load-on-jetson-thor/366461)",
    ),
    TotalRule(
        rails=("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
        boards="AGX Thor on a carrier board without the INA238",
        scope="module",
        reason="taken as on AGX Orin: the three channels of the module's INA3221 (not found documented as a sum)",
    ),
    TotalRule(
        rails=("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        boards="AGX Orin",
        scope="module",
        reason="the module has no monitor at its input: GPU and SoC, CPU and accelerators, and the 5 V system rail "
        "are its supplies, next to each other; VDDQ_VDD2_1V8AO (DDR) is already in VIN_SYS_5V0 "
        "(https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/SD/PlatformPowerAndPerformance/"
        "JetsonOrinNanoSeriesJetsonOrinNxSeriesAndJetsonAgxOrinSeries.html)",
    ),
    TotalRule(
        rails=("VDD_IN",),
        boards="Orin NX, Orin Nano; before them Xavier NX and TX2",
        scope="module",
        reason="VDD_IN is the monitor at the module's input, the other rails are branches of it (page as for AGX Orin)",
    ),
)


@dataclass(frozen=True, slots=True)
class TegraReading:
    """One line. rails_w: the readings now, in watts; a rail's reading may be slightly negative near zero (its offset).

    rule: how this board's total is made, None for rails we do not know. total_w: the total, None without a rule or
    where it is not above zero (the mean of Thor's VIN says that its first reading is 0). gpu_load_percent: None where
    the board does not print it. ram_used_mib, ram_total_mib: what tegrastats calls MB. temperatures_c: without sensors
    that are off.
    """

    rails_w: Mapping[str, float]
    rule: TotalRule | None
    total_w: float | None
    ram_used_mib: int | None
    ram_total_mib: int | None
    gpu_load_percent: int | None
    temperatures_c: Mapping[str, float]


def parse_line(line: str) -> TegraReading | None:
    """Read one line; None if it names no power rail (then it is not one of tegrastats, or power cannot be read)."""
    rails = {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line) if name != NOT_CONNECTED}
    if not rails:
        return None
    ram, load = _RAM.search(line), _GPU_LOAD.search(line)
    rule = total_rule(rails)
    total = sum(rails[name] for name in rule.rails) if rule else 0.0
    return TegraReading(
        rails_w=rails,
        rule=rule,
        total_w=total if total > 0 else None,
        ram_used_mib=int(ram[1]) if ram else None,
        ram_total_mib=int(ram[2]) if ram else None,
        gpu_load_percent=int(load[1]) if load else None,
        temperatures_c={n: float(c) for n, c in _TEMPERATURE.findall(line) if float(c) != _SENSOR_OFF_C},
    )


def total_rule(rails: Collection[str]) -> TotalRule | None:
    """The rule for a board with these rails; None if it is not one of ours."""
    return next((rule for rule in TOTALS if set(rule.rails) <= set(rails)), None)
