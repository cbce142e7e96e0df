"""Layer programs: the sequence of decoder layers that a forward pass applies.

Skip, swap, repeat, transplant, replace, shuffle: nearly every intervention on a decoder is the same
thing, another sequence of layers. A program says which; `lab.residual.executor` runs many at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One slot of a layer program.

    Attributes:
        layer: index of the decoder layer, which brings its own call arguments; None leaves the slot empty.
        variant: name of a module that takes the layer's place (a quantized copy, a sibling model's layer);
            None is the layer itself.
        edit: name of an edit of the residual stream before the layer; None leaves the stream as it is.
    """

    layer: int | None
    variant: str | None = None
    edit: str | None = None

    def __post_init__(self) -> None:
        if self.layer is None and self.variant is not None:
            raise ValueError(f"variant {self.variant!r} stands for no layer")

    @property
    def is_identity(self) -> bool:
        """Whether the step leaves the residual stream as it is."""
        return self.layer is None and self.edit is None

    @property
    def is_own(self) -> bool:
        """Whether the step applies a layer of the model under study, or nothing, to the stream as it is."""
        return self.variant is None and self.edit is None


Program = tuple[Step, ...]


def identity(n: int) -> Program:
    """The intact model of n layers."""
    return order(range(n))


def order(layers: Sequence[int] | range) -> Program:
    """These layers in this order; layers that are not named do not run."""
    return tuple(Step(layer) for layer in layers)


def skip(n: int, layers: Collection[int]) -> Program:
    """The model without some layers: the residual stream passes their slots unchanged."""
    _require_layers(n, layers)
    return tuple(Step(None if layer in layers else layer) for layer in range(n))


def swap(n: int, i: int, j: int) -> Program:
    """The model with layers i and j in each other's slot; each keeps its own call arguments."""
    _require_layers(n, (i, j))
    exchanged = {i: j, j: i}
    return order([exchanged.get(layer, layer) for layer in range(n)])


def repeat(n: int, layer: int, times: int) -> Program:
    """The model with one layer applied `times` times in a row, all in all; 0 skips it, 1 is the intact model."""
    _require_layers(n, (layer,))
    return order([*range(layer), *[layer] * times, *range(layer + 1, n)])


def loop_last(n: int, k: int, times: int) -> Program:
    """The model with its last k layers run as a block `times` times, all in all; 1 is the intact model."""
    _require_layers(n, () if k == 0 else (n - k,))
    return order([*range(n - k), *[*range(n - k, n)] * times])


def replace(n: int, layer: int, variant: str) -> Program:
    """The model with a variant in the place of one layer."""
    _require_layers(n, (layer,))
    return tuple(Step(slot, variant if slot == layer else None) for slot in range(n))


def edit_before(n: int, layer: int, edit: str) -> Program:
    """The model with the residual stream edited before one layer; layer n edits what the final norm sees."""
    _require_layers(n + 1, (layer,))
    steps = tuple(Step(slot, edit=edit if slot == layer else None) for slot in range(n))
    return (*steps, Step(None, edit=edit)) if layer == n else steps


def normalised(program: Program) -> Program:
    """The program without steps that do nothing: equal sequences of layers become equal programs."""
    return tuple(step for step in program if not step.is_identity)


def _require_layers(n: int, layers: Collection[int]) -> None:
    outside = [layer for layer in layers if not 0 <= layer < n]
    if outside:
        raise ValueError(f"layer {outside[0]} is outside 0..{n - 1}")
