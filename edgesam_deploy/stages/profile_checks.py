"""The same pass counted by what others use: PyTorch's FlopCounterMode, its profiler, and calflops.

They agree with ours but for products that they cannot see, which differ from counter to counter; these are found from
how each product was called, so that what is left unexplained is told and not guessed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from edgesam_deploy.measure.profile import ENCODER, Check, Missed
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.stages.profile import build_network
from edgesam_deploy.stages.profile_count import Tally, Work, count

# What the profiler has a formula for, besides additions and multiplications of single elements.
_PROFILED = ("aten::conv2d", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
# Functions that calflops replaces by its own; their MACs it counts.
_PATCHED = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PATCHED_CALLS = ("torch.matmul", "torch.addmm", "torch.baddbmm")
_WHY_CALFLOPS = {
    "torch.functional.einsum": "it gives einsum FLOPs and no MACs",
    "torch.Tensor.matmul": "it does not see the operator @",
    "torch.Tensor.__matmul__": "it does not see the operator @",
    "torch.nn.functional.scaled_dot_product_attention": "it does not see fused attention",
}


def check(recipe: Recipe, batch: int) -> list[Check]:
    """Every counter on encoder and decoder; calflops, which is optional, if it is there.

    For a process of its own: calflops replaces functions of PyTorch while it counts, and the profiler talks to the
    terminal.
    """
    network = build_network(recipe, "meta")
    passes: dict[str, tuple[nn.Module, list[Tensor]]] = {
        ENCODER: (network.encoder, [network.image(batch)]),
        "decoder": (network.decoder, network.inputs("decoder", batch)),
    }
    found: list[Check] = []
    for part, (module, inputs) in passes.items():
        tally = count(module, inputs, {part: module})
        found.append(
            _compare(part, f"torch FlopCounterMode {_version()}", tally, _flop_counter(module, inputs), _atens)
        )
        found.append(_compare(part, f"torch.profiler {_version()}", tally, _profiler(module, inputs), _profiled))
        if has_calflops():
            name = f"calflops {importlib.metadata.version('calflops')}"
            found.append(_compare(part, name, tally, _calflops(module, inputs), _patched))
    return found


def has_calflops() -> bool:
    """With transformers, which calflops imports and does not ask for."""
    return all(importlib.util.find_spec(name) is not None for name in ("calflops", "transformers"))


def _compare(
    part: str, counter: str, tally: Tally, macs: int, why_missed: Callable[[Work], tuple[str, str] | None]
) -> Check:
    """why_missed: (what, why) for work that the counter leaves out, None for work that it counts."""
    missed: dict[tuple[str, str], int] = {}
    for work, amount in tally.macs.items():
        if (reason := why_missed(work)) is not None:
            missed[reason] = missed.get(reason, 0) + amount
    rows = tuple(Missed(what, amount, why) for (what, why), amount in missed.items())
    return Check(part, counter, macs, rows, sum(tally.macs.values()) - macs - sum(row.macs for row in rows))


def _flop_counter(module: nn.Module, inputs: list[Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def _atens(work: Work) -> tuple[str, str] | None:
    if work.operator in {str(known) for known in flop_registry}:
        return None
    return work.operator, "it has no formula for this operator"


def _profiler(module: nn.Module, inputs: list[Tensor]) -> int:
    """On the meta device addmm is made of mm, and both are counted: of nested events the outermost."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as trace:
        module(*inputs)
    return sum(int(event.flops) for event in trace.events() if event.name in _PROFILED and not _inside(event)) // 2


def _inside(event: Any) -> bool:
    around = event.cpu_parent
    while around is not None:
        if around.name in _PROFILED:
            return True
        around = around.cpu_parent
    return False


def _profiled(work: Work) -> tuple[str, str] | None:
    if work.kind == "convolution":
        return ("transposed convolution", "it has no formula for them") if work.transposed else None
    if f"aten::{work.operator.partition('.')[2]}" in _PROFILED:
        return None
    return work.operator, "it has no formula for this operator"


def _calflops(module: nn.Module, inputs: list[Tensor]) -> int:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from calflops import calculate_flops

        _, macs, _ = calculate_flops(module, args=list(inputs), print_results=False, output_as_string=False)
    return int(macs)


def _patched(work: Work) -> tuple[str, str] | None:
    if work.call.rpartition(".")[2] in _PATCHED or work.call in _PATCHED_CALLS:
        return None
    what = f"{work.kind} by {work.call}"
    return what, _WHY_CALFLOPS.get(work.call, "it does not see this call")


def _version() -> str:
    return torch.__version__.partition("+")[0]
