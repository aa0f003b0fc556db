"""What a model would take on a device that is not here: latency, memory and energy from its typed graphs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgesam_deploy.errors import TargetError
from edgesam_deploy.measure.efficiency import Fit
from edgesam_deploy.measure.roofline import NodeCost, price
from edgesam_deploy.stages import graph as graphs
from edgesam_deploy.stages.node_work import kernels
from edgesam_deploy.stages.profile_graph import profile_graph
from edgesam_deploy.target import Device, Target

BOUNDS = ("compute", "memory", "launch")


@dataclass(frozen=True, slots=True)
class GraphEstimate:
    """One graph at batch 1, its decoder with one click.

    ms: by the fitted model. bound_ms: that, by what its kernels wait for ("compute", "memory", "launch"). weights_mb:
    of the typed graph's file, activations_mb: the most alive at a time; both 10⁶ bytes. top: its longest kernels.
    """

    graph: str
    ms: float
    bound_ms: Mapping[str, float]
    kernels: int
    macs_g: float
    weights_mb: float
    activations_mb: float
    top: tuple[NodeCost, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A model in a precision on one device. low_ms, high_ms: ms divided and multiplied by the model's error factor.

    ms: encoder and one call of the decoder, without resizing the image and drawing the mask on the CPU. memory_mb:
    weights and activations; the CUDA context and TensorRT itself come on top. energy_mj: at most, if the device drew
    the whole of ``power_mode``'s budget all the time; None where no mode states one. seen: whether the factors were
    fitted to or tried on this very device in this precision.
    """

    name: str
    target: str
    device: str
    precision: str
    ms: float
    low_ms: float
    high_ms: float
    memory_mb: float
    fits: bool
    power_mode: str | None
    energy_mj: float | None
    seen: bool
    graphs: tuple[GraphEstimate, ...]


def estimate(name: str, typed: Mapping[str, Path], precision: str, target: Target, fit: Fit) -> tuple[Estimate, ...]:
    """For every device of a target, from graphs typed for it.

    Raises TargetError for a target without figures (a CPU is measured, not estimated), GraphError where a shape cannot
    be told.
    """
    if not target.devices:
        raise TargetError(
            f"target {target.name} states no peaks to estimate from: measure there with  sam-export bench"
        )
    return tuple(_on(name, typed, precision, target, device, fit) for device in target.devices)


def _on(name: str, typed: Mapping[str, Path], precision: str, target: Target, device: Device, fit: Fit) -> Estimate:
    parts = tuple(_graph(graph, path, device, fit) for graph, path in typed.items())
    ms = sum(part.ms for part in parts)
    # Both engines are in memory, one of them at work.
    memory = sum(part.weights_mb for part in parts) + max(part.activations_mb for part in parts)
    # Peaks are those of the highest clock, so the budget is that of the highest mode that has one.
    mode = max((m for m in device.power_modes if m.watts), key=lambda m: m.watts or 0.0, default=None)
    seen = {(row.device, row.precision) for row in (*fit.fitted, *fit.tried)}
    return Estimate(
        name=name,
        target=target.name,
        device=device.name,
        precision=precision,
        ms=ms,
        low_ms=ms / fit.factor,
        high_ms=ms * fit.factor,
        memory_mb=memory,
        fits=memory < device.memory_gb * 1e3,
        power_mode=mode.name if mode is not None else None,
        energy_mj=ms * mode.watts if mode is not None and mode.watts is not None else None,
        seen=(device.name, precision) in seen,
        graphs=parts,
    )


def _graph(graph: str, path: Path, device: Device, fit: Fit, top: int = 10) -> GraphEstimate:
    cost = price(kernels(graphs.load(path)), device, fit.efficiency)
    profile = profile_graph(path)
    return GraphEstimate(
        graph=graph,
        ms=cost.ms,
        bound_ms={bound: sum(n.ms for n in cost.nodes if n.bound == bound) for bound in BOUNDS},
        kernels=len(cost.nodes),
        macs_g=profile.total_macs / 1e9,
        weights_mb=path.stat().st_size / 1e6,
        activations_mb=profile.peak_bytes / 1e6,
        top=tuple(sorted(cost.nodes, key=lambda node: -node.ms)[:top]),
    )
