"""What machine is this, and which target fits it: from the files of Jetson Linux and the NVIDIA driver's own library.

TensorRT is never imported, no process is started, and whatever is missing is None: asking is safe everywhere.
"""

from __future__ import annotations

import ctypes
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesam_deploy.errors import BackendError, TargetError
from edgesam_deploy.target import load_target, version_key

# Jetson Linux release -> JetPack. Sources: the pull requests OE4T/meta-tegra 2224 and 2339 (39.x), rbonghi/jetson_stats
# 792 (38.4) and 803 (36.5), anduril/jetpack-nixos 541 (36.5.2); developer.nvidia.com/embedded/jetpack-archive; and
# jetson_containers/l4t_version.py of dusty-nv/jetson-containers (the rest). A longer number wins over a shorter one.
JETPACKS = {
    "39.2.1": "7.2.1",
    "39.2": "7.2",
    "38.4": "7.1",
    "38.2": "7.0",
    "36.5.2": "6.2.3",
    "36.5": "6.2.2",
    "36.4.7": "6.2.1",
    "36.4.4": "6.2.1",
    "36.4.3": "6.2",
    "36.4": "6.1",
    "36.3": "6.0",
    "36.2": "6.0",
    "36.0": "6.0",
    "35.6": "5.1",
    "35.5": "5.1",
    "35.4": "5.1",
    "35.3": "5.1",
    "35.2": "5.1",
    "35.1": "5.0",
    "34": "5.0",
    "32": "4",
}
# TensorRT 10.3, the first one here that can be told to be strongly typed, came with JetPack 6.1.
OLDEST_L4T = (36, 4)
TENSORRT_OF_OLD_JETPACKS = {"6.0": "8.6", "5.1": "8.5", "5.0": "8.4"}
# Module (board and its variant) -> target, and what to say where that is only the nearest one. Source of the numbers:
# Jetson Linux Developer Guide, Quick Start, "Determine whether the developer kit is in Force Recovery Mode".
MODULES = {
    "p3767-0000": ("orin-nx-16gb", ""),
    "p3767-0001": ("orin-nano-8gb", "the nearest to an Orin NX 8GB"),
    "p3767-0003": ("orin-nano-8gb", ""),
    "p3767-0004": ("orin-nano-8gb", "the nearest to an Orin Nano 4GB, whose memory may not be enough"),
    "p3767-0005": ("orin-nano-8gb", ""),
    "p3701-0000": ("agx-orin-64gb", "the nearest to an AGX Orin of 32 GB"),
    "p3701-0004": ("agx-orin-64gb", "the nearest to an AGX Orin of 32 GB"),
    "p3701-0005": ("agx-orin-64gb", ""),
    "p3701-0008": ("agx-orin-64gb", ""),
    "p3834-0008": ("thor", ""),
}
# What decides how fast a CPU runs INT8 and bfloat16, as /proc/cpuinfo calls it; on x86 and on Arm.
# Any of them multiplies uint8 x int8 into 32 bits.
EXACT_INT8 = frozenset(("avx_vnni", "avx512_vnni", "amx_int8"))
CPU_FEATURES = ("avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")
# cuda.h: CUdevice_attribute.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of a machine; None where it is not.

    model: of the device tree, which names the carrier board rather than the module. module: a Jetson's, as
    ``p3767-0005``. compute_capability: of the first GPU. driver: the newest CUDA version the driver serves, as
    ``13.0``. memory_gb: RAM, 10⁹ bytes; on a Jetson the GPU's too. os: system and architecture, as ``Linux x86_64``.
    gpu_problem: why a driver that is there offers no GPU.
    """

    jetpack: str | None = None
    l4t: str | None = None
    model: str | None = None
    module: str | None = None
    compute_capability: str | None = None
    driver: str | None = None
    gpu_names: tuple[str, ...] = ()
    memory_gb: float | None = None
    os: str | None = None
    gpu_problem: str | None = None

    @property
    def is_jetson(self) -> bool:
        return self.l4t is not None or self.module is not None or "Jetson" in (self.model or "")


# Orin; Thor as CUDA 12 and CUDA 13 count it.
JETSON_GPUS = ("8.7", "10.1", "11.0")


def examine_machine(root: Path = Path("/"), library: str = "libcuda.so.1") -> Machine:
    """Look at the machine below ``root`` and at the driver's ``library``. Never raises for what is missing."""
    l4t = parse_l4t(_read(root / "etc/nv_tegra_release"))
    gpus: dict[str, Any] = {}
    try:
        gpus = _query_driver(ctypes.CDLL(library))
    except OSError:
        pass  # no driver
    except AttributeError as error:
        gpus = {"gpu_problem": f"{library} is no CUDA driver: {error}"}
    return Machine(
        jetpack=find_jetpack(l4t) if l4t else None,
        l4t=l4t,
        model=_read(root / "proc/device-tree/model").strip("\0\n ") or None,
        module=_find_module(root),
        memory_gb=_memory_gb(_read(root / "proc/meminfo")),
        os=f"{platform.system()} {platform.machine()}",
        **gpus,
    )


