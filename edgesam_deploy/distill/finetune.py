"""One fine-tuning from a checkpoint and images with true masks to a better checkpoint: views, updates, validation.

What lies in the folder: ``records``. A curriculum is several runs, each from the last one's student.pt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.utils.data import Dataset

from edgesam_deploy.contract import MASK_UPSCALE
from edgesam_deploy.distill.agreement import View, draw_views
from edgesam_deploy.distill.distributed import World
from edgesam_deploy.distill.first_weights import FirstWeights
from edgesam_deploy.distill.labelled import Labelled, Source
from edgesam_deploy.distill.options import FinetuneOptions
from edgesam_deploy.distill.records import Listener, Outcome, Records, carry_out, done_before
from edgesam_deploy.distill.samples import Key, updates
from edgesam_deploy.distill.training import Batch, Prepare, Run, Work
from edgesam_deploy.distill.truth_objective import TruthObjective, enlarge
from edgesam_deploy.distill.views import Sample, Settings, draw, draw_shapes
from edgesam_deploy.distill.windows import draw_windows
from edgesam_deploy.errors import InputError
from edgesam_deploy.masks import MASK_THRESHOLD
from edgesam_deploy.recipe import Recipe

# N, tokens of a prompt, and how often a micro-step uses it. 2: boxes and single clicks; more: clicks, or both.
TOKENS = {2: 0.82, 3: 0.1, 4: 0.05, 6: 0.03}
# What a validation is called in a run's record.
KIND = "held_out"
# Prompts of each kind for an image of the validation, and how many images are drawn.
VALIDATED, DRAWN = 12, 4


@dataclass(frozen=True, slots=True)
class TruthScore:
    """Mean IoU, at the size of the view, of held-out images seen whole: boxes, and single clicks (best of three)."""

    images: int
    click_iou: float
    box_iou: float


@dataclass(frozen=True, slots=True)
class FinetuneJob:
    """recipe: of the network."""

    recipe: Recipe
    images: Labelled
    options: FinetuneOptions
    records: Records
    first: FirstWeights = field(default_factory=FirstWeights)

    @property
    def size(self) -> int:
        return self.options.image_size or self.recipe.geometry.image_size

    def __post_init__(self) -> None:
        stride = self.recipe.geometry.image_size // self.recipe.geometry.embedding_size
        step = 4 * stride if self.options.half_clicks else 2 * stride
        if self.size % step:
            raise InputError(f"image_size must be a multiple of {step}, got {self.size}")

    def settings(self) -> Settings:
        geometry, o = self.recipe.geometry, self.options
        mask_size = MASK_UPSCALE * self.size * geometry.embedding_size // geometry.image_size
        padding = self.recipe.pixels.padding
        return Settings(self.size, mask_size, o.prompts, padding, o.flat, o.paste, o.fit, o.box, o.small, o.exact)


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """finished: False where the time limit came first. checkpoint: from an unfinished run too."""

    finished: bool
    step: int
    total: int
    images: int
    seconds: float
    held_out: TruthScore
    checkpoint: Path
    sha256: str


def finetune(job: FinetuneJob, world: World, listener: Listener) -> FinetuneResult:
    """Run ``job`` to its end or time limit, from where an earlier run in the same folder stopped.

    Raises InputError for images, masks or a network that do not fit, CheckpointError for weights or a state that does
    not, or a loss that is not finite, OutputError for a result that cannot be written.
    """
    torch.manual_seed(job.options.seed)
    images, held = job.images.split(job.options.held)
    total = updates(len(images), job.options, world.size)
    identity = _identity(job, world, total)
    done = done_before(job.records, identity, KIND, TruthScore)
    if done is not None:
        listener.say(f"{job.records.output} holds this run, finished")
        return _result(done, len(images))
    model = job.first.build(job.recipe)
    objective = TruthObjective(model, job.recipe, job.options)
    if job.options.axes:
        encode_axes(cast(Sam, model), job.options.axes)
    _check_size(objective, job)
    with job.records.claimed(world):
        # Of a prompt's parts only those that are asked for get a gradient.
        run = Run(model, _learners(cast(Sam, model), job.options.learn), objective, job.options, total, world, identity,
                  sparing=True)  # fmt: skip
        work = Work(Views(job.images, images, job.options, job.settings()), images, _prepare(world.device))
        out = carry_out(
            run, work, job.records, listener, lambda: TruthJudge(job, held, world.device), KIND, job.records.pause
        )
    return _result(out, len(images))


def _result(out: Outcome, images: int) -> FinetuneResult:
    return FinetuneResult(out.finished, out.step, out.total, images, out.seconds, out.found, out.checkpoint, out.sha256)


class Views(Dataset[tuple[Tensor, ...]]):
    """(epoch, image, micro-step) -> what ``TruthObjective`` takes of one image. images: all that may be pasted from."""

    def __init__(
        self, labelled: Labelled, images: npt.NDArray[np.int64], options: FinetuneOptions, settings: Settings
    ) -> None:
        self.labelled, self.images, self.options, self.settings = labelled, images, options, settings

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        epoch, index, micro = key
        together = np.random.default_rng((self.options.seed, micro))  # alike for all of a batch
        # Where the decoder does not learn, nothing would.
        shapes = bool(together.random() < self.options.shapes) and self.options.learn != "encoder"
        tokens = int(together.choice(list(TOKENS), p=list(TOKENS.values())))
        half = bool(together.random() < self.options.half_clicks) and not shapes
        settings = half_the_size(self.settings) if half else self.settings
        rng = np.random.default_rng((self.options.seed, epoch, index))
        source = self.labelled.load(index)

        def another() -> Source:
            return self.labelled.load(int(rng.choice(self.images)))

        sample = draw_shapes(rng, source, settings) if shapes else draw(rng, source, another, settings, tokens)
        cells = settings.mask_size // MASK_UPSCALE
        if rng.random() < self.options.windows and not half:
            windows = draw_windows(rng, sample, cells)
        else:
            windows = np.tile(np.array([cells, 0, 0], np.int64), (len(sample.targets), 1))
        return *tensors(sample), torch.from_numpy(windows), torch.tensor(shapes)


def half_the_size(settings: Settings) -> Settings:
    """Clicks alone, on large and small masks equally often. How far a click's mask reaches is learnt from all of the
    embedding, which at half the size costs a quarter."""
    return replace(settings, size=settings.size // 2, mask_size=settings.mask_size // 2, box=0.0, small=0.0)


def tensors(sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    image = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
    given = (sample.point_coords, sample.point_labels, sample.masks, sample.targets)
    coords, labels, masks, targets = map(torch.from_numpy, given)
    return image, coords, labels, masks, targets


class TruthJudge:
    """(network, picture to draw) -> its score on the held-out images, seen whole and unchanged."""

    def __init__(self, job: FinetuneJob, held: npt.NDArray[np.int64], device: torch.device) -> None:
        self._job, self._device = job, device
        self._samples: list[list[Sample]] = []
        for number in held.tolist():
            source = job.images.load(number)
            try:
                self._samples.append([self._draw(number, source, box) for box in (0.0, 1.0)])
            except InputError:
                continue  # nothing on it is large enough
        if not self._samples:
            raise InputError(
                f"none of the {len(held)} held-out images shows a mask that is large enough: keep more of them with "
                "--held, or give images with larger masks"
            )

    def _draw(self, number: int, source: Source, box: float) -> Sample:
        settings = self._job.settings()  # what is asked for is the same, whatever a run learns from
        plain = replace(settings, flat=0.0, paste=0.0, fit=1.0, box=box, prompts=VALIDATED, small=0.0, exact=0.5)
        return draw(np.random.default_rng((7, number)), source, lambda: source, plain, 2)

    @torch.no_grad()  # inference mode would leave encoders' caches as tensors that no update may touch
    def __call__(self, model: nn.Module, picture: Path) -> TruthScore:
        objective = TruthObjective(model, self._job.recipe, self._job.options).eval()
        means: list[list[float]] = []
        drawn: list[View] = []
        for row in self._samples:
            ious, theirs, mine = [], [], []
            for sample in row:
                image, coords, labels, truth, _ = (t[None].to(self._device) for t in tensors(sample))
                low, scores = objective.answer(image, coords[0], labels[0])
                single, chosen = answers(enlarge(low, image.shape[-1]), scores, labels[0], truth[0])
                ious.append(chosen.mean().item())
                theirs += list(truth[0, :2].cpu().numpy())
                mine += list((single[:2] > MASK_THRESHOLD).cpu().numpy())
            means.append(ious)
            if len(drawn) < DRAWN:
                drawn.append((row[0].image, theirs, mine))
        draw_views(picture, drawn)
        click, box = (float(v) for v in np.mean(means, axis=0))
        return TruthScore(len(means), click, box)


def answers(masks: Tensor, scores: Tensor, labels: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """masks (P,4,S,S) logits, truth (P,S,S) bool -> the mask that a caller would take, (P,S,S) logits: token 0 for a
    box, the best predicted of the others for a click; and (P,) IoU with the truth, for a click of the best of three."""
    predicted, wanted = masks > MASK_THRESHOLD, truth[:, None]
    iou = (predicted & wanted).sum((2, 3)) / (predicted | wanted).sum((2, 3)).clamp_min(1)
    rows = torch.arange(len(masks), device=masks.device)
    if bool((labels[:, 0] == 1).all()):  # clicks
        return masks[rows, 1 + scores[:, 1:].argmax(1)], iou[:, 1:].amax(1)
    return masks[:, 0], iou[:, 0]


def _prepare(device: torch.device) -> Prepare:
    def prepare(batch: Batch) -> Batch:
        return [value.to(device, non_blocking=True) for value in batch]

    return prepare


def _learners(sam: Sam, learn: str) -> Sequence[nn.Module]:
    decoder = (sam.prompt_encoder, sam.mask_decoder)
    return {"all": (sam.image_encoder, *decoder), "encoder": (sam.image_encoder,), "decoder": decoder}[learn]


@torch.no_grad()
def encode_axes(sam: Sam, highest: float) -> None:
    """Encode positions along x and y apart, by frequencies that grow evenly in their logarithm up to ``highest``.

    SAM draws frequencies of all directions from a normal distribution (Tancik et al. 2020, arXiv:2006.10739): few are
    high enough to tell small boxes apart, and none follows an edge of a box. A frequency of 1 has two periods over the
    image, as in SAM's unit. The network stays SAM's, its decoder has to learn anew what a position means.
    """
    matrix = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    lowest, count = min(0.12, highest), matrix.shape[1] // 2
    frequencies = torch.logspace(math.log10(lowest), math.log10(highest), count)
    matrix.zero_()
    matrix[0, :count], matrix[1, count : 2 * count] = frequencies, frequencies


@torch.no_grad()
def _check_size(objective: TruthObjective, job: FinetuneJob) -> None:
    """Raises InputError for an encoder whose positions are learnt for another size."""
    objective.eval()
    asked = {"--half-clicks": job.size // 2} if job.options.half_clicks else {}
    for option, size in {**asked, "--image-size": job.size}.items():
        try:
            objective.encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except RuntimeError as error:
            raise InputError(
                f"the encoder of '{job.recipe.name}' takes no images of {size} pixels, only of its own "
                f"{job.recipe.geometry.image_size}: leave out {option} ({' '.join(str(error).split())[:120]})"
            ) from error


def _identity(job: FinetuneJob, world: World, total: int) -> str:
    what: dict[str, Any] = {
        "student": job.recipe.name,
        "student_recipe_sha256": job.recipe.digest,
        "images": len(job.images),
        "images_sha256": job.images.digest(),
        **job.first.hashes(),
        "options": job.options.as_dict(),
        "updates": total,
        "processes": world.size,
    }
    return json.dumps(what)
