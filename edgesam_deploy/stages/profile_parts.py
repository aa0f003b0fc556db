"""Which parts of a network are told apart: the stages of an encoder, and the two halves of a decoder.

Found in the module tree alone, so that a new architecture needs nothing here.
"""

from __future__ import annotations

from torch import nn

from edgesam_deploy.measure.profile import DECODER, PROMPTS

# Fewer children than this are no division: the heaviest is looked into.
FEWEST = 3
# A row of blocks is taken apart if it holds at least this share of the parameters around it.
_SHARE = 0.25
_ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def stages(encoder: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """The stages of an encoder by their path in it, in order: patch_embed, layers.0, …, neck.

    Its children that have parameters; a heavy row of blocks among them becomes its blocks. A child with more than half
    of the parameters is divided in the same way, and so is the heaviest where there are fewer than ``FEWEST``; but not
    one of several that are alike, which are stages already.
    """
    children = {f"{path}{name}": child for name, child in encoder.named_children() if weight(child)}
    if not children:
        return {}
    found: dict[str, nn.Module] = {}
    heaviest = max(children, key=lambda name: weight(children[name]))
    for name, child in children.items():
        share = weight(child) / weight(encoder)
        alike = sum(type(other) is type(child) for other in children.values())
        few = name == heaviest and len(children) < FEWEST
        if alike >= FEWEST:
            inner = {}
        elif few or (share > 0.5 and not isinstance(child, _ROWS)):
            inner = stages(child, f"{name}.")
        else:
            inner = _blocks(name, child) if share >= _SHARE else {}
        found |= inner or {name: child}
    return found


def _blocks(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """The members of a row of blocks; nothing for anything else, a row of single layers included."""
    if not isinstance(module, _ROWS) or not any(len(list(child.children())) for child in module.children()):
        return {}
    return {f"{name}.{inner}": child for inner, child in module.named_children() if weight(child)}


def halves(decoder: nn.Module) -> dict[str, nn.Module]:
    """Prompt encoder and mask decoder of an exported decoder, each holding all modules on a path of its name.

    Without modules of the first, all is the mask decoder.
    """
    found: dict[str, nn.ModuleList] = {}
    for part in (PROMPTS, DECODER):
        inside = [m for name, m in decoder.named_modules() if name.rpartition(".")[2] == part]
        if inside:
            found[part] = nn.ModuleList(inside)
    return {**found} if PROMPTS in found else {DECODER: decoder}


def weight(module: nn.Module) -> int:
    """Parameters of a module, elements."""
    return sum(parameter.numel() for parameter in module.parameters())
