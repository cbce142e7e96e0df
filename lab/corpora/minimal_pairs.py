"""Minimal pairs: two prompts that differ in one span of words and so have different answers.

A pair serves activation patching: what the clean run knows is put into the corrupted run, position by
position. That needs both prompts to have the same tokens outside the span and as many inside it, the
span to lie before the last position (where the answer is read), and answers of one token each. Whether
that is so depends on the tokenizer; the words alone are checked when the file is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.corpora.fields import Fields
from lab.errors import UserError

FAMILIES = ("factual", "linguistic", "arithmetic")

_WORD = re.compile(r"\w+|[^\w\s]")  #: a sign is a word of its own: sums are written without blanks


@dataclass(frozen=True)
class MinimalPair:
    """Two prompts to be continued, without chat template, and their answers.

    Attributes:
        id: stable name.
        family: one of `FAMILIES`.
        clean: a prompt.
        corrupted: the same prompt with another span of words, as many as in `clean`.
        answer: how `clean` goes on: the next token's text, with its leading blank if it has one.
        corrupted_answer: how `corrupted` goes on.
    """

    id: str
    family: str
    clean: str
    corrupted: str
    answer: str
    corrupted_answer: str


@dataclass(frozen=True)
class TokenPair:
    """A minimal pair in one tokenizer's ids.

    Attributes:
        id: name of the minimal pair.
        family: its family.
        clean_ids: token ids of the clean prompt, with the start token if the tokenizer adds one.
        corrupted_ids: as many token ids of the corrupted prompt.
        span: start and stop of the tokens that differ; stop is at most the last position.
        answer: id of the clean prompt's answer.
        corrupted_answer: id of the corrupted prompt's answer.
    """

    id: str
    family: str
    clean_ids: tuple[int, ...]
    corrupted_ids: tuple[int, ...]
    span: tuple[int, int]
    answer: int
    corrupted_answer: int


def default_path() -> Path:
    """The committed file of minimal pairs."""
    return paths.DATA / "minimal_pairs.json"


def load_minimal_pairs(path: Path | None = None) -> list[MinimalPair]:
    """Read a file of minimal pairs.

    Raises:
        UserError: unreadable, truncated, of another schema, an id or a pair twice, or a pair whose
            prompts do not differ in exactly one span of words before the last word.
    """
    path = path or default_path()
    content = Fields(files.read_json(path, "file of minimal pairs"), f"file of minimal pairs {path}")
    content.known("version", "description", "pairs")
    content.integer("version")
    content.text("description")
    entries = content.objects("pairs", "pair")
    pairs = [_pair(entry) for entry in entries]
    if not pairs:
        raise UserError(f"{content.where}: it holds no pairs")
    ids: set[str] = set()
    prompts: set[frozenset[str]] = set()
    for pair, entry in zip(pairs, entries, strict=True):
        both = frozenset((pair.clean, pair.corrupted))
        if pair.id in ids:
            raise entry.wrong("id", f"{pair.id!r} occurs twice")
        if both in prompts:
            raise entry.wrong("clean", "and 'corrupted' are those of another pair too")
        ids.add(pair.id)
        prompts.add(both)
    return pairs


def tokenised(pairs: Sequence[MinimalPair], tokenizer: Any) -> tuple[list[TokenPair], dict[str, str]]:
    """The pairs in a tokenizer's ids, and why others are left out.

    Args:
        pairs: the minimal pairs.
        tokenizer: a Transformers tokenizer; it adds the start token if that is its default.

    Returns:
        The usable pairs, in order, and for every other pair's id the reason in words.
    """
    usable: list[TokenPair] = []
    dropped: dict[str, str] = {}
    for pair in pairs:
        found = _tokenised(pair, tokenizer)
        if isinstance(found, TokenPair):
            usable.append(found)
        else:
            dropped[pair.id] = found
    return usable, dropped


def _pair(entry: Fields) -> MinimalPair:
    names = ("id", "family", "clean", "corrupted", "answer", "corrupted_answer")
    entry.known(*names)
    pair = MinimalPair(**{name: entry.filled(name) for name in names})
    if pair.family not in FAMILIES:
        raise entry.wrong("family", f"is {pair.family!r}; it must be one of {', '.join(FAMILIES)}")
    if pair.answer == pair.corrupted_answer:
        raise entry.wrong("answer", f"is {pair.answer!r}, as 'corrupted_answer' is; nothing tells the prompts apart")
    for name in ("clean", "corrupted"):
        if entry.text(name) != entry.text(name).strip():
            raise entry.wrong(name, "begins or ends with white space; the answer's leading blank belongs to the answer")
    _check_span(entry, _WORD.findall(pair.clean), _WORD.findall(pair.corrupted))
    return pair


def _check_span(entry: Fields, clean: Sequence[str], corrupted: Sequence[str]) -> None:
    """Refuse prompts that do not differ in exactly one span of words before the last."""
    if len(clean) != len(corrupted):
        raise entry.wrong("corrupted", f"has {len(corrupted)} words, but 'clean' has {len(clean)}; they must align")
    differing = [index for index, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]
    if not differing:
        raise entry.wrong("corrupted", "has the words of 'clean'; there is nothing to patch")
    if differing[-1] - differing[0] >= len(differing):
        raise entry.wrong("corrupted", "differs from 'clean' in more than one span of words")
    if differing[-1] == len(clean) - 1:
        raise entry.wrong("corrupted", "differs from 'clean' in the last word, where the answer is read")


def _tokenised(pair: MinimalPair, tokenizer: Any) -> TokenPair | str:
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in (pair.clean, pair.corrupted)]
    answers = []
    for text, ids, answer in zip(
        (pair.clean, pair.corrupted), prompts, (pair.answer, pair.corrupted_answer), strict=True
    ):
        continued = tuple(tokenizer(text + answer)["input_ids"])
        # Only ids that a continuation can have: an answer that merges with the prompt has none of its own.
        if continued[:-1] != ids:
            return f"the answer {answer!r} is not one token behind its prompt"
        answers.append(continued[-1])
    clean, corrupted = prompts
    if len(clean) != len(corrupted):
        return f"the prompts have {len(clean)} and {len(corrupted)} tokens"
    if answers[0] == answers[1]:
        return f"the answers {pair.answer!r} and {pair.corrupted_answer!r} are the same token"
    differing = [index for index, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]
    if not differing:
        return "the prompts are the same tokens"
    if differing[-1] == len(clean) - 1:
        return "the prompts differ in their last token"
    return TokenPair(pair.id, pair.family, clean, corrupted, (differing[0], differing[-1] + 1), answers[0], answers[1])
