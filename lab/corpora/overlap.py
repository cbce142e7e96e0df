"""How much two texts have in common, in words: texts of a corpus should be independent of each other."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:'\w+)?")


def words(text: str) -> list[str]:
    """The words in lower case; an apostrophe inside a word belongs to it."""
    return _WORD.findall(text.lower())


def grams(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of `length` words."""
    sequence = words(text)
    return {tuple(sequence[start : start + length]) for start in range(len(sequence) - length + 1)}


def jaccard(first: str, second: str) -> float:
    """Share of the words of either text that both have, each word counted once; 0 if neither has words."""
    a, b = set(words(first)), set(words(second))
    return len(a & b) / len(a | b) if a | b else 0.0
