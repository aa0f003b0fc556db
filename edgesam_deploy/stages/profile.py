"""A recipe's cost, part by part: counted on the meta device, timed in a fresh process. See ``measure.profile``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from edgesam_deploy.contract import IMAGE, POINTS_AXIS, PROMPTS_AXIS, contracts
from edgesam_deploy.errors import EdgeSAMError, InputError
from edgesam_deploy.measure.profile import DECODER, ENCODER, KINDS, PROMPTS, Layer, ModelProfile, Part
from edgesam_deploy.models import build_model, graph_modules
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.recipe import Recipe
from edgesam_deploy.stages.profile_count import Tally, count
from edgesam_deploy.stages.profile_parts import halves, stages, weight

# One click, which the prompt encoder pads to two points.
POINTS = 2
# Of the random weights that stand for published ones: no figure here depends on their values.
SEED = 0


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What to profile. image_sizes: sides of the encoder's input, () for the recipe's own. batches: images of the
    encoder, prompts of the decoder. latency: time and weigh it, too. checks: count again with other counters. top: how
    many of the heaviest layers to name. checkpoint: None for random weights.
    """

    image_sizes: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    latency: bool = True
    checks: bool = False
    threads: int | None = None
    runs: int = 10
    warmup: int = 1
    top: int = 10
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        for name in ("image_sizes", "batches"):
            if any(value < 1 for value in getattr(self, name)):
                raise InputError(f"{name} must be positive integers, got {getattr(self, name)}")
        for name, least in (("runs", 1), ("warmup", 0), ("top", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Network:
    """A recipe's network on one device. encoder: as published. exported: the encoder as exported, with the image as
    its input; decoder: as exported.
    """

    recipe: Recipe
    model: nn.Module
    encoder: nn.Module
    exported: nn.Module
    decoder: nn.Module
    device: str

    def image(self, batch: int) -> Tensor:
        """(B,3,S,S) float32, as image_encoder takes it."""
        size = self.recipe.geometry.image_size
        return torch.zeros(batch, 3, size, size, device=self.device)

    def inputs(self, graph: str, prompts: int) -> list[Tensor]:
        """Of "encoder" or "decoder" as exported: one image, ``prompts`` prompts of ``POINTS`` foreground points."""
        sizes = {PROMPTS_AXIS: prompts, POINTS_AXIS: POINTS}
        return [
            torch.ones(
                [sizes[d] if isinstance(d, str) else d for d in spec.shape],
                dtype=torch.uint8 if spec.name == IMAGE else torch.float32,
                device=self.device,
            )
            for spec in contracts(self.recipe.geometry)[graph].inputs
        ]


def build_network(recipe: Recipe, device: str, checkpoint: Path | None = None) -> Network:
    """The network with random weights, or those of ``checkpoint``, in eval mode."""
    torch.manual_seed(SEED)
    # Tensors that the graphs make for themselves must be on the device, too.
    with torch.device(device) if device != "cpu" else nullcontext():
        model = load_model(recipe, checkpoint) if checkpoint is not None else build_model(recipe)
        model.requires_grad_(False)
        exported, decoder = graph_modules(model, recipe)
    return Network(recipe, model, cast(nn.Module, model.image_encoder), exported, decoder, device)


def sized(recipe: Recipe, image_size: int) -> Recipe:
    """The recipe at another input size: same strides, and prompts in the new frame where they were in the old one.

    Raises InputError where the size does not divide into the encoder's stride.
    """
    geometry = recipe.geometry
    if image_size == geometry.image_size:
        return recipe
    stride = geometry.image_size // geometry.embedding_size
    if image_size % stride:
        raise InputError(f"{recipe.name} does not run at {image_size} px: its encoder needs a multiple of {stride}")
    prompt_size = image_size if geometry.prompt_size == geometry.image_size else geometry.prompt_size
    changed = replace(geometry, image_size=image_size, prompt_size=prompt_size, embedding_size=image_size // stride)
    return replace(recipe, geometry=changed)


def profile(recipe: Recipe, options: ProfileOptions, say: Callable[[str], None] = lambda _: None) -> list[ModelProfile]:
    """One profile for each size and batch. say: told of each step, and of a size that the encoder does not take.

    Raises InputError if it takes none of them, and what building and loading the network raise.
    """
    found: list[ModelProfile] = []
    refused: InputError | None = None
    for size in options.image_sizes or (recipe.geometry.image_size,):
        try:
            found += _at_size(recipe, size, options, say)
        except InputError as error:
            if len(options.image_sizes) < 2:
                raise
            say(f"left out: {error}")
            refused = error
    if not found and refused is not None:
        raise refused
    return found


def _at_size(recipe: Recipe, size: int, options: ProfileOptions, say: Callable[[str], None]) -> Iterable[ModelProfile]:
    from edgesam_deploy.stages.profile_worker import checked, measured

    chosen = sized(recipe, size)
    say(f"{recipe.name} at {size} px: counting")
    for network_of in _devices(chosen):
        try:
            network = network_of()
            counted = [_counted(network, batch, options.top) for batch in options.batches]
            break
        except (EdgeSAMError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            refused = error
    else:
        if size == recipe.geometry.image_size:
            raise refused
        reason = str(refused).strip().splitlines()[0]
        raise InputError(f"{recipe.name} does not run at {size} px: {reason}") from refused
    for result in counted:
        if size == recipe.geometry.image_size and result.batch == 1:
            result = replace(result, published_macs_g=recipe.published.macs_g)
        if options.checks and result.batch == options.batches[0]:
            say(f"{recipe.name} at {size} px: counting with other counters")
            result = replace(result, checks=checked(chosen, result.batch, say))
        if options.latency:
            say(f"{recipe.name} at {size} px, batch {result.batch}: {options.runs} runs in a fresh process")
            result = measured(result, chosen, options)
        yield result


def _devices(recipe: Recipe) -> Sequence[Callable[[], Network]]:
    """Ways to a network that can be counted: without memory where its code allows that, else with."""
    return (lambda: build_network(recipe, "meta"), lambda: build_network(recipe, "cpu"))


def _counted(network: Network, batch: int, top: int) -> ModelProfile:
    divided = stages(network.encoder)
    encoder = count(network.encoder, [network.image(batch)], divided or {ENCODER: network.encoder})
    parts = halves(network.decoder)
    decoder = count(network.decoder, network.inputs("decoder", batch), parts)
    exported = count(network.exported, network.inputs("encoder", 1), {ENCODER: network.exported})
    recipe = network.recipe
    return ModelProfile(
        recipe=recipe.name,
        family=recipe.family,
        image_size=recipe.geometry.image_size,
        batch=batch,
        points=POINTS,
        parts=(
            _whole(ENCODER, weight(network.encoder), encoder),
            *(_part(name, weight(getattr(network.model, name)), decoder) for name in (PROMPTS, DECODER)),
        ),
        stages=tuple(_part(name, weight(module), encoder) for name, module in divided.items() if _ran(name, encoder)),
        top=_top(network, encoder, decoder)[:top],
        unused=sum(p.numel() for p in network.encoder.parameters() if id(p) not in encoder.read),
        exported_parameters=weight(network.exported),
        exported_macs=sum(exported.macs.values()),
        counted_on=network.device,
        weights="none",
        published_params_m=recipe.published.params_m,
    )


def _ran(name: str, tally: Tally) -> bool:
    return name in tally.peak_bytes


def _whole(name: str, parameters: int, tally: Tally) -> Part:
    macs = {kind: sum(n for work, n in tally.macs.items() if work.kind == kind) for kind in KINDS}
    return Part(name, parameters, macs, tally.activation_bytes.total(), max(tally.peak_bytes.values(), default=0))


def _part(name: str, parameters: int, tally: Tally) -> Part:
    macs = {kind: sum(n for w, n in tally.macs.items() if w.kind == kind and w.part == name) for kind in KINDS}
    return Part(name, parameters, macs, tally.activation_bytes[name], tally.peak_bytes.get(name, 0))


def _top(network: Network, encoder: Tally, decoder: Tally) -> tuple[Layer, ...]:
    """Modules of encoder and decoder by their own MACs, the heaviest first."""
    found: list[Layer] = []
    for prefix, module, tally in ((f"{ENCODER}.", network.encoder, encoder), ("", network.decoder, decoder)):
        modules = dict(module.named_modules())
        names = dict.fromkeys(work.module for work in tally.macs)
        for name in names:
            own = modules[name]
            macs = sum(n for work, n in tally.macs.items() if work.module == name)
            parameters = sum(p.numel() for p in own.parameters(recurse=False))
            found.append(Layer(f"{prefix}{name}".rstrip("."), type(own).__name__, parameters, macs))
    return tuple(sorted(found, key=lambda layer: -layer.macs))
