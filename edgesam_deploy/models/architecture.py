"""What the project knows of a network beside its code: how it is built, loaded, exported and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from edgesam_deploy.models.graphs import DecoderGraph, EncoderGraph
from edgesam_deploy.models.session import ReferenceDecoder, ReferenceEncoder
from edgesam_deploy.recipe import Recipe

ModuleOf = Callable[[nn.Module, Recipe], nn.Module]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One network family.

    build: a recipe's network with initial weights; its children are image_encoder, prompt_encoder and mask_decoder.
    published_names: a published state dict under this network's names. Names that are its own already pass unchanged;
    unknown ones pass too, and are refused by the strict load that follows.
    encoder_graph, decoder_graph: the modules that are exported, on the contract of the recipe's geometry.
    reference_encoder, reference_decoder: the network's own modules, unchanged, on the same contract: what exports are
    compared with.
    """

    build: Callable[[Recipe], nn.Module]
    published_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    encoder_graph: ModuleOf = EncoderGraph
    decoder_graph: ModuleOf = DecoderGraph
    reference_encoder: ModuleOf = ReferenceEncoder
    reference_decoder: ModuleOf = ReferenceDecoder
