"""Stand-ins for what only some machines have: NVML's Python module and the programs of a Jetson."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class FakeNvml(ModuleType):
    """The part of ``pynvml`` that is used, for one GPU of 50 W. ``missing``: queries this GPU does not support.

    Names, arguments and units as in nvidia-ml-py 13.615; test_the_names_are_those_of_nvidia_ml_py holds them to it.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_FEATURE_ENABLED = 1, 2, 1

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.missing: set[str] = set()
        self.opened = 0
        self.asked: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802
        self._check("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self._check("nvmlDeviceGetHandleByIndex")
        return {0: "the GPU"}[index]

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:  # noqa: N802
        return {"0000:01:00.0": "the GPU"}[bus_id]

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return {"the GPU": "NVIDIA Test 50"}[handle]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetPowerUsage", handle, 50_000))  # milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetTotalEnergyConsumption", handle, 7_000_000))  # millijoules

    def nvmlDeviceGetClockInfo(self, handle: str, type: int) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetClockInfo", handle, {1: 1410, 2: 5001}[type]))

    def nvmlDeviceGetMaxClockInfo(self, handle: str, type: int) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetMaxClockInfo", handle, {1: 2100, 2: 7001}[type]))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetEnforcedPowerLimit", handle, 70_000))  # milliwatts

    def nvmlDeviceGetPersistenceMode(self, handle: str) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetPersistenceMode", handle, self.NVML_FEATURE_ENABLED))

    def _answer(self, name: str, handle: str, value: Any) -> Any:
        assert handle == "the GPU"
        self._check(name)
        return value

    def _check(self, name: str) -> None:
        self.asked.append(name)
        if name in self.missing:
            raise self.NVMLError("Not Supported")


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """``import pynvml`` gives this."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """``import pynvml`` fails."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """PATH holds only what is written here: ``programs(name, python_source)`` adds a program. Gives its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, source: str) -> Path:
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
        path.chmod(0o755)
        return folder

    return add
