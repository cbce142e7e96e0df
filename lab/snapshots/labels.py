"""Where in a variable a number stands, in words: `layer=7`, `pair=284 (first_layer=11, second_layer=23)`.

Dimensions of layers are labelled by the layers themselves. Others are merely numbered (pairs, blocks,
steps), and the record holds variables along them that say which layers an entry is about. They are found
by their form, not by name, so that any experiment's are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

#: dimensions whose labels stand for a depth in the model: its layers, and the states between them
DEPTHS = ("layer", "slot")
#: dimensions whose labels count what another dimension's entries led to: step k is the state after removal k
AFTER = {"step": "removal"}

#: a snapshot's variables by name, see `lab.snapshots.numbers`
Numbers = dict[str, dict[str, Any]]


class Label(NamedTuple):
    """One axis of a number's place: dimension, label, and what the record says the label means."""

    dim: str
    value: Any
    meaning: str = ""

    @property
    def text(self) -> str:
        """`pair=284 (first_layer=11, second_layer=23)`."""
        return f"{self.dim}={self.value}" + (f" ({self.meaning})" if self.meaning else "")


def labels(numbers: Numbers, name: str, indices: Sequence[tuple[int, ...]]) -> list[tuple[Label, ...]]:
    """The labels of some entries of a variable, given by their indices along its axes."""
    axes = [_axis(numbers, name, dim) for dim in numbers[name]["dims"]] if indices else []
    return [tuple(axis[at] for axis, at in zip(axes, index, strict=True)) for index in indices]


def spans(values: Iterable[int]) -> str:
    """Whole numbers in rising order, runs joined: `3, 5-8`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(sorted(set(values))), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _axis(numbers: Numbers, name: str, dim: str) -> list[Label]:
    values = numbers[name]["coords"][dim]
    meanings = [_meaning(numbers, name, dim, value) for value in values] if _is_numbered(dim, values) else []
    return [Label(dim, value, meaning) for value, meaning in zip(values, meanings or [""] * len(values), strict=True)]


def _is_numbered(dim: str, values: list[Any]) -> bool:
    return dim not in DEPTHS and all(isinstance(value, int) for value in values)


def _meaning(numbers: Numbers, name: str, dim: str, value: Any) -> str:
    along = _describing(numbers, name, dim, dim)
    if dim in AFTER:  # the path of another sweep has the same steps, but led along other layers
        stem = f"{name.partition('_')[0]}_"
        along |= {key: at for key, at in _describing(numbers, name, AFTER[dim], dim).items() if key.startswith(stem)}
    return ", ".join(f"{key}={entries[value]}" for key, entries in along.items() if value in entries)


def _describing(numbers: Numbers, name: str, dim: str, drop: str) -> dict[str, dict[Any, Any]]:
    """Variables that say of each entry along `dim` which layers it is about: name -> label -> value."""
    found = {
        other: entry
        for other, entry in numbers.items()
        if other != name and entry["dims"] == [dim] and _names_something(entry)
    }
    return {
        other.removeprefix(f"{drop}_"): dict(zip(entry["coords"][dim], entry["values"], strict=True))
        for other, entry in found.items()
    }


def _names_something(entry: dict[str, Any]) -> bool:
    values = entry["values"]
    is_layer = entry["unit"] == "layer" and all(isinstance(value, int) for value in values)
    return is_layer or all(isinstance(value, str) for value in values)
