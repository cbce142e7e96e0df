"""Quantized decoder layers as variants of a layer program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lab.errors import NotApplicable
from lab.residual.executor import Variant
from lab.residual.programs import Program, Step
from lab.subjects.anatomy import Decoder


class WeightMap(Protocol):
    """Takes a matrix to its quantized, dequantized form."""

    @property
    def name(self) -> str:
        """Names the map; equal names mean equal results."""

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The new matrix [out, in] in its own dtype; `place` says which matrix of the model it is."""


def matrices(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a decoder layer by their paths inside it, in the layer's own order.

    Raises:
        NotApplicable: the layer has none, or keeps weights in another form (stacked experts, transposed maps).
    """
    found = {path: module for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
    covered = {id(module.weight) for module in found.values()}
    others = [
        name for name, parameter in layer.named_parameters() if parameter.dim() > 1 and id(parameter) not in covered
    ]
    if not found or others:
        what = f"keeps {others[0]} in another form" if others else "has no linear maps"
        raise NotApplicable(f"a decoder layer {what}; only layers of plain linear maps can be quantized here")
    return found


def label(path: str) -> str:
    """The matrix type of a linear map's path: `mlp.gate_proj` -> `gate_proj`."""
    return path.rpartition(".")[2]


@dataclass(frozen=True)
class Plan:
    """What happens to the matrices of one layer.

    Attributes:
        maps: matrix type -> weight map; types that are not named stay as they are.
    """

    maps: tuple[tuple[str, WeightMap], ...]

    @property
    def name(self) -> str:
        """Equal plans have equal names."""
        return "+".join(f"{matrix}:{weight_map.name}" for matrix, weight_map in self.maps)


class Workshop:
    """Makes quantized layers as programs need them.

    Quantized weights exist only while their layer runs: the executor serves all states that wait for a variant one
    after the other, so one variant's weights are kept, those made last.

    Args:
        decoder: the model under study; its own weights are never written to.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.variants: dict[str, Variant] = {}
        self._made: tuple[str, Any] | None = None
        self.types = tuple(dict.fromkeys(label(path) for path in matrices(decoder.layers[0])))
        for index, layer in enumerate(decoder.layers):
            here = tuple(dict.fromkeys(label(path) for path in matrices(layer)))
            if here != self.types:
                raise NotApplicable(f"layer {index} has the matrices {here}, layer 0 {self.types}; they must be alike")

    def all(self, weight_map: WeightMap) -> Plan:
        """The plan that treats every matrix alike."""
        return Plan(tuple((matrix, weight_map) for matrix in self.types))

    def only(self, matrix: str, weight_map: WeightMap) -> Plan:
        """The plan that treats one matrix type."""
        return Plan(((matrix, weight_map),))

    def step(self, layer: int, plan: Plan | None) -> Step:
        """The layer under a plan; None leaves it as it is."""
        if plan is None:
            return Step(layer)
        own = self.decoder.layers[layer]
        return self.module_step(layer, plan.name, lambda: WithWeights(own, self._weights(layer, plan)))

    def module_step(self, layer: int, name: str, make: Callable[[], Callable[..., Any]]) -> Step:
        """The layer replaced by a module that `make` builds when it is needed."""
        variant = f"layer {layer} {name}"
        if variant not in self.variants:
            self.variants[variant] = Variant(_Lazy(self, variant, make), layer)
        return Step(layer, variant)

    def program(self, plans: Sequence[Plan | None]) -> Program:
        """The model with a plan for every layer."""
        return tuple(self.step(layer, plan) for layer, plan in enumerate(plans))

    def one_layer(self, layer: int, plan: Plan) -> Program:
        """The model with one layer under a plan."""
        return self.program([plan if index == layer else None for index in range(self.decoder.n_layers)])

    def _weights(self, layer: int, plan: Plan) -> dict[str, Tensor]:
        maps = dict(plan.maps)
        with torch.no_grad():
            return {
                f"{path}.weight": maps[label(path)](module.weight.detach(), f"{layer}.{path}")
                for path, module in matrices(self.decoder.layers[layer]).items()
                if label(path) in maps
            }

    def made(self, variant: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The variant's module: the one made last if it is this one, else a new one in its place."""
        if self._made is None or self._made[0] != variant:
            self._made = None  # frees the last one first
            self._made = (variant, make())
        module: Callable[..., Any] = self._made[1]
        return module


@dataclass(frozen=True)
class _Lazy:
    """Stands in a program for a module that is built when the layer runs."""

    workshop: Workshop
    variant: str
    make: Callable[[], Callable[..., Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.workshop.made(self.variant, self.make)(*args, **kwargs)


@dataclass(frozen=True)
class WithWeights:
    """A layer that runs with other weights; the layer itself is not changed."""

    layer: nn.Module
    weights: Mapping[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.layer, dict(self.weights), args, kwargs)
