"""What changed around a measurement: weights, corpus, settings, device, libraries, instruments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN = 8
#: provenance in the order in which it explains a moved number, with the names that reports use
PROVENANCE = {
    "subject": "weights",
    "corpus": "corpus",
    "corpus_generator": "corpus_generator",
    "settings": "settings",
    "dtype": "dtype",
    "device": "device",
    "processor": "processor",
    "libraries": "libraries",
    "instruments": "instruments",
}
DIGEST_SHOWN = 12


def explanation(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed in the provenance, cut to the first ones where it is much."""
    return cut(changes(before.get("provenance", {}), after.get("provenance", {})))


def cut(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    return list(lines) if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines that say which entries of two provenances differ: weights, corpus, settings, device, libraries, ..."""
    lines: list[str] = []
    places = list(PROVENANCE)
    order = {name: places.index(name) if name in places else len(places) for name in old.keys() | new.keys()}
    for name in sorted(order, key=lambda name: (order[name], name)):
        before, after = old.get(name), new.get(name)
        shown = name if prefix else PROVENANCE.get(name, name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changes(before, after, f"{prefix}{shown}.")
        elif (before, name in old) != (after, name in new):
            lines.append(f"{prefix}{shown}: {_recorded(old, name)} -> {_recorded(new, name)}")
    return lines


def _recorded(entries: dict[str, Any], name: str) -> str:
    if name not in entries:
        return "not recorded"
    text = str(entries[name])
    is_digest = len(text) >= 40 and all(letter in "0123456789abcdef" for letter in text)
    return text[:DIGEST_SHOWN] if is_digest else text
