"""Exercises in a tokenizer's ids: which tokens are given, which are learned, and which are the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.corpora.arithmetic import Worked
from lab.corpora.batches import TokenText
from lab.corpora.rendering import render
from lab.corpora.thinking import Item
from lab.errors import UserError

_QUESTION = "{question}"  #: takes the place of the user's words while the chat template is rendered, once


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        ids: all token ids.
        solution: indices into `ids` of the tokens of the solution, all that is learned.
        results: those of them that hold a digit of a result.
    """

    ids: tuple[int, ...]
    solution: tuple[int, ...]
    results: tuple[int, ...] = ()

    @property
    def text(self) -> TokenText:
        """The exercise with its whole solution as targets."""
        return TokenText(self.ids, self.solution)


def worked_exercises(tokenizer: Any, worked: Iterable[Worked]) -> list[Exercise]:
    """Word problems without a chat template, which would double their length.

    Args:
        tokenizer: a fast Transformers tokenizer; it adds the start token if that is its default.
        worked: problems written out.

    Raises:
        UserError: a token holds both the end of what is given and the beginning of the solution.
    """
    problems = list(worked)
    encoded = tokenizer([one.text for one in problems], return_offsets_mapping=True)
    found = []
    for one, ids, offsets in zip(problems, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        solution = tuple(i for i, (start, stop) in enumerate(offsets) if stop > one.solution_start and stop > start)
        if offsets[solution[0]][0] < one.solution_start:
            raise UserError("this tokenizer joins the word `Answer:` to what follows it; the task cannot be put to it")
        results = tuple(i for i in solution if _overlaps(offsets[i], one.results))
        found.append(Exercise(tuple(ids), solution, results))
    return found


def thinking_exercises(tokenizer: Any, system_message: str, items: Sequence[Item]) -> list[Exercise]:
    """Thinking items in the tokenizer's chat template; the completion and the end token are learned."""
    before, after = render(tokenizer, "chat", system_message, _QUESTION).text.split(_QUESTION)
    prompts = tokenizer([before + item.question + after for item in items], add_special_tokens=False)["input_ids"]
    completions = tokenizer([item.completion for item in items], add_special_tokens=False)["input_ids"]
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = (*prompt, *completion, tokenizer.eos_token_id)
        found.append(Exercise(ids, tuple(range(len(prompt), len(ids)))))
    return found


def _overlaps(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(span[0] < stop and span[1] > start for start, stop in others)
