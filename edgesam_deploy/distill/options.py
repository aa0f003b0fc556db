"""What a distillation run is asked to do. Two runs with the same options, images and teacher give the same weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from edgesam_deploy.errors import InputError

LOSSES = ("huber", "l1", "mse", "cosine")
OPTIMIZERS = ("adamw", "sgd")
AMP = ("off", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """epochs: passes over the images. batch: images per process and micro-step; accumulate: micro-steps per update, so
    that one update sees batch x accumulate x processes images. lr: peak learning rate; warmup: updates it takes to
    reach it; final: its share at the end of the half cosine. loss: of student against teacher embeddings. ema: weight
    of the past in the running average of weights, which is what is validated and written. amp: autocast type.
    colours: share of images whose colours are changed for the student alone. views: share of images shown as a random
    crop or mirrored, to both; needs a teacher beside, on the fly. freeze_norm: batch statistics stay as they are.
    held: images kept out for validation.

    rounds: of prompts, 0 to learn embeddings alone (``prompt_loop``); prompts: per image; embedding_weight: of the
    embedding loss beside that of masks; decoder_learns: the mask decoder too, not the encoder alone.
    """

    epochs: float = 10.0
    batch: int = 8
    accumulate: int = 1
    lr: float = 3e-4
    warmup: int = 100
    final: float = 0.01
    weight_decay: float = 0.02
    optimizer: str = "adamw"
    loss: str = "huber"
    ema: float = 0.999
    clip: float = 1.0
    amp: str = "off"
    colours: float = 0.0
    views: float = 0.0
    freeze_norm: bool = False
    held: int = 32
    seed: int = 0
    rounds: int = 0
    prompts: int = 8
    embedding_weight: float = 1.0
    decoder_learns: bool = False

    def __post_init__(self) -> None:
        for name, known in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("amp", AMP)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("batch", "accumulate", "prompts"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("epochs", "lr", "clip"):
            self._require(0 < getattr(self, name) < float("inf"), name, "a finite number above 0")
        for name in ("final", "ema", "colours", "views"):
            self._require(0 <= getattr(self, name) <= 1, name, "in 0..1")
        for name in ("warmup", "held", "weight_decay", "seed", "rounds", "embedding_weight"):
            self._require(0 <= getattr(self, name) < float("inf"), name, "0 or more")
        if self.decoder_learns and not self.rounds:
            raise InputError("the decoder learns from masks: give rounds of prompts, too, or leave it as it is")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {what}, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