def cpu_features(root: Path = Path("/")) -> tuple[str, ...] | None:
    """Those of CPU_FEATURES that this CPU has; None where the system does not tell."""
    lines = _read(root / "proc/cpuinfo").splitlines()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return tuple(name for name in CPU_FEATURES if name in flags) if flags else None


def int8_saturates() -> bool:
    """Whether this CPU's sums of uint8 x int8 can saturate: an x86 without VNNI and AMX adds pairs in 16 bits."""
    features = cpu_features()
    return platform.machine() == "x86_64" and features is not None and not EXACT_INT8 & set(features)


def parse_l4t(release: str) -> str | None:
    """``# R36 (release), REVISION: 4.3, GCID: ...`` -> ``36.4.3``; None for another text."""
    match = re.search(r"^#\s*R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", release, re.MULTILINE)
    return f"{match[1]}.{match[2]}" if match else None


def find_jetpack(l4t: str) -> str | None:
    """The JetPack that a Jetson Linux release belongs to, None for one that is not in the table."""
    parts = l4t.split(".")
    candidates = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((JETPACKS[known] for known in candidates if known in JETPACKS), None)


def choose_target(machine: Machine) -> tuple[str, str]:
    """(target name, the reason in one sentence). Raises TargetError for a JetPack that is too old and says why."""
    # A container hides the device tree: on Arm these compute capabilities are a Jetson's.
    if machine.is_jetson or ((machine.os or "").endswith("aarch64") and machine.compute_capability in JETSON_GPUS):
        _refuse_old_jetpack(machine)
        return _choose_jetson(machine)
    if machine.compute_capability is None:
        return "cpu", f"{machine.gpu_problem or 'there is no NVIDIA driver on this machine'}."
    if not (machine.os or "").endswith(("x86_64", "AMD64", "amd64")):
        return "cpu", f"no target is for a GPU in a machine of this kind ({machine.os})."
    return _choose_card(machine)


def _refuse_old_jetpack(machine: Machine) -> None:
    if machine.l4t is None or version_key(machine.l4t)[:2] >= OLDEST_L4T:
        return
    jetpack = f"JetPack {machine.jetpack}" if machine.jetpack else "this JetPack"
    tensorrt = TENSORRT_OF_OLD_JETPACKS.get(machine.jetpack or "", "8.2 or older")
    raise TargetError(
        f"{jetpack} (Jetson Linux {machine.l4t}) is not supported: its TensorRT, {tensorrt}, is weakly typed and may "
        "run layers in FP16 that the graph keeps in FP32; upgrade to JetPack 6.2 or newer (Orin and Thor have it, "
        "older boards do not)"
    )


