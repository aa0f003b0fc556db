"""The power mode and the clocks of this machine: without them a time or a power says little.

On a Jetson from ``nvpmodel -q`` and ``jetson_clocks --show`` (which needs root; without it the clocks of CPU and GPU
are read from sysfs), elsewhere from NVML.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgesam_deploy.measure.nvml import open_nvml

TIMEOUT_S = 20.0

# "NV Power Mode: 15W", its number alone on the next line. With --verbose other words come before it.
_MODE = re.compile(r"NV Power Mode: *(\S+)[ \t]*(?:\n(\d+)[ \t]*(?:\n|$))?")
_FREQUENCIES = re.compile(r"MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)")
_CPU = re.compile(r"cpu\d+")
# "GPU" up to JetPack 6; on Thor one name per clock, of which gpc is the one that computes.
_GPU_NAMES = ("GPU", "gpu-gpc-0")
# jetson_clocks and cpufreq give kHz for a CPU; jetson_clocks and devfreq give Hz for everything else.
_PER_MHZ_CPU, _PER_MHZ = 1e3, 1e6
# Where the GPU is found in sysfs: Thor, and Orin on L4T 36 and 35.
_GPU_DEVICES = ("gpu-gpc-0", "17000000.gpu", "17000000.ga10b")


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock and the limits set for it, in MHz; None where not known."""

    min_mhz: float | None
    max_mhz: float | None
    current_mhz: float | None


@dataclass(frozen=True, slots=True)
class Clocks:
    """What is known of power mode and clocks; None otherwise, and ``notes`` says why.

    power_mode, power_mode_id: nvpmodel's, such as "MAXN_SUPER" and 2. locked: whether the GPU and the memory are held
    at one clock, as after ``jetson_clocks``. memory: EMC on a Jetson. cpus: those online, by name. persistence,
    power_limit_w: NVML's.
    """

    source: str
    power_mode: str | None = None
    power_mode_id: int | None = None
    locked: bool | None = None
    gpu_name: str | None = None
    gpu: Clock | None = None
    memory: Clock | None = None
    cpus: Mapping[str, Clock] = field(default_factory=dict)
    persistence: bool | None = None
    power_limit_w: float | None = None
    notes: tuple[str, ...] = ()


def read_clocks(gpu: int | str = 0, root: Path = Path("/")) -> Clocks:
    """Power mode and clocks now. gpu: as ``nvml.Nvml`` takes it. root: where sys/ lies. Never fails: see ``notes``."""
    if shutil.which("nvpmodel") or shutil.which("jetson_clocks"):
        return _read_jetson(root)
    return _read_nvml(gpu)


def parse_nvpmodel(text: str) -> tuple[str, int | None] | None:
    """Name and number of the power mode in the output of ``nvpmodel -q``, None if it names none."""
    found = _MODE.search(text)
    return (found[1], int(found[2]) if found[2] else None) if found else None


def parse_jetson_clocks(text: str) -> Clocks:
    """The output of ``jetson_clocks --show``."""
    cpus: dict[str, Clock] = {}
    gpu = memory = None
    override = False
    for line in text.splitlines():
        found = _FREQUENCIES.search(line)
        if found is None:
            continue
        name = line.split(maxsplit=1)[0].rstrip(":")
        if _CPU.fullmatch(name) and "Online=0" not in line:
            cpus[name] = _clock(found.groups(), _PER_MHZ_CPU)
        elif name in _GPU_NAMES:
            gpu = _clock(found.groups(), _PER_MHZ)
        elif name == "EMC":
            memory = _clock(found.groups(), _PER_MHZ)
            override = "FreqOverride=1" in line
    mode = parse_nvpmodel(text)
    return Clocks(
        source="jetson_clocks",
        power_mode=mode[0] if mode else None,
        locked=None if gpu is None or memory is None else gpu.min_mhz == gpu.max_mhz and override,
        gpu=gpu,
        memory=memory,
        cpus=cpus,
    )


def _clock(numbers: tuple[str, ...], per_mhz: float) -> Clock:
    low, high, now = (int(n) / per_mhz for n in numbers)
    return Clock(low, high, now)


def _read_jetson(root: Path) -> Clocks:
    notes = []
    shown, problem = _output("jetson_clocks", "--show")
    clocks = parse_jetson_clocks(shown)
    if clocks.gpu is None:
        notes.append(
            f"jetson_clocks --show gave no clocks ({problem or 'not understood'}): clocks from sysfs, not EMC's"
        )
        clocks = _read_sysfs(root)
    answer, problem = _output("nvpmodel", "-q")
    mode = parse_nvpmodel(answer)
    if mode is not None:
        clocks = replace(clocks, power_mode=mode[0], power_mode_id=mode[1])
    else:
        notes.append(f"nvpmodel -q gave no power mode ({problem or 'not understood'})")
    return replace(clocks, source=f"nvpmodel, {clocks.source}", notes=tuple(notes))


def _output(program: str, *words: str) -> tuple[str, str | None]:
    """What a command printed, also if it failed, and what was wrong with it, None for nothing."""
    if shutil.which(program) is None:
        return "", "not on PATH"
    try:
        done = subprocess.run(
            [program, *words], capture_output=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    text = done.stdout.decode("utf-8", "replace")
    said = (done.stderr.decode("utf-8", "replace").strip() or text.strip()).splitlines()
    return (
        text,
        f"exit status {done.returncode}: {said[0][:120] if said else 'no message'}" if done.returncode else None,
    )


def _read_sysfs(root: Path) -> Clocks:
    """Clocks of CPU and GPU, which need no root; EMC's do."""
    cpufreq = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    cpus = {p.parent.name: _sysfs_clock(p, "scaling_{}_freq", _PER_MHZ_CPU) for p in cpufreq}
    devices = [root / "sys/class/devfreq" / name for name in _GPU_DEVICES]
    gpu = next((_sysfs_clock(d, "{}_freq", _PER_MHZ) for d in devices if d.is_dir()), None)
    return Clocks(source="sysfs", gpu=gpu, cpus=cpus)


def _sysfs_clock(folder: Path, pattern: str, per_mhz: float) -> Clock:
    numbers: list[float | None] = []
    for which in ("min", "max", "cur"):
        try:
            numbers.append(int((folder / pattern.format(which)).read_text(encoding="ascii")) / per_mhz)
        except (OSError, ValueError):
            numbers.append(None)
    return Clock(*numbers)


def _read_nvml(gpu: int | str) -> Clocks:
    nvml = open_nvml(gpu)
    if isinstance(nvml, str):
        return Clocks(source="none", notes=("nvpmodel and jetson_clocks: not on PATH", nvml))
    library = nvml.library

    def clock(kind: int) -> Clock:
        return Clock(None, nvml.ask("GetMaxClockInfo", kind), nvml.ask("GetClockInfo", kind))

    milliwatts = nvml.ask("GetEnforcedPowerLimit")
    persistence = nvml.ask("GetPersistenceMode")
    clocks = Clocks(
        source="nvml",
        gpu_name=nvml.name,
        gpu=clock(library.NVML_CLOCK_SM),
        memory=clock(library.NVML_CLOCK_MEM),
        persistence=None if persistence is None else bool(persistence == library.NVML_FEATURE_ENABLED),
        power_limit_w=None if milliwatts is None else milliwatts / 1e3,
        notes=("NVML does not tell whether clocks are locked",),
    )
    nvml.close()
    return clocks
