"""Train the reference model: one stage at one image size; a curriculum is several runs, each from the last output.

    python -m edgesam_deploy.distill.train --data DIR --init stage1.pt --output stage2.pt --size 512 --steps 2000

Mask token 0 answers boxes and several clicks, tokens 1-3 (the best one learns) a single click. The output is a float16
state dict of the running average of the weights. ``OUTPUT.state`` holds what an interrupted run needs to go on.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.contract import LABEL_FOREGROUND, LABEL_PADDING, MASK_UPSCALE
from edgesam_deploy.distill.data import Sample, Settings, Source, draw, draw_shapes, load_sources
from edgesam_deploy.distill.training import keep_lab_scales
from edgesam_deploy.errors import CheckpointError, InputError
from edgesam_deploy.files import sha256_file, writing
from edgesam_deploy.models import build_model
from edgesam_deploy.models.state_dict import read_state_dict
from edgesam_deploy.recipe import load_recipe

log = logging.getLogger("edgesam_deploy.distill")

# N, tokens of a prompt, and how often a step uses it. 2: boxes and single clicks; more: box with clicks, or clicks.
TOKENS = {2: 0.82, 3: 0.1, 4: 0.05, 6: 0.03}
MAX_VARIANCE = 4096.0
# PyTorch's 0.1 remembers some 40 views of 4 a step: too few for the statistics that the deployed model keeps.
NORM_MOMENTUM = 0.02

# image (I,3,S,S) normalised, point_coords (I*P,N,2), point_labels (I*P,N), targets (I*P,4E,4E); all float32.
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Options:
    """The command line.

    A step sees ``images`` views with ``prompts`` prompts each. lr: AdamW's peak rate, which a cosine takes to
    lr * final. average: decay of the running average. flat, paste, fit, box: see data.Settings. shapes: share of
    steps in which the decoder alone learns boxes from ellipses. freeze_norm: keep BatchNorm's statistics. every:
    steps between two log lines and CSV rows; ten times that between two looks at held-out images and saved states.
    """

    data: Path
    init: Path
    output: Path
    size: int = 256
    images: int = 4
    prompts: int = 24
    steps: int = 1000
    lr: float = 4e-4
    final: float = 0.1
    warmup: int = 100
    average: float = 0.995
    flat: float = 0.35
    paste: float = 0.3
    fit: float = 0.4
    box: float = 0.65
    shapes: float = 0.0
    freeze_norm: bool = False
    seed: int = 0
    threads: int = 2
    every: int = 50

    def __post_init__(self) -> None:
        for name in ("size", "images", "prompts", "steps", "threads", "every"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} must be positive, got {getattr(self, name)}")


class Losses(NamedTuple):
    """total: scalar to minimise. iou: mean IoU of the answers (mask 0, or the best of the others for a click)."""

    total: Tensor
    iou: Tensor


def embed_prompts(sam: Sam, coords: Tensor, labels: Tensor) -> Tensor:
    """point_coords (B,N,2) in the frame of the prompt encoder, point_labels (B,N) -> sparse embeddings (B,N,C).

    segment-anything's encoder takes boxes and points apart; this takes the labels of the exported decoder.
    """
    encoder = sam.prompt_encoder
    embedded: Tensor = encoder.pe_layer.forward_with_coords(coords + 0.5, encoder.input_image_size)
    embedded = embedded * (labels != LABEL_PADDING).unsqueeze(-1)
    for label, table in enumerate([encoder.not_a_point_embed, *encoder.point_embeddings], start=LABEL_PADDING):
        embedded = embedded + (labels == label).unsqueeze(-1) * table.weight
    return embedded


def decode(sam: Sam, embeddings: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """image_embeddings (I,C,E,E), sparse (I*P,N,C) -> low_res_masks (I*P,M,4E,4E), iou_predictions (I*P,M).

    segment-anything's ``predict_masks`` for several images at once.
    """
    decoder, count = sam.mask_decoder, len(sparse)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(count, -1, -1), sparse], dim=1)
    source = embeddings + sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).to(embeddings.dtype)
    source = source.repeat_interleave(count // len(embeddings), dim=0)
    position = sam.prompt_encoder.get_dense_pe().to(source.dtype).expand(count, -1, -1, -1)
    hidden, source = decoder.transformer(source, position, tokens)
    weights = torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=2)
    return upscale(decoder.output_upscaling, source, weights), decoder.iou_prediction_head(hidden[:, 0])


def upscale(layers: nn.Sequential, source: Tensor, weights: Tensor) -> Tensor:
    """source (B,E*E,C), mask weights (B,C/8,M) -> masks (B,M,4E,4E).

    The two transposed convolutions do not overlap, so each is a matrix product per pixel; with the channels last that
    is faster on a CPU, and LayerNorm is one fused call.
    """
    norm, activation = layers[1], layers[2]
    batch, area, masks, x = *source.shape[:2], weights.shape[2], source
    for convolution in (layers[0], layers[3]):
        if not isinstance(convolution, nn.ConvTranspose2d) or convolution.bias is None:
            raise TypeError(f"expected segment-anything's upscaling, found {convolution}")
        kernel = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
        x = F.linear(x, kernel, convolution.bias.repeat(4)).reshape(batch, -1, convolution.out_channels)
        if convolution is layers[0]:
            x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
        x = activation(x)
    side = math.isqrt(area)
    logits = (x @ weights).reshape(batch, side, side, 2, 2, 2, 2, masks)
    # (row, column) of the embedding, then of the two sub-pixel steps.
    return logits.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(batch, masks, 4 * side, 4 * side)


def losses(masks: Tensor, scores: Tensor, targets: Tensor, labels: Tensor) -> Losses:
    """masks (B,M,H,W) logits, scores (B,M), targets (B,H,W) in 0..1, point_labels (B,N)."""
    masks, target = masks.float(), targets.unsqueeze(1)
    pixels = F.binary_cross_entropy_with_logits(masks, target.expand_as(masks), reduction="none")
    probability = masks.sigmoid()
    overlap = 2 * (probability * target).sum((2, 3))
    dice = 1 - (overlap + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    mask_loss = 2 * (pixels * pixel_weights(targets).unsqueeze(1)).sum((2, 3)) + dice
    with torch.no_grad():
        predicted, truth = masks > 0, target > 0.5
        iou = (predicted & truth).sum((2, 3)) / (predicted | truth).sum((2, 3)).clamp_min(1)
    single, (best, index) = mask_loss[:, 0], mask_loss[:, 1:].min(1)
    is_click = ((labels >= 0).sum(1) == 1) & (labels == LABEL_FOREGROUND).any(1)
    # The other answer learns too, at a quarter: it must be usable when a caller asks for it.
    chosen = torch.where(is_click, best + 0.25 * single, single + 0.25 * best)
    answer = torch.where(is_click, iou[:, 1:].gather(1, index[:, None]).squeeze(1), iou[:, 0])
    return Losses(chosen.mean() + F.mse_loss(scores.float(), iou), answer.mean())


def pixel_weights(targets: Tensor) -> Tensor:
    """Weights (B,H,W) of the cross-entropy, sum 1: 0.7 on the object's widened box, 0.3 on the rest of the view.

    Plain averaging would give a small object a thousandth of the loss.
    """
    near = torch.ones_like(targets)
    for axis in (1, 2):
        line = (targets > 0).any(3 - axis).float()
        length = line.shape[1]
        low, high = line.argmax(1), length - 1 - line.flip(1).argmax(1)
        margin, index = 1 + (high - low) // 4, torch.arange(length, device=targets.device)
        inside = (index >= (low - margin)[:, None]) & (index <= (high + margin)[:, None])
        near = near * inside.unsqueeze(3 - axis)
    far = 1 - near
    near_sum, far_sum = (part.sum((1, 2), keepdim=True).clamp_min(1) for part in (near, far))
    return 0.7 * near / near_sum + 0.3 * far / far_sum


def collate(samples: list[Sample], sam: Sam) -> Batch:
    image = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float()
    image = ((image - sam.pixel_mean) / sam.pixel_std).contiguous(memory_format=torch.channels_last)
    fields = ("point_coords", "point_labels", "targets")
    coords, labels, targets = (torch.from_numpy(np.concatenate([getattr(s, f) for s in samples])) for f in fields)
    return image, coords, labels, targets


def forward(sam: Sam, batch: Batch, encoder_learns: bool = True) -> Losses:
    image, coords, labels, targets = batch
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(encoder_learns and torch.is_grad_enabled()):
            embeddings = sam.image_encoder(image)
        masks, scores = decode(sam, embeddings, embed_prompts(sam, coords, labels))
    return losses(masks, scores, targets, labels)


class Trainer:
    """Model, running average, optimizer and random state of one run."""

    def __init__(self, options: Options) -> None:
        self.options, self.step, recipe = options, 0, load_recipe("reference")
        stride = recipe.geometry.image_size // recipe.geometry.embedding_size
        if options.size % (2 * stride):
            raise InputError(f"--size must be a multiple of {2 * stride}, got {options.size}")
        self.sam = cast(Sam, build_model(recipe))
        weights = read_state_dict(options.init)
        require_finite(weights, f"{options.init}")
        self.sam.load_state_dict(weights)
        # The weights do not depend on the size; only these do.
        side = options.size // stride
        self.sam.prompt_encoder.input_image_size = (options.size, options.size)
        self.sam.prompt_encoder.image_embedding_size = (side, side)
        self.sam.image_encoder.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.sam).eval()
        groups = [{"params": [p for p in self.sam.parameters() if p.ndim > 1], "weight_decay": 0.02},
                  {"params": [p for p in self.sam.parameters() if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
        self.rng = np.random.default_rng(options.seed)
        shares = {name: getattr(options, name) for name in ("flat", "paste", "fit", "box")}
        self.settings = Settings(options.size, MASK_UPSCALE * side, options.prompts, recipe.pixels.padding, **shares)

    def rate(self) -> float:
        """Learning rate of this step: linear warm-up, then half a cosine."""
        o = self.options
        done = max(0, self.step - o.warmup) / max(1, o.steps - o.warmup)
        cosine = o.final + (1 - o.final) * 0.5 * (1 + math.cos(math.pi * done))
        return o.lr * min(1.0, (self.step + 1) / max(1, o.warmup)) * cosine

    def train_step(self, sources: list[Source]) -> Losses:
        """One update of the weights and of their average. CheckpointError if the loss is not finite."""
        self.sam.train()
        for module in self.sam.image_encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(not self.options.freeze_norm)
                module.momentum = NORM_MOMENTUM
        shapes = self.rng.random() < self.options.shapes
        # Shapes have nothing to do with the image: the encoder must not learn from them.
        result = forward(self.sam, collate(self._draw(sources, shapes), self.sam), encoder_learns=not shapes)
        if not torch.isfinite(result.total):
            raise CheckpointError(
                f"the loss is {result.total.item()} at step {self.step}: start again with a lower --lr"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad(set_to_none=True)
        result.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.sam.parameters(), 1.0)
        self.optimizer.step()
        self._finish_step()
        return result

    def _draw(self, sources: list[Source], shapes: bool) -> list[Sample]:
        count = self.options.images
        if shapes:
            return [draw_shapes(self.rng, sources, self.settings) for _ in range(count)]
        tokens = int(self.rng.choice(list(TOKENS), p=list(TOKENS.values())))
        return [draw(self.rng, sources, self.settings, tokens) for _ in range(count)]

    @torch.no_grad()
    def _finish_step(self) -> None:
        keep_lab_scales(self.sam)
        # A young average forgets its start faster.
        weight = 1 - min(self.options.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.sam.parameters()), weight)
        for target, source in zip(self.average.buffers(), self.sam.buffers(), strict=True):
            target.copy_(source)
        self.step += 1

    def save(self, path: Path) -> None:
        state = {"options": repr(self.options), "step": self.step, "rng": json.dumps(self.rng.bit_generator.state)}
        parts = {name: getattr(self, name).state_dict() for name in ("sam", "average", "optimizer")}
        save(state | parts, path)

    def resume(self, path: Path) -> None:
        """Go on where ``save`` left off. CheckpointError if that run had other options."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["options"] != repr(self.options):
            raise CheckpointError(
                f"{path} is of a run with other options; delete it to start again: {state['options']}"
            )
        for name in ("sam", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.step = state["step"]
        log.info("resumed at step %d", self.step)


@torch.no_grad()
def half_precision(sam: Sam) -> dict[str, Tensor]:
    """The state dict, floating tensors as float16. CheckpointError if one does not fit.

    The neck's inputs are not normalised, so the variance in a BatchNorm behind it can pass float16's 65504; as inf, it
    makes the embedding ignore the image. Halving a convolution quarters the variance and changes nothing else.
    """
    neck = sam.image_encoder.fuse
    for convolution, norm in ((neck[0], neck[1]), (neck[3], neck[4])):
        while norm.running_var.max() > MAX_VARIANCE:
            convolution.weight /= 2
            norm.running_mean /= 2
            norm.running_var /= 4
    weights = {k: v.half() if v.is_floating_point() else v for k, v in sam.state_dict().items()}
    require_finite(weights, "the trained weights in float16")
    return weights


def require_finite(state: dict[str, Tensor], where: str) -> None:
    broken = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise CheckpointError(f"{where}: {len(broken)} tensors hold inf or NaN, the first is {broken[0]}")


def save(value: dict[str, Any], path: Path) -> None:
    with writing(path) as temporary:
        torch.save(value, temporary)


def hold_out(sources: list[Source]) -> tuple[list[Source], list[Source]]:
    """All but every tenth COCO image, and those: they belong to the train split and are kept for watching the run."""
    held = {s.name for s in [s for s in sources if s.pack == "coco-subset"][::10]}
    return [s for s in sources if s.name not in held], [s for s in sources if s.name in held]


@torch.no_grad()
def validate(sam: Sam, held: list[Source], settings: Settings) -> tuple[float, float]:
    """Low-resolution mIoU on held-out images seen whole: (box, single click best of three)."""
    means = []
    for box in (1.0, 0.0):
        rng = np.random.default_rng(7)
        plain = dataclasses.replace(settings, flat=0.0, paste=0.0, fit=1.0, box=box, prompts=12)
        means.append(float(np.mean([forward(sam, collate([draw(rng, [s], plain, 2)], sam)).iou.item() for s in held])))
    return means[0], means[1]


def train(options: Options) -> None:
    """Run one stage to its end and write the averaged weights to ``options.output``."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    sources, held = hold_out(load_sources(options.data))
    trainer, state = Trainer(options), options.output.with_suffix(".state")
    if state.exists():
        trainer.resume(state)
    start, seen = time.monotonic(), []
    while trainer.step < options.steps:
        seen.append([x.item() for x in trainer.train_step(sources)])
        last = trainer.step == options.steps
        if last or trainer.step % options.every == 0:
            report(
                options.output.with_suffix(".csv"), trainer, np.mean(seen, axis=0).tolist(), time.monotonic() - start
            )
            seen.clear()
        if last or trainer.step % (10 * options.every) == 0:
            ious = validate(trainer.average, held, trainer.settings)
            log.info("step %d held-out mIoU: box %.3f, click %.3f", trainer.step, *ious)
            trainer.save(state)
    save(half_precision(trainer.average), options.output)
    state.unlink()
    log.info("wrote %s, sha256 %s", options.output, sha256_file(options.output))


def report(path: Path, trainer: Trainer, means: list[float], seconds: float) -> None:
    """One line to the log and one row to the CSV beside the output."""
    row = {"step": trainer.step, "loss": round(means[0], 4), "iou": round(means[1], 4), "lr": trainer.rate()}
    log.info("step %(step)d loss %(loss).3f iou %(iou).3f lr %(lr).2e", row)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*row, "seconds"])
        if new:
            writer.writeheader()
        writer.writerow(row | {"seconds": round(seconds)})


def parse(arguments: list[str]) -> Options:
    """Every field of Options is an option of the same name."""
    parser = argparse.ArgumentParser(prog="python -m edgesam_deploy.distill.train", description=Options.__doc__)
    kinds = {"Path": Path, "int": int, "float": float}
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action="store_true")
        elif field.default is dataclasses.MISSING:
            parser.add_argument(flag, type=kinds[str(field.type)], required=True)
        else:
            parser.add_argument(flag, type=kinds[str(field.type)], default=field.default)
    return Options(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    train(parse(sys.argv[1:]))
