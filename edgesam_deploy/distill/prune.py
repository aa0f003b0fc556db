"""Structured pruning of a student's image encoder: whole channels go until its multiply-adds have fallen by a ratio.

x.toml   the recipe with the widths of its layers ([model.widths]): builds the pruned network, and works wherever a
         recipe does
x.pt     its weights: the encoder's remaining channels, prompt encoder and mask decoder as they were

Layers lose the same share of their channels, each those that matter least to it; which layers must lose the same
channels is torch-pruning's to say (DepGraph, arXiv 2301.12900). That it said so rightly is checked: the pruned encoder
must compute what the whole one does where nothing reads the channels that went.
"""

from __future__ import annotations

import copy
import io
import json
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch_pruning as tp
from torch import Tensor, nn

from edgesam_deploy.errors import EdgeSAMError, InputError, RecipeError
from edgesam_deploy.files import sha256_bytes, sha256_file, writing
from edgesam_deploy.models.checkpoint import load_model
from edgesam_deploy.models.timm_fpn import TimmFpnEncoder
from edgesam_deploy.models.widths import Width, widths
from edgesam_deploy.recipe import Recipe, load_recipe, parse_recipe, read_toml
from edgesam_deploy.stages.profile_count import count

ARCHITECTURE = "timm_fpn"
IMPORTANCES = ("magnitude", "bn-scale", "random")
LARGEST_RATIO = 0.9
# Side of the images that the encoder is followed and checked on: what depends on it are sizes, not channels.
TRACE_SIZE = 64
# Largest difference of the check, of the largest value: sums are taken in another order.
TOLERANCE = 1e-3
# What the original recipe says of weights and figures that are not the pruned network's.
NOT_TAKEN_OVER = ("checkpoint", "published")


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """ratio: of the encoder's multiply-adds that go, at least. importance: what a channel's worth is, "magnitude" (L2
    of all its weights, over all layers that share it), "bn-scale" (of its batch norms; magnitude where there are none)
    or "random" (by ``seed``). round_to: remaining channels are a multiple of it wherever some go.
    """

    ratio: float = 0.3
    importance: str = "magnitude"
    round_to: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= LARGEST_RATIO:
            raise InputError(
                f"ratio must be above 0 and at most {LARGEST_RATIO}, such as 0.3 for 30 % fewer multiply-adds, got "
                f"{self.ratio:g}"
            )
        if self.importance not in IMPORTANCES:
            raise InputError(f"importance must be one of {', '.join(IMPORTANCES)}, got '{self.importance}'")
        if self.round_to < 1:
            raise InputError(f"round_to must be at least 1, got {self.round_to}")


