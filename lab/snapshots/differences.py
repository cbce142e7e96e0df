"""What differs between two sets of snapshots: numbers, verdicts, and whole experiments that came or went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lab.snapshots import drift, provenance
from lab.snapshots.addresses import Address, natural
from lab.snapshots.drift import Move
from lab.snapshots.labels import Label

Status = Literal["both", "appeared", "vanished"]
#: address -> content of a snapshot; of a verdicts file, content without numbers
Snapshots = Mapping[Address, dict[str, Any]]


@dataclass(frozen=True)
class VerdictMove:
    """A claim's verdict in one place, before and after; empty where there is none.

    Attributes:
        key: the claim's id and its place: `T-2.2 L07`.
        before, after: `verdict`, and as far as known `measured`, `threshold` and `support`.
    """

    key: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def claim(self) -> str:
        """The claim's id."""
        return self.key.partition(" ")[0]

    @property
    def where(self) -> str:
        """Layer, matrix, ...; empty if the claim has one place."""
        return self.key.partition(" ")[2]

    @property
    def verdicts(self) -> tuple[str, str]:
        """The two verdicts in words."""
        return self.before.get("verdict", "no verdict"), self.after.get("verdict", "no verdict")


@dataclass(frozen=True)
class Difference:
    """What differs between two snapshots of one experiment on one subject.

    Attributes:
        address: subject, condition, experiment.
        status: whether the snapshot is in both sets, or in one only.
        headline: how much moved, in one line.
        moves: numbers beyond their tolerance, the farthest first.
        verdicts: verdicts that moved.
        changed: what else changed: weights, corpus, settings, device, libraries.
    """

    address: Address
    status: Status
    headline: str
    moves: tuple[Move, ...] = ()
    verdicts: tuple[VerdictMove, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def is_drift(self) -> bool:
        """Whether a number or verdict moved, or a whole snapshot came or went; provenance alone is none."""
        return bool(self.status != "both" or self.moves or self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """In plain types, as it travels between processes and into JSON."""
        moves = [asdict(move) | {"labels": [list(label) for label in move.labels]} for move in self.moves]
        return asdict(self) | {"moves": moves, "changed": list(self.changed)}


def from_dict(content: dict[str, Any]) -> Difference:
    """The inverse of `as_dict`."""
    parts = {
        "address": Address(**content["address"]),
        "moves": tuple(
            Move(**move | {"labels": tuple(Label(*label) for label in move["labels"])}) for move in content["moves"]
        ),
        "verdicts": tuple(VerdictMove(**verdict) for verdict in content["verdicts"]),
        "changed": tuple(content["changed"]),
    }
    return Difference(**content | parts)


def compare(before: Snapshots, after: Snapshots) -> list[Difference]:
    """All snapshots of two sets, in the order of their addresses."""
    addresses = _in_order(before.keys() | after.keys())
    return [_compared(address, before.get(address), after.get(address)) for address in addresses]


def of_numbers(address: Address, before: dict[str, Any], after: dict[str, Any]) -> Difference:
    """Two snapshots' numbers and provenance."""
    found = drift.moves(before, after)
    changed = provenance.changes(before.get("provenance", {}), after.get("provenance", {}))
    return Difference(address, "both", drift.headline(found, before, after), tuple(found), (), tuple(changed))


def merged(
    numbers: Mapping[Address, Difference], verdicts: Mapping[Address, Sequence[VerdictMove]]
) -> list[Difference]:
    """Differences of numbers and of verdicts, found apart, by address."""
    nothing = "the numbers were not compared"
    return [
        with_verdicts(numbers.get(address, Difference(address, "both", nothing)), verdicts.get(address, ()))
        for address in _in_order(numbers.keys() | verdicts.keys())
    ]


def with_verdicts(difference: Difference, verdicts: Sequence[VerdictMove]) -> Difference:
    """The same with these verdicts beside its own."""
    every = sorted((*difference.verdicts, *verdicts), key=lambda move: natural(move.key))
    return replace(difference, verdicts=tuple(every))


def in_json(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """As JSON holds it: values that are no number are text or null, an infinite share is null."""
    return [_plain(difference.as_dict()) for difference in found]


def _in_order(addresses: Iterable[Address]) -> list[Address]:
    return sorted(addresses, key=lambda each: (each.subject, each.condition, each.experiment))


def _compared(address: Address, before: dict[str, Any] | None, after: dict[str, Any] | None) -> Difference:
    if before is None or after is None:
        content = before or after or {}
        counts = f"{len(content.get('numbers', {}))} quantities, {len(content.get('verdicts', {}))} verdicts"
        return Difference(address, "appeared" if before is None else "vanished", counts)
    old, new = before.get("verdicts", {}), after.get("verdicts", {})
    moved = [VerdictMove(key, old.get(key, {}), new.get(key, {})) for key in old.keys() | new.keys()]
    moved = [move for move in moved if move.before.get("verdict") != move.after.get("verdict")]
    return with_verdicts(of_numbers(address, before, {"experiment": address.experiment} | after), moved)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