def _choose_jetson(machine: Machine) -> tuple[str, str]:
    software = f"JetPack {machine.jetpack or 'unknown'}, Jetson Linux {machine.l4t or 'unknown'}"
    if machine.module in MODULES:
        name, nearest = MODULES[machine.module]
        return name, f"this is module {machine.module} with {software}{': ' if nearest else ''}{nearest}."
    model = f"{machine.model or 'a Jetson'} with {software}"
    # CUDA 12 called Thor 10.1.
    if machine.compute_capability in ("11.0", "10.1") or "Thor" in (machine.model or ""):
        return "thor", f"this is {model}."
    if machine.compute_capability == "8.7" or "Orin" in (machine.model or ""):
        if machine.memory_gb is None:
            return "orin-nano-8gb", f"this is {model}, and its memory is unknown: the smallest Orin is the safe choice."
        name = "orin-nano-8gb" if machine.memory_gb < 10 else "orin-nx-16gb"
        name = "agx-orin-64gb" if machine.memory_gb > 20 else name
        return (
            name,
            f"this is {model}, of unknown module, and {machine.memory_gb:.0f} GB of memory fit that target best.",
        )
    return "cpu", f"this is {model}, and no target is for its GPU."


def _choose_card(machine: Machine) -> tuple[str, str]:
    capability = machine.compute_capability
    card = machine.gpu_names[0] if machine.gpu_names else "a GPU"
    known = [name for name in ("x86-gpu", "rtx") if capability in load_target(name).compute_capabilities]
    if not known:
        return "cpu", f"this is {card}, and no target is for its compute capability, {capability}."
    # L4 and GeForce RTX 4090 share a compute capability; TensorRT for RTX is made for the second kind only.
    is_rtx = re.search(r"\b(GeForce|RTX|Quadro|TITAN)\b", card) is not None
    name = "rtx" if "rtx" in known and (is_rtx or "x86-gpu" not in known) else known[0]
    return name, f"this is {card} of compute capability {capability}."


def _find_module(root: Path) -> str | None:
    """A Jetson's module. The flashed board specification is right where a carrier's device tree names another one."""
    if match := re.search(r"^TNSPEC\s+(\d{4})-\w*-(\d{4})-", _read(root / "etc/nv_boot_control.conf"), re.MULTILINE):
        return f"p{match[1]}-{match[2]}"
    names = _read(root / "proc/device-tree/compatible").replace("\0", " ")
    match = re.search(r"\bp(?:3767|3701|3834)-\d{4}\b", names)
    return match[0] if match else None


def _memory_gb(meminfo: str) -> float | None:
    match = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 / 1e9 if match else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _query_driver(library: Any) -> dict[str, Any]:
    """Fields of Machine from libcuda; AttributeError where it lacks a function."""
    found: dict[str, Any] = {}
    version, count = ctypes.c_int(), ctypes.c_int()
    try:
        # The version needs no working GPU, all else does.
        _check("cuDriverGetVersion", library.cuDriverGetVersion(ctypes.byref(version)))
        found["driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
        _check("cuInit", library.cuInit(0))
        _check("cuDeviceGetCount", library.cuDeviceGetCount(ctypes.byref(count)))
        devices = [_query_device(library, index) for index in range(count.value)]
    except BackendError as error:
        return {**found, "gpu_problem": str(error)}
    if not devices:
        return {**found, "gpu_problem": "the NVIDIA driver sees no GPU"}
    return {**found, "gpu_names": tuple(name for name, _ in devices), "compute_capability": devices[0][1]}


def _query_device(library: Any, index: int) -> tuple[str, str]:
    """(name, compute capability) of a GPU."""
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    _check("cuDeviceGet", library.cuDeviceGet(ctypes.byref(device), index))
    _check("cuDeviceGetName", library.cuDeviceGetName(name, len(name), device))
    for part, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
        _check("cuDeviceGetAttribute", library.cuDeviceGetAttribute(ctypes.byref(part), attribute, device))
    return name.value.decode(errors="replace"), f"{major.value}.{minor.value}"


def _check(name: str, code: int) -> None:
    if code:
        raise BackendError(f"the NVIDIA driver answers {name} with code {code}")