@dataclass(frozen=True, slots=True)
class PruneResult:
    """Of the image encoder: parameters, multiply-adds for one image at the recipe's size. reduction: share of those
    that went. layers: how many have fewer channels now. recipe, checkpoint: the files; sha256: of the checkpoint.
    """

    name: str
    recipe: Path
    checkpoint: Path
    sha256: str
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    reduction: float
    layers: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Channels of the layer ``root`` that go, and with them those of all layers that share them."""

    root: str
    channels: tuple[int, ...]


def prune(source: Path, checkpoint: Path, output: Path, options: PruneOptions) -> PruneResult:
    """Prune the encoder of the recipe ``source`` with the weights of ``checkpoint`` into two files in ``output``.

    Raises RecipeError for an architecture or backbone that cannot be pruned, CheckpointError for weights that do not
    fit, InputError for a ratio that cannot be reached, OutputError for files that cannot be written.
    """
    recipe = load_recipe(source)
    check_prunable(recipe)
    name = f"{recipe.name}_pruned{round(100 * options.ratio)}"
    files = output / f"{name}.toml", output / f"{name}.pt"
    origin = (
        f"Pruned by sam-export prune --ratio {options.ratio:g} --importance {options.importance} "
        f"--round-to {options.round_to} --seed {options.seed}\n"
        f"from {recipe.name} (recipe {recipe.digest}, checkpoint {sha256_file(checkpoint)}),\n"
        f"torch-pruning {version('torch-pruning')}, torch {torch.__version__}."
    )
    model = load_model(recipe, checkpoint)
    _refuse_other(files[0], origin)
    encoder = cast(TimmFpnEncoder, model.image_encoder)
    size = recipe.geometry.image_size
    tally = layer_macs(encoder, size)
    before = sum(tally.values())
    parameters = _parameters(encoder)
    own = widths(encoder)
    cuts = _following(recipe, lambda: find_cuts(encoder, tally, options))
    pruned = _following(recipe, lambda: cut(encoder, cuts))
    model.image_encoder = pruned
    after = sum(layer_macs(pruned, size).values())
    gone = f"{round(100 * options.ratio)} % of its encoder's multiply-adds pruned away"
    raw = {**describe(read_toml(source), recipe, pruned, gone), "name": name}
    digest = _write(files, raw, origin, model)
    now = widths(pruned)
    return PruneResult(
        name=name,
        recipe=files[0],
        checkpoint=files[1],
        sha256=digest,
        parameters_before=parameters,
        parameters_after=_parameters(pruned),
        macs_before=before,
        macs_after=after,
        reduction=1 - after / before,
        layers=sum(own[name] != now[name] for name in own),
    )


def check_prunable(recipe: Recipe) -> None:
    """Raises RecipeError for a recipe of another architecture."""
    if recipe.architecture != ARCHITECTURE:
        raise RecipeError(
            f"recipe {recipe.name} is of architecture '{recipe.architecture}': only students, of '{ARCHITECTURE}', can "
            "be pruned"
        )


def layer_macs(encoder: nn.Module, image_size: int) -> Counter[str]:
    """Multiply-adds of one image by the name of the layer that does them, counted without computing them."""
    shape = copy.deepcopy(encoder).to("meta")
    tally = count(shape, [torch.zeros(1, 3, image_size, image_size, device="meta")], {"encoder": shape})
    found: Counter[str] = Counter()
    for work, macs in tally.macs.items():
        found[work.module] += macs
    return found


def find_cuts(encoder: TimmFpnEncoder, macs: Counter[str], options: PruneOptions) -> list[Cut]:
    """The fewest channels, a like share of every layer, without which the encoder has the wanted multiply-adds.

    macs: of its layers as they are. Raises InputError where even the narrowest encoder has more.
    """
    graph = _graph(encoder)
    own, roots = widths(encoder), list(_roots(graph, encoder, options))
    # Which root goes to which width, at which share of channels: in this order, one after the other.
    steps = sorted(
        (share, index, width)
        for index, (_, order) in enumerate(roots)
        for share, width in _narrower(len(order), options.round_to)
    )

    def cuts_of(taken: int) -> list[Cut]:
        kept = {index: width for _, index, width in steps[:taken]}
        return [
            Cut(roots[index][0], tuple(sorted(roots[index][1][: len(roots[index][1]) - width])))
            for index, width in sorted(kept.items())
        ]

    def reduction(taken: int) -> float:
        changed = _widths_after(graph, encoder, cuts_of(taken))
        gone = sum(macs[name] * (1 - _work(width) / _work(own[name])) for name, width in changed.items())
        return gone / macs.total()

    low, high = 0, len(steps)
    if (most := reduction(high)) < options.ratio:
        raise InputError(
            f"ratio {options.ratio:g} is out of reach: with {options.round_to} channels left in every layer, "
            f"multiply-adds fall by {most:.3f}; take a smaller --ratio or --round-to"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reduction(middle) >= options.ratio else (middle, high)
    return cuts_of(high)


def cut(encoder: TimmFpnEncoder, cuts: Sequence[Cut]) -> TimmFpnEncoder:
    """A copy of ``encoder`` without the channels of ``cuts``, in eval mode.

    Raises RuntimeError unless it computes what ``encoder`` does where nothing reads those channels.
    """
    narrow = copy.deepcopy(encoder).eval()
    graph = _graph(narrow)
    modules = dict(narrow.named_modules())
    for each in cuts:
        _group(graph, modules[each.root], each.channels).prune()
    for parameter in narrow.parameters():
        parameter.data = parameter.data.contiguous()
        parameter.grad = None
    silent = silenced(encoder, cuts)
    image = _image()
    with torch.inference_mode():
        expected, found = silent(image), narrow(image)
    if expected.shape != found.shape or not _close(expected, found):
        raise RuntimeError("without the channels it computes something else than with them silenced")
    return narrow


def silenced(encoder: TimmFpnEncoder, cuts: Sequence[Cut]) -> TimmFpnEncoder:
    """A copy of ``encoder`` of the same widths in which no layer reads the channels of ``cuts``."""
    silent = copy.deepcopy(encoder).eval()
    graph = _graph(silent)
    modules = dict(silent.named_modules())
    with torch.no_grad():
        for each in cuts:
            for dep, channels in _group(graph, modules[each.root], each.channels):
                if _reads(graph, dep):
                    dep.target.module.weight[:, channels] = 0
    return silent


def describe(raw: Mapping[str, Any], recipe: Recipe, pruned: TimmFpnEncoder, how: str) -> dict[str, Any]:
    """The TOML of the pruned network, from that of ``recipe``."""
    whole = TimmFpnEncoder(str(recipe.options["backbone"]), recipe.geometry.embedding_channels)
    usual, own = widths(whole), widths(pruned)
    changed = {name: list(width) for name, width in own.items() if usual[name] != width}
    described = {name: entry for name, entry in raw.items() if name not in NOT_TAKEN_OVER}
    described["summary"] = f"{recipe.summary}; {how}"
    described["model"] = {**raw["model"], "widths": changed}
    return described


def _write(files: tuple[Path, Path], raw: dict[str, Any], origin: str, model: nn.Module) -> str:
    """Both files, once the network that they describe answers as ``model`` does, to the bit. -> the weights' sha256."""
    buffer = io.BytesIO()  # a file's own name would become part of what is saved, and so of its hash
    torch.save({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, buffer)
    data = buffer.getvalue()
    text = _comment(origin) + "\n" + "\n".join(toml_lines(raw)).strip() + "\n"
    with writing(files[0]) as recipe_file, writing(files[1]) as weights_file:
        recipe_file.write_text(text, encoding="utf-8")
        weights_file.write_bytes(data)
        again = load_model(load_recipe(recipe_file), weights_file)
        if parse_recipe(raw, files[0]).digest != load_recipe(recipe_file).digest:
            raise RecipeError(f"recipe {raw['name']} cannot be written as TOML")
        image = _image()
        with torch.inference_mode():
            same = torch.equal(model.image_encoder(image), again.image_encoder(image))  # type: ignore[operator]
        if not same:
            raise RecipeError(f"{raw['name']}: the network built from its widths is not the one that was pruned")
    return sha256_bytes(data)


def _refuse_other(path: Path, origin: str) -> None:
    """Raises InputError where the recipe there is of another origin: a student may be learning from it."""
    try:
        found = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        found = ""
    if not found.startswith(_comment(origin)):
        raise InputError(
            f"{path} is not of this pruning, whose options, weights and versions its first lines would tell: give "
            "another -o, or delete it"
        )


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in text.splitlines())


