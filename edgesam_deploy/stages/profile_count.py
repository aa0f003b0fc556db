"""Multiply-adds and activation memory of a PyTorch module, from one pass under a dispatch mode.

Every operator that reaches ATen is seen, whatever Python code it came from; nothing is computed on the meta device, so
counting takes a second and no memory for weights. The formulas are written out here: ``torch.utils.flop_counter``
stays an independent check (``stages.profile_checks``).
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators of products: where their left factor stands. Of each output element, its last axis long.
_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.dot: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}
_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
)


@dataclass(frozen=True, slots=True)
class Work:
    """Where multiply-adds were done. part: of the network. module: the innermost that ran. kind: ``profile.KINDS``.

    operator: of ATen. transposed: of a convolution. call: the function of PyTorch's Python API that led to it.
    """

    part: str
    module: str
    kind: str
    operator: str
    transposed: bool
    call: str


@dataclass(slots=True)
class Tally:
    """What one pass did. activation_bytes, peak_bytes: by part. read: ids of the weights that an operator read."""

    macs: Counter[Work] = field(default_factory=Counter)
    activation_bytes: Counter[str] = field(default_factory=Counter)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)


def count(module: nn.Module, inputs: Sequence[Tensor], parts: Mapping[str, nn.Module]) -> Tally:
    """One pass of ``module`` on ``inputs``. parts: modules of it by name, the first being where it begins.

    What runs between two parts belongs to the one that ran last. With calls being watched, PyTorch does not take its
    fast path through nn.MultiheadAttention, an operator in which products could not be seen.
    """
    tally = Tally()
    where = _Where(next(iter(parts), ""))
    meter = _Meter(tally, where, [*module.parameters(), *module.buffers()], inputs)
    # Without autograd, but not in inference mode: there composite operators would reach the meter undecomposed.
    with torch.no_grad(), entering(parts, where.enter_part), _modules(module, where), _Calls(where), meter:
        module(*inputs)
    return tally


@contextmanager
def entering(parts: Mapping[str, nn.Module], enter: Callable[[str], None]) -> Iterator[None]:
    """Call ``enter`` with a part's name whenever one of its modules starts to run."""
    with ExitStack() as hooks:
        for name, part in parts.items():
            for inner in part.modules():
                hook = inner.register_forward_pre_hook(lambda _, __, name=name: enter(name))
                hooks.callback(hook.remove)
        yield


@contextmanager
def _modules(module: nn.Module, where: _Where) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, inner in module.named_modules():
            before = inner.register_forward_pre_hook(lambda _, __, name=name: where.stack.append(name))
            after = inner.register_forward_hook(lambda *_: where.leave())
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


class _Where:
    """What is running: the part, the modules around it and the Python call."""

    def __init__(self, part: str) -> None:
        self.part, self.stack, self.call = part, [""], ""

    def enter_part(self, name: str) -> None:
        self.part = name

    def leave(self) -> None:
        self.stack.pop()


class _Calls(TorchFunctionMode):
    """Notes which function of PyTorch's API is at work; other counters patch these."""

    def __init__(self, where: _Where) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.where.call = self.where.call, resolve_name(func) or getattr(func, "__name__", "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.where.call = before


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tally: Tally, where: _Where, weights: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally, self.where = tally, where
        self.weights = {id(weight) for weight in weights}
        # Kept, so that no other storage can get their ids meanwhile.
        self.constant = {id(s): s for s in (weight.untyped_storage() for weight in weights)}
        self.alive: dict[int, int] = {}
        self.live_bytes = 0
        for tensor in inputs:
            self._keep(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        self.tally.read.update(id(tensor) for tensor in _tensors(args) if id(tensor) in self.weights)
        if macs := _macs(operator, args, output):
            self.tally.macs[self._work(operator, args)] += macs
        for tensor in _tensors(output):
            self.tally.activation_bytes[self.where.part] += self._keep(tensor)
        peak = self.tally.peak_bytes
        peak[self.where.part] = max(peak.get(self.where.part, 0), self.live_bytes)
        return output

    def _work(self, operator: Any, args: Any) -> Work:
        weighted = any(id(tensor.untyped_storage()) in self.constant for tensor in _tensors(args))
        convolution = operator is aten.convolution
        kind = "convolution" if convolution else "linear" if weighted else "product"
        transposed = convolution and bool(args[6])
        where = self.where
        return Work(where.part, where.stack[-1], kind, str(operator), transposed, where.call)

    def _keep(self, tensor: Tensor) -> int:
        """Bytes that are new with ``tensor``: 0 for a view, or a weight."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.alive or key in self.constant:
            return 0
        size = storage.nbytes()
        self.alive[key] = size
        self.live_bytes += size
        weakref.finalize(storage, self._drop, key)
        return size

    def _drop(self, key: int) -> None:
        self.live_bytes -= self.alive.pop(key, 0)


def _macs(operator: Any, args: Any, output: Any) -> int:
    """Multiply-adds of one operator, 0 if it is no product; a bias is not counted."""
    if operator in _PRODUCTS:
        return int(output.numel() * args[_PRODUCTS[operator]].shape[-1])
    if operator is aten.convolution:  # weight (M, C/groups, k…), or (C, M/groups, k…) where it is transposed
        image, weight, transposed = args[0], args[1], args[6]
        return int((image if transposed else output).numel() * math.prod(weight.shape[1:]))
    if operator in _ATTENTION:  # query (…, L, D), key (…, S, D), value (…, S, V)
        query, key, value = args[:3]
        return int(query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    return 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
