"""Where power is read: the program tegrastats on a Jetson, NVML elsewhere."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from edgesam_deploy.measure.nvml import Nvml, open_nvml
from edgesam_deploy.measure.tegrastats import TotalRule, parse_line

# How long a program that was told to end may take before it is made to.
STOP_S = 2.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a source gave at one time of ``time.monotonic``. total_w: None if this reading has no usable total.

    counter_mj: an energy counter read at the same time, where the source has one.
    """

    time_s: float
    rails_w: Mapping[str, float]
    total_w: float | None
    counter_mj: float | None = None


class Source(Protocol):
    """Read again and again in a thread; stopped and then closed from another one."""

    name: str
    # What the total covers.
    scope: str

    def read(self) -> Reading | None:
        """Wait for the next reading; None when there will be no more."""

    def stop(self) -> None:
        """Make ``read`` return None."""

    def close(self) -> None:
        """Let go of everything; nothing reads any more."""

    def notes(self) -> list[str]:
        """What somebody who uses the readings has to know."""


class Tegrastats:
    """tegrastats as a child with a process group of its own, read line by line."""

    name = "tegrastats"

    def __init__(self, program: str, interval_ms: int) -> None:
        self.scope = "unknown"
        self._rule: TotalRule | None = None
        self._rails: tuple[str, ...] = ()
        self._odd_lines = 0
        self._last_odd = ""
        self._stopping = False
        self._ended_itself = False
        self._process = subprocess.Popen(
            [program, "--interval", str(interval_ms)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def read(self) -> Reading | None:
        output = self._process.stdout
        # A line without its end was cut off when the program ended: its last number may be short of digits.
        while output is not None and (line := output.readline()).endswith("\n"):
            time_s = time.monotonic()
            parsed = parse_line(line)
            if parsed is None:
                self._odd_lines, self._last_odd = self._odd_lines + 1, line.strip()[:120]
                continue
            self._rails = tuple(parsed.rails_w)
            if self._rule is None and parsed.rule is not None:
                self._rule, self.scope = parsed.rule, parsed.rule.scope
            return Reading(time_s, parsed.rails_w, parsed.total_w if parsed.rule is self._rule else None)
        self._ended_itself = not self._stopping
        return None

    def stop(self) -> None:
        self._stopping = True
        if self._ended_itself:
            # Its output ends a moment before it does; a signal now would hide its exit status.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        # The whole group: tegrastats may be a script that starts the program.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(STOP_S)
        self._process.wait()

    def close(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()

    def notes(self) -> list[str]:
        notes = []
        if self._rule is not None:
            notes.append(f"total: {' + '.join(self._rule.rails)}; {self._rule.reason}")
        elif self._rails:
            notes.append(f"which rails of this board make up its total is not known: {', '.join(self._rails)}")
        if self._odd_lines:
            notes.append(f"{self._odd_lines} lines of tegrastats without power, the last: {self._last_odd!r}")
        if self._ended_itself:
            notes.append(f"tegrastats ended by itself with exit status {self._process.returncode}")
        return notes


class NvmlSource:
    """The power of one GPU from NVML, asked every ``interval_ms``; energy from its counter where it has one (Volta on).

    nvmlDeviceGetPowerUsage: milliwatts of the GPU and its memory, from Ampere on (but GA100) averaged over a second.
    nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver was loaded.
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
    """

    name = "nvml"
    scope = "GPU board"

    def __init__(self, nvml: Nvml, interval_ms: int) -> None:
        self._nvml = nvml
        self._interval_s = interval_ms / 1e3
        self._stop = threading.Event()
        self._wait_s = 0.0
        self._counter = nvml.ask("GetTotalEnergyConsumption") is not None

    def read(self) -> Reading | None:
        if self._stop.wait(self._wait_s):
            return None
        self._wait_s = self._interval_s
        milliwatts = self._nvml.ask("GetPowerUsage")
        counter = self._nvml.ask("GetTotalEnergyConsumption") if self._counter else None
        if milliwatts is None or (self._counter and counter is None):
            return None
        watts = milliwatts / 1e3
        return Reading(time.monotonic(), {"GPU": watts}, watts, None if counter is None else float(counter))

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._nvml.close()

    def notes(self) -> list[str]:
        how = "its energy counter" if self._counter else "its power, which many GPUs give as a mean over a second"
        return [f"total: {self._nvml.name} with its memory, without the computer around it; energy from {how}"]


def open_tegrastats(interval_ms: int) -> Source | str:
    """Start tegrastats, or say in one sentence why that is not possible."""
    program = shutil.which("tegrastats")
    if program is None:
        return "tegrastats: not on PATH"
    try:
        return Tegrastats(program, interval_ms)
    except OSError as error:
        return f"tegrastats: {error}"


def open_nvml_source(interval_ms: int, gpu: int | str) -> Source | str:
    """Open NVML for a GPU that tells its power, or say in one sentence why that is not possible."""
    nvml = open_nvml(gpu)
    if isinstance(nvml, str):
        return nvml
    if nvml.ask("GetPowerUsage") is None:
        nvml.close()
        return f"NVML: {nvml.name} does not tell its power"
    return NvmlSource(nvml, interval_ms)
