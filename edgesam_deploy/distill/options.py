"""What a training run is asked to do. Two runs with the same options, images and teacher give the same weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from edgesam_deploy.errors import InputError

LOSSES = ("huber", "l1", "mse", "cosine")
OPTIMIZERS = ("adamw", "sgd")
AMP = ("off", "bf16", "fp16")
LEARNERS = ("all", "encoder", "decoder")


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """epochs: passes over the images. batch: images per process and micro-step; accumulate: micro-steps per update, so
    that one update sees batch x accumulate x processes images. lr: peak learning rate; warmup: updates it takes to
    reach it; final: its share at the end of the half cosine. ema: weight of the past in the running average of
    weights, which is what is validated and written. amp: autocast type. freeze_norm: batch statistics stay as they
    are. held: images kept out for validation. prompts: per image.
    """

    epochs: float = 10.0
    batch: int = 8
    accumulate: int = 1
    lr: float = 3e-4
    warmup: int = 100
    final: float = 0.01
    weight_decay: float = 0.02
    optimizer: str = "adamw"
    ema: float = 0.999
    clip: float = 1.0
    amp: str = "off"
    freeze_norm: bool = False
    held: int = 32
    seed: int = 0
    prompts: int = 8

    def __post_init__(self) -> None:
        self.require_known("optimizer", OPTIMIZERS)
        self.require_known("amp", AMP)
        for name in ("batch", "accumulate", "prompts"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("epochs", "lr", "clip"):
            self.require(0 < getattr(self, name) < float("inf"), name, "a finite number above 0")
        self.require_shares("final", "ema")
        self.require_finite("warmup", "held", "weight_decay", "seed")

    def require(self, holds: bool, name: str, what: str) -> None:
        """Raises InputError that names the option, unless it holds."""
        if not holds:
            raise InputError(f"{name} must be {what}, got {getattr(self, name)}")

    def require_known(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def require_shares(self, *names: str) -> None:
        for name in names:
            self.require(0 <= getattr(self, name) <= 1, name, "in 0..1")

    def require_finite(self, *names: str) -> None:
        for name in names:
            self.require(0 <= getattr(self, name) < float("inf"), name, "0 or more")

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class DistillOptions(TrainOptions):
    """loss: of student against teacher embeddings. colours: share of images whose colours are changed for the student
    alone. views: share of images shown as a random crop or mirrored, to both; needs a teacher beside, on the fly.

    rounds: of prompts, 0 to learn embeddings alone (``prompt_loop``); embedding_weight: of the embedding loss beside
    that of masks; decoder_learns: the mask decoder too, not the encoder alone.
    """

    loss: str = "huber"
    colours: float = 0.0
    views: float = 0.0
    rounds: int = 0
    embedding_weight: float = 1.0
    decoder_learns: bool = False

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)  # super() does not know a class with slots
        self.require_known("loss", LOSSES)
        self.require_shares("colours", "views")
        self.require_finite("rounds", "embedding_weight")
        if self.decoder_learns and not self.rounds:
            raise InputError("the decoder learns from masks: give rounds of prompts, too, or leave it as it is")


@dataclass(frozen=True, slots=True)
class FinetuneOptions(TrainOptions):
    """learn: what of the network does. image_size: of the views, 0 for the recipe's; a curriculum begins small.

    flat, paste, fit, box, exact, small: see ``views.Settings``. shapes: share of micro-steps in which the decoder alone
    learns boxes from ellipses. windows: share of views whose boxes are decoded in a part of the embedding
    (``windows``). half_clicks: share of micro-steps with clicks alone, on views of half the size, which cost a quarter.
    axes: highest frequency of points' positions, 0 to leave them encoded as they are (``encode_axes``).
    """

    learn: str = "all"
    image_size: int = 0
    flat: float = 0.2
    paste: float = 0.2
    fit: float = 0.5
    box: float = 0.65
    exact: float = 0.5
    small: float = 0.0
    shapes: float = 0.2
    windows: float = 0.0
    half_clicks: float = 0.0
    axes: float = 0.0

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        self.require_known("learn", LEARNERS)
        self.require_shares("flat", "paste", "fit", "box", "exact", "small", "shapes", "windows", "half_clicks")
        self.require_finite("image_size", "axes")
