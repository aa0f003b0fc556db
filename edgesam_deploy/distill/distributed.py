"""PyTorch's own launcher, seen from inside: ``torchrun --nproc-per-node 8 -m edgesam_deploy distill ...``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from edgesam_deploy.errors import InputError

# The first process may spend hours on its share of a teacher's embeddings while others wait.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class World:
    """rank: which of ``size`` processes this is; the first, 0, writes files and speaks."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, values: list[float]) -> list[float]:
        """The same numbers averaged over all processes."""
        if self.size == 1:
            return values
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return [float(v) / self.size for v in together.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it is so for any process: all stop together, or none does."""
        return self.mean([float(flag)])[0] > 0


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """This process's place among those that torchrun started, or a world of its own.

    device: "cpu" or "cuda", None for a GPU where there is one. Raises InputError for a GPU that is not there.
    """
    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("no GPU that PyTorch can use was found: run with --device cpu")
    local, rank, size = (int(os.environ.get(name, fallback)) for name, fallback in
                         (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")))  # fmt: skip
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()
