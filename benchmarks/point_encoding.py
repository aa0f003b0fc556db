"""Which point encoding teaches a mask decoder sooner what a box means: SAM's random frequencies, or some along x and y.

    python benchmarks/point_encoding.py --photos DIR [--steps 300] [--axes 4] [--threads 1]

Both begin with the same weights, random in the mask decoder and in the tables of the prompt encoder; the image encoder
is the reference's and stays. They see the same boxes in the same order, over views of 256 pixels, and learn to fill the
ellipses in them, which needs nothing of the image. Every 50 updates they are asked at 512 pixels, on boxes that no
update has seen. --photos: a folder of photographs without masks. Writes benchmarks/results/distill/encoding.json; about
12 minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from distill_runs import RESULTS, WEIGHTS, origin
from PIL import Image
from segment_anything.modeling import Sam
from torch.nn import functional as F

from edgesam_deploy.distill.finetune import encode_axes
from edgesam_deploy.distill.labelled import Source
from edgesam_deploy.distill.teacher import encoder_input, encoder_of
from edgesam_deploy.distill.truth_objective import decode, embed_prompts, losses
from edgesam_deploy.distill.views import Sample, Settings, draw_shapes
from edgesam_deploy.files import write_json
from edgesam_deploy.images import SUFFIXES, read_image
from edgesam_deploy.models import build_model
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import load_recipe

PHOTOS, CHECKED, EVERY, WARMUP = 12, 8, 50, 30
LEARN, CHECK = 256, 512
LR, PROMPTS = 1e-3, 40
# COCO's small and medium, as shares of an image of 512 pixels.
SMALL, MEDIUM = 32**2 / CHECK**2, 96**2 / CHECK**2


class Trial:
    """A decoder that learns; one for each encoding."""

    def __init__(self, axes: float | None, steps: int) -> None:
        self.recipe = load_recipe("reference")
        torch.manual_seed(0)
        self.sam = cast(Sam, build_model(self.recipe))
        self.sam.image_encoder = cast(Sam, load_model(self.recipe, WEIGHTS)).image_encoder
        self.sam.eval()
        if axes is not None:
            encode_axes(self.sam, axes)
        parts = (self.sam.mask_decoder, self.sam.prompt_encoder.point_embeddings)
        self.learners = [p for part in parts for p in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.learners, lr=LR, betas=(0.9, 0.98), weight_decay=0.02)
        self.steps, self.step, self.seconds = steps, 0, 0.0

    def answer(self, embedding: torch.Tensor, sample: Sample, size: int) -> tuple[torch.Tensor, ...]:
        """Masks, scores, targets and labels of one view."""
        side = size // (self.recipe.geometry.image_size // self.recipe.geometry.embedding_size)
        encoder = self.sam.prompt_encoder
        encoder.input_image_size, encoder.image_embedding_size = (size, size), (side, side)
        coords, labels, targets = map(torch.from_numpy, (sample.point_coords, sample.point_labels, sample.targets))
        return (*decode(self.sam, embedding[None], embed_prompts(self.sam, coords, labels)), targets, labels)

    def learn(self, embedding: torch.Tensor, sample: Sample) -> None:
        self.step += 1
        rate = min(1.0, self.step / WARMUP, max(0.05, (self.steps - self.step) / (0.3 * self.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = LR * rate
        started = time.monotonic()
        masks, scores, targets, labels = self.answer(embedding, sample, LEARN)
        self.optimizer.zero_grad()
        torch.autograd.backward(losses(masks, scores, targets, labels).total)
        torch.nn.utils.clip_grad_norm_(self.learners, 1.0)
        self.optimizer.step()
        self.seconds += time.monotonic() - started

    @torch.no_grad()
    def check(self, embeddings: torch.Tensor, samples: list[Sample]) -> dict[str, float]:
        found: dict[str, list[float]] = {"small": [], "medium": [], "large": []}
        for number, sample in enumerate(samples):
            masks, _, targets, _ = self.answer(embeddings[number % len(embeddings)], sample, CHECK)
            mine, truth = masks[:, 0] > 0, targets > 0.5
            ious = (mine & truth).sum((1, 2)) / (mine | truth).sum((1, 2)).clamp_min(1)
            for iou, share in zip(ious.tolist(), truth.float().mean((1, 2)).tolist(), strict=True):
                found["small" if share < SMALL else "medium" if share < MEDIUM else "large"].append(iou)
        return {name: statistics.mean(ious) for name, ious in found.items()} | {
            "mean": statistics.mean(iou for ious in found.values() for iou in ious)
        }


@torch.no_grad()
def embed(trial: Trial, photos: Path, size: int) -> torch.Tensor:
    paths = sorted(p for p in photos.iterdir() if p.suffix.lower() in SUFFIXES)
    encoder, found = encoder_of(trial.sam, trial.recipe), []
    for path in paths[:: max(1, len(paths) // PHOTOS)][:PHOTOS]:
        pixels = torch.from_numpy(encoder_input(read_image(path), trial.recipe.geometry, trial.recipe.pixels)[None])
        found.append(encoder(F.interpolate(pixels.float(), size=size, mode="area").to(pixels.dtype)))
    return torch.cat(found)


def shapes(seed: int, count: int, size: int, prompts: int) -> list[Sample]:
    settings = Settings(size, size // 4, prompts, (0, 0, 0), flat=0, paste=0, fit=1, box=1)
    blank = Source("blank", Image.new("RGB", (size, size)), (Image.new("L", (size, size)),))
    rng = np.random.default_rng(seed)
    return [draw_shapes(rng, blank, settings) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--axes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "encoding.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trials = {"random": Trial(None, options.steps), "axes": Trial(options.axes, options.steps)}
    small, large = (embed(trials["random"], options.photos, size) for size in (LEARN, CHECK))
    lessons, unseen = shapes(1, options.steps, LEARN, PROMPTS), shapes(2, CHECKED, CHECK, 24)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in trials}
    for number, sample in enumerate(lessons, start=1):
        for name, trial in trials.items():
            trial.learn(small[number % len(small)], sample)
            if number % EVERY == 0 or number == options.steps:
                curves[name].append({"step": number, **trial.check(large, unseen)})
                print(name, number, *(f"{k} {v:.3f}" for k, v in curves[name][-1].items() if k != "step"), flush=True)
    result = {
        "steps": options.steps,
        "boxes_per_step": PROMPTS,
        "lr": LR,
        "axes": options.axes,
        "checked_boxes": sum(len(sample.targets) for sample in unseen),
        "seconds": {name: round(trial.seconds, 1) for name, trial in trials.items()},
        "curves": curves,
        "origin": origin(threads=options.threads),
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