def _following(recipe: Recipe, work: Callable[[], Any]) -> Any:
    """What torch-pruning and the pruned network say of a backbone that cannot be followed comes as it likes."""
    try:
        return work()
    except EdgeSAMError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"recipe {recipe.name}: backbone '{recipe.options['backbone']}' cannot be pruned: torch-pruning does not "
            f"follow its channels ({type(error).__name__}: {reason}). Convolutional backbones can be (HGNetV2, "
            "MobileNetV4-conv, ResNet, RepViT, EfficientNetV2, EfficientViT), those with softmax attention (TinyViT, "
            "MobileNetV4-hybrid) cannot"
        ) from error


def _graph(encoder: TimmFpnEncoder) -> Any:
    """Which layers share channels. Scalars, such as a learnable scale, have none."""
    scalars = [parameter for parameter in encoder.parameters() if parameter.numel() == 1]
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(encoder, _image(), ignored_params=scalars)


def _roots(graph: Any, encoder: TimmFpnEncoder, options: PruneOptions) -> Iterable[tuple[str, list[int]]]:
    """One layer for all that share its channels, by name, and its channels, those that matter least first."""
    names = {module: name for name, module in encoder.named_modules()}
    generator = torch.Generator().manual_seed(options.seed)
    # The embedding's channels are the decoder's.
    for group in graph.get_all_groups(ignored_layers=[encoder.fuse[-1]], root_module_types=[nn.Conv2d, nn.Linear]):
        if any(_grouped(dep.target.module) for dep, _ in group):
            continue
        worth = _worth(group, options.importance, generator)
        yield names[group[0].dep.target.module], torch.argsort(worth, stable=True).tolist()


