"""Decoders with other modules in the places of their norms; nothing of the model is copied or written to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab.corpora.batches import TokenBatch
from lab.normalization.replacements import Sink, Tap
from lab.normalization.sites import FINAL, Norm, Norms
from lab.residual.executor import Variant
from lab.residual.programs import Program, Step
from lab.subjects.anatomy import Decoder
from lab.subjects.calls import Captured

#: what takes a norm's place
Rule = Callable[[Norm], nn.Module]


def with_modules(module: nn.Module, others: Mapping[str, nn.Module]) -> nn.Module:
    """A module that shares everything with the given one but the submodules at some paths.

    Args:
        module: left as it is; parameters are shared, not copied.
        others: attribute path inside the module -> what stands there instead.
    """
    clone = copy.copy(module)
    # The shallow copy shares these dictionaries with the original; hooks set on one must not run on the other.
    for name in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
        object.__setattr__(clone, name, copy.copy(getattr(module, name)))
    nested: dict[str, dict[str, nn.Module]] = {}
    for path, other in others.items():
        child, _, rest = path.partition(".")
        if not rest:
            clone._modules[child] = other
        else:
            nested.setdefault(child, {})[rest] = other
    for child, inner in nested.items():
        clone._modules[child] = with_modules(module.get_submodule(child), inner)
    return clone


@dataclass(frozen=True)
class Renormed:
    """A decoder with some of its norms replaced.

    Attributes:
        decoder: the model under study.
        norms: its norms.
        roles: whose norms are replaced, in all layers; `final` among them is the norm before the head.
        rule: by what.
    """

    decoder: Decoder
    norms: Norms
    roles: tuple[str, ...]
    rule: Rule

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its norms replaced; shares all other weights."""
        own = self.norms.layers[index]
        others = {own[role].path: self.rule(own[role]) for role in self.roles if role in own}
        return with_modules(self.decoder.layers[index], others) if others else self.decoder.layers[index]

    def readable(self) -> Decoder:
        """The decoder as readouts need it, with its final norm replaced where that is asked for."""
        if FINAL not in self.roles:
            return self.decoder
        other = copy.copy(self.decoder)
        other.final_norm = self.rule(self.norms.final)
        return other

    def program(self, name: str, layers: Sequence[int] | None = None) -> tuple[dict[str, Variant], Program]:
        """The variants of some layers, None for all, and the program of the whole model with them."""
        chosen = range(self.decoder.n_layers) if layers is None else layers
        variants = {f"{name} {index}": Variant(self.layer(index), index) for index in chosen}
        steps = (Step(index, f"{name} {index}" if index in chosen else None) for index in range(self.decoder.n_layers))
        return variants, tuple(steps)


def walk(
    decoder: Decoder, batch: TokenBatch, layer_of: Callable[[int], nn.Module], captured: Captured | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Outputs [B, T, d] of one layer after the other, layer l being `layer_of(l)`; gradients flow if they are on.

    `layer_of(l)` is called when the layers before it have run, so it may depend on what they collected.
    """
    captured = captured or decoder.capture(batch.ids)
    state = captured.entry
    for index in range(decoder.n_layers):
        state = captured.apply(layer_of(index), state, index, 1)
        yield index, state


def tapped(decoder: Decoder, norms: Norms, index: int, sink: Sink, rule: Rule | None = None) -> nn.Module:
    """A decoder layer whose norms tell a sink what they are given and return; `rule` replaces them as well."""
    layer, own = decoder.layers[index], norms.layers[index]
    taps = {
        norm.path: Tap(rule(norm) if rule else layer.get_submodule(norm.path), role, sink) for role, norm in own.items()
    }
    return with_modules(layer, taps)


def real_positions(batch: TokenBatch) -> Tensor:
    """Which positions of a batch are tokens and no padding [B, T]."""
    place = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return place < batch.lengths.to(place.device)[:, None]
