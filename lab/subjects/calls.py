"""The arguments with which a model calls its decoder layers, and how they are replayed for many states at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: positional and keyword arguments of a layer, without the hidden state
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class PerRow:
    """An argument that differs between the rows of a batch; `axis` is its batch axis."""

    tensor: Tensor
    axis: int


@dataclass(frozen=True)
class Captured:
    """One batch on its way into the decoder.

    The arguments belong to the layer, not to the slot: a layer that runs elsewhere in a program takes
    its own mask and its own rotary embedding along.

    Attributes:
        entry: residual stream before the first layer [B, T, d].
        recorded: arguments of each layer; those that depend on the row are `PerRow`, all others serve any
            number of rows.
    """

    entry: Tensor
    recorded: tuple[Call, ...]

    @property
    def calls(self) -> tuple[Call, ...]:
        """Arguments of each layer for the batch itself, without the hidden state."""
        return tuple(self.call(layer, 1) for layer in range(len(self.recorded)))

    def call(self, layer: int, copies: int) -> Call:
        """Arguments of a layer for `copies` states of the batch, stacked [k, B, ...] -> [k * B, ...]."""
        args, kwargs = mapped(lambda leaf: _tiled(leaf, copies), self.recorded[layer])
        return args, kwargs

    def apply(self, module: Callable[..., object], states: Tensor, layer: int, copies: int) -> Tensor:
        """What a module returns for `copies` states, stacked [k * B, T, d], with the layer's arguments."""
        args, kwargs = self.call(layer, copies)
        return hidden_of(module(states, *args, **kwargs))

    def unpacked(self, states: Tensor) -> Tensor:
        """States [k, B, T, d] as they are; see `lab.subjects.token_prefix` for others."""
        return states


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a layer returned: a tensor, or a tuple that begins with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def row_independent(call: Call, single: Call) -> Call:
    """Arguments of B rows with those that are alike for all rows cut down to one row, which broadcasts.

    Args:
        call: as captured for B rows.
        single: as captured for the first row alone. A tensor whose size differs between the two has a
            batch axis there; if it holds the same values in every row, the single row is kept.
    """
    args, kwargs = mapped(_joined, call, single)
    return args, kwargs


def may_depend_on_row(calls: Sequence[Call], rows: int) -> bool:
    """Whether arguments captured for B rows may depend on the row: an axis or a list has B entries, or a multiple.

    Multiples count, since other axes, such as the heads, may be folded into that of the rows.
    """
    return rows > 1 and any(size % rows == 0 for call in calls for leaf in call for size in _sizes(leaf))


def _sizes(nested: Any) -> Iterator[int]:
    """Lengths of the axes of tensors and of the lists in nested arguments."""
    if isinstance(nested, Tensor):
        yield from nested.shape
    elif isinstance(nested, (tuple, list, dict)):
        if nested and not isinstance(nested, dict):
            yield len(nested)
        for item in nested.values() if isinstance(nested, dict) else nested:
            yield from _sizes(item)


def _joined(many: Any, one: Any) -> Any:
    if not isinstance(many, Tensor) or not isinstance(one, Tensor):
        return many
    if many.shape == one.shape or bool((many == one).all()):
        return one
    return PerRow(many, next(axis for axis, (m, o) in enumerate(zip(many.shape, one.shape, strict=True)) if m != o))


def _tiled(leaf: Any, copies: int) -> Any:
    if not isinstance(leaf, PerRow):
        return leaf
    repeats = [1] * leaf.tensor.dim()
    repeats[leaf.axis] = copies
    return leaf.tensor.repeat(repeats) if copies > 1 else leaf.tensor


def mapped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply `function` to the leaves of equally nested tuples, lists and dicts."""
    if isinstance(first, dict):
        return {key: mapped(function, value, *(other[key] for other in others)) for key, value in first.items()}
    if isinstance(first, (tuple, list)):
        parts = [mapped(function, *items) for items in zip(first, *others, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return function(first, *others)