def _worth(group: Any, importance: str, generator: torch.Generator) -> Tensor:
    """(C,) float32, of each channel of a group."""
    if importance == "random":
        return torch.rand(len(group[0].idxs), generator=generator)
    found: Tensor | None = tp.importance.BNScaleImportance()(group) if importance == "bn-scale" else None
    if found is None:
        found = cast(Tensor, tp.importance.GroupMagnitudeImportance(p=2)(group))
    return found


def _narrower(channels: int, round_to: int) -> Iterable[tuple[float, int]]:
    """Widths below ``channels``, multiples of ``round_to``, each with the share of channels at which it is nearest."""
    wider = channels
    for width in range((channels - 1) // round_to * round_to, 0, -round_to):
        yield 1 - (wider + width) / 2 / channels, width
        wider = width


def _widths_after(graph: Any, encoder: TimmFpnEncoder, cuts: Sequence[Cut]) -> dict[str, Width]:
    """What the layers that change will be like."""
    modules, own = dict(encoder.named_modules()), widths(encoder)
    names = {module: name for name, module in modules.items()}
    gone: dict[tuple[str, bool], set[int]] = defaultdict(set)
    for each in cuts:
        for dep, channels in _group(graph, modules[each.root], each.channels):
            if (name := names.get(dep.target.module)) in own:
                gone[cast(str, name), _reads(graph, dep)].update(channels)
    found: dict[str, Width] = {}
    for name in {name for name, _ in gone}:
        given, made = len(gone[name, True]), len(gone[name, False])
        match own[name]:
            case (inner, outer, groups) if groups > 1:
                found[name] = (inner - made, outer - made, groups - made)
            case (inner, outer, groups):
                found[name] = (inner - given, outer - made, groups)
            case (inner, outer):
                found[name] = (inner - given, outer - made)
            case (channels,):
                found[name] = (channels - made,)
    return found


def _work(width: Width) -> float:
    """Multiply-adds for each place of a layer's output, but for the size of its kernel."""
    match width:
        case (inner, outer, groups):
            return inner * outer / groups
        case (inner, outer):
            return inner * outer
    return 1.0  # it scales: no multiply-adds are counted


def _group(graph: Any, root: nn.Module, channels: Sequence[int]) -> Any:
    return graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, list(channels))


def _reads(graph: Any, dep: Any) -> bool:
    """Whether a layer of a group takes the channels in, rather than giving or scaling them."""
    module = dep.target.module
    if not isinstance(module, nn.Conv2d | nn.Linear) or getattr(module, "groups", 1) > 1:
        return False
    return bool(graph.is_in_channel_pruning_fn(dep.handler))


def _grouped(module: Any) -> bool:
    """Convolutions of some channels at a time, which would have to lose as many in each group."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups != module.out_channels


def _image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, TRACE_SIZE, TRACE_SIZE, generator=generator)


def _close(expected: Tensor, found: Tensor) -> bool:
    difference = (expected - found).abs().max().item()
    return math.isfinite(difference) and difference <= TOLERANCE * expected.abs().max().item()


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def toml_lines(table: Mapping[str, Any], path: str = "") -> Iterable[str]:
    """A table of texts, numbers, truths, lists of them and tables of such, as TOML."""
    inner = {name: entry for name, entry in table.items() if isinstance(entry, Mapping)}
    if path and (len(inner) < len(table) or not inner):
        yield f"\n[{path}]"
    for name, entry in table.items():
        if name not in inner:
            yield f"{_key(name)} = {json.dumps(entry, ensure_ascii=False)}"
    for name, entry in inner.items():
        yield from toml_lines(entry, f"{path}.{_key(name)}" if path else _key(name))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, flags=re.ASCII) else json.dumps(name, ensure_ascii=False)
