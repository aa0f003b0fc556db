"""What of a profile needs a process of its own: latency and memory, which others would blur, and other counters
(``stages.profile_checks``).

    python -m edgesam_deploy.stages.profile_worker < request > answer

The request is a pickle of our own making, the answer JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgesam_deploy.errors import EdgeSAMError
from edgesam_deploy.measure.latency import machine
from edgesam_deploy.measure.profile import ENCODER, Check, Latency, Missed, ModelProfile, Run
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.stages.profile import ProfileOptions

# Wall-clock and processor seconds, as time.perf_counter and time.process_time count them.
_Marks = dict[str, list[tuple[float, float]]]


def measured(counted: ModelProfile, recipe: Recipe, options: ProfileOptions) -> ModelProfile:
    """The profile with latencies and memory, from a fresh process."""
    answer = ask("time", (recipe, counted.batch, options))
    latency = {name: Latency(**values) for name, values in answer["latency"].items()}
    return replace(
        counted,
        parts=tuple(replace(part, latency=latency.get(part.name)) for part in counted.parts),
        stages=tuple(replace(stage, latency=latency.get(f"{ENCODER}.{stage.name}")) for stage in counted.stages),
        weights=str(options.checkpoint) if options.checkpoint is not None else "random",
        run=Run(machine=machine(), runs=options.runs, warmup=options.warmup, **answer["run"]),
    )


def checked(recipe: Recipe, batch: int, say: Callable[[str], None]) -> tuple[Check, ...]:
    """Other counters, from a fresh process. say: told if calflops is missing, which then does not count."""
    from edgesam_deploy.stages.profile_checks import has_calflops

    if not has_calflops():
        say("calflops is not installed and does not count: run  pip install calflops transformers")
    return tuple(
        Check(**{**found, "missed": tuple(Missed(**missed) for missed in found["missed"])})
        for found in ask("check", (recipe, batch))["checks"]
    )


def ask(task: str, request: Any) -> dict[str, Any]:
    """The answer of a fresh process. Raises EdgeSAMError with the reason if it gave none."""
    done = subprocess.run(
        [sys.executable, "-m", "edgesam_deploy.stages.profile_worker"],
        input=pickle.dumps((task, request)),
        capture_output=True,
        check=False,
        # Its profiler talks to the terminal otherwise.
        env={**os.environ, "KINETO_LOG_LEVEL": "5"},
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"it ended with exit code {done.returncode}"
        hint = "; -9 means that the system stopped it, most often for memory" if done.returncode == -9 else ""
        raise EdgeSAMError(f"the process that measures failed: {reason}{hint}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise EdgeSAMError(answer["error"])
    return answer


def main() -> None:
    task, request = pickle.load(sys.stdin.buffer)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = TASKS[task](*request)
        except EdgeSAMError as error:
            answer = {"error": str(error)}
    print(json.dumps(answer))  # noqa: T201 - the answer


def time_network(recipe: Recipe, batch: int, options: ProfileOptions) -> dict[str, Any]:
    """Latency by part, stages as ``image_encoder.<stage>``; memory before and after the first pass."""
    import torch

    from edgesam_deploy.stages.profile import build_network
    from edgesam_deploy.stages.profile_parts import halves, stages

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    network = build_network(recipe, "cpu", options.checkpoint)
    divided = {f"{ENCODER}.{name}": module for name, module in stages(network.encoder).items()}
    jobs = (
        (network.encoder, [network.image(batch)], divided or {ENCODER: network.encoder}),
        (network.decoder, network.inputs("decoder", batch), halves(network.decoder)),
    )
    before = resident_mb()
    marks: _Marks = {}
    with torch.inference_mode():
        _pass(jobs, {})
        peak = resident_mb("VmHWM")
        for run in range(options.warmup + options.runs):
            _pass(jobs, marks if run >= options.warmup else {})
    latency = {name: _median(samples) for name, samples in marks.items()}
    return {
        "latency": latency,
        "run": {
            "threads": torch.get_num_threads(),
            "rss_mb": before,
            "peak_rss_mb": peak,
            "load": os.getloadavg()[0],
        },
    }


def _pass(jobs: Sequence[tuple[nn.Module, list[Tensor], Mapping[str, nn.Module]]], marks: _Marks) -> None:
    """Run encoder and decoder once; add the time of every part, and of the encoder, to ``marks``."""
    for module, inputs, parts in jobs:
        spent = _spent(module, inputs, parts)
        for name, seconds in spent.items():
            marks.setdefault(name, []).append(seconds)
        if any(name.startswith(f"{ENCODER}.") for name in parts):
            whole = (sum(wall for wall, _ in spent.values()), sum(cpu for _, cpu in spent.values()))
            marks.setdefault(ENCODER, []).append(whole)


def _spent(module: nn.Module, inputs: list[Tensor], parts: Mapping[str, nn.Module]) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of each part; what runs between two belongs to the one that ran last."""
    from edgesam_deploy.stages.profile_count import entering

    current = next(iter(parts))
    spent: dict[str, tuple[float, float]] = {}
    last = (0.0, 0.0)

    def enter(name: str) -> None:
        nonlocal current, last
        now = (time.perf_counter(), time.process_time())
        wall, cpu = spent.get(current, (0.0, 0.0))
        spent[current] = (wall + now[0] - last[0], cpu + now[1] - last[1])
        current, last = name, now

    with entering(parts, enter):
        last = (time.perf_counter(), time.process_time())
        module(*inputs)
        enter(current)
    return spent


def _median(samples: list[tuple[float, float]]) -> dict[str, float]:
    walls, cpus = ([1e3 * value for value in column] for column in zip(*samples, strict=True))
    return {"median_ms": statistics.median(walls), "min_ms": min(walls), "cpu_ms": statistics.median(cpus)}


def resident_mb(entry: str = "VmRSS") -> float:
    """Resident memory of this process, 10^6 bytes; "VmHWM": the most so far.

    Not by getrusage, whose maximum a child inherits from the process that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise EdgeSAMError(f"/proc/self/status has no {entry}")


def count_again(recipe: Recipe, batch: int) -> dict[str, Any]:
    from edgesam_deploy.stages.profile_checks import check

    return {"checks": [asdict(found) for found in check(recipe, batch)]}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"time": time_network, "check": count_again}

if __name__ == "__main__":
    main()
