"""What a completion's ids say about it, and the error for ids that another tokenizer made."""

from __future__ import annotations

from typing import Any

from lab.corpora import degeneration
from lab.corpora.completions_file import Completion
from lab.errors import UserError

REASONING_OPENS, REASONING_CLOSES = "<think>", "</think>"


def answer_text(completion: str) -> str:
    """What follows the reasoning; nothing if it was never closed."""
    return completion.partition(REASONING_CLOSES)[2]


def answer_start(ids: tuple[int, ...], templated_prompt: str, tokenizer: Any) -> int:
    """Index of the answer's first token: 0, or behind the reasoning that the prompt's end opened."""
    if not templated_prompt.rstrip().endswith(REASONING_OPENS):
        return 0
    closing = tokenizer.convert_tokens_to_ids(REASONING_CLOSES)
    return ids.index(closing) + 1 if closing in ids else len(ids)


def flags_of(entry: Completion, special: frozenset[int]) -> tuple[str, ...]:
    """All flags of a completion, recomputed from its ids and texts.

    Args:
        entry: the completion; its own flags are not looked at.
        special: ids that must not occur inside a completion.
    """
    answer = entry.body_ids[entry.answer_start :]
    text = answer_text(entry.completion) if entry.answer_start else entry.completion
    flags = degeneration.text_flags(answer, text, entry.prompt)
    if special.intersection(entry.body_ids):
        flags.add("leak")
    if entry.finish_reason == "length":
        flags.add("truncated")
    if entry.greedy_agreement is not None and degeneration.misses_greedy(entry.greedy_agreement, len(entry.body_ids)):
        flags.add("not_greedy")
    return tuple(sorted(flags))


def another_tokenizer(where: object, detail: str, subject: str) -> UserError:
    """The error for a file that this subject's tokenizer does not reproduce."""
    remedy = f"make your own with `python -m lab complete {subject}`"
    return UserError(f"{where} was made with another tokenizer than that of {subject}: {detail}; {remedy}")
