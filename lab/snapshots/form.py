"""The form of a snapshot: what must be true of a parsed file before anything is read from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: whole numbers beyond are no label and no value of ours, and no array holds them
LARGEST = 2**63


def fault(content: Any) -> str | None:
    """Which part of a snapshot's content is not of the form that is written; None if none."""
    if not isinstance(content, dict):
        return "numbers"
    for name in ("numbers", "bands"):
        entries = content.get(name, {})
        if not isinstance(entries, dict):
            return name
        wrong = _wrong_entry(entries, aligned=name == "numbers")
        if wrong is not None:
            return f"{name} ({wrong})"
    verdicts = content.get("verdicts", {})
    if not isinstance(verdicts, dict):
        return "verdicts"
    strange = next((key for key, entry in verdicts.items() if not _is_verdict(entry)), None)
    if strange is not None:
        return f"verdicts ({strange})"
    if content.get("numbers"):
        names = ("experiment", "subject", "condition")
        missing = next((name for name in names if not isinstance(content.get(name), str)), None)
        return missing or (None if isinstance(content.get("provenance"), dict) else "provenance")
    return None


def _wrong_entry(entries: Mapping[str, Any], aligned: bool) -> str | None:
    """The first variable that is not whole or, where they are to be aligned, labels a dimension otherwise than another.

    Aligning variables with other labels would fill the gaps with NaN.
    """
    labels: dict[str, list[Any]] = {}
    for name, entry in entries.items():
        if not (isinstance(entry, dict) and _is_variable(entry)):
            return name
        for dim, values in entry["coords"].items():
            if aligned and labels.setdefault(dim, values) != values:
                return f"{name}, which labels {dim} otherwise"
    return None


def _is_variable(entry: dict[str, Any]) -> bool:
    unit, dims, coords, values = (entry.get(name) for name in ("unit", "dims", "coords", "values"))
    if not (isinstance(unit, str) and isinstance(dims, list) and isinstance(coords, dict) and isinstance(values, list)):
        return False
    if not all(isinstance(dim, str) for dim in dims) or sorted(dims) != sorted(coords) or len(set(dims)) < len(dims):
        return False
    if not all(isinstance(labels, list) and _are_labels(labels) for labels in coords.values()):
        return False
    return len(values) == math.prod(map(len, coords.values())) and all(map(_is_value, values))


def _are_labels(labels: list[Any]) -> bool:
    """All text, or all finite numbers."""
    texts = sum(isinstance(label, str) for label in labels)
    return texts == len(labels) or (texts == 0 and all(_is_number(label) and math.isfinite(label) for label in labels))


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool)) or _is_number(value)


def _is_simple(value: Any, depth: int = 3) -> bool:
    """A value, or lists of values, so many deep."""
    if isinstance(value, list):
        return depth > 0 and all(_is_simple(part, depth - 1) for part in value)
    return _is_value(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not (isinstance(value, int) and abs(value) >= LARGEST)


def _is_verdict(entry: Any) -> bool:
    """Verdict in words; what was measured and needed in words, numbers or lists of them, support a number or null."""
    if not (isinstance(entry, dict) and isinstance(entry.get("verdict"), str)):
        return False
    support = entry.get("support")
    simple = all(map(_is_simple, entry.values()))
    return simple and (support is None or (_is_number(support) and not isinstance(support, bool)))
