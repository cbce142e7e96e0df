"""Contrastive groups as token ids: sequences, and the pairs of them with their pivot, the first token that differs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from lab.corpora.contrastive_groups import ContrastiveGroups, Group
from lab.corpora.rendering import Rendering, render


@dataclass(frozen=True)
class TokenSequence:
    """A prompt with one forced completion.

    Attributes:
        ids: token ids of both.
        prompt_tokens: how many of them are the prompt's, P.
    """

    ids: tuple[int, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class ContrastivePair:
    """Two completions of one prompt.

    Attributes:
        group: their group.
        a, b: indices into the sequences.
        pivot: first position s at which the two sequences differ, counted from the prompt's start.
        complete_pivots: how many of the two completions end at their pivot (0, 1, 2).
        shared_tokens: completion tokens before the pivot.
    """

    group: Group
    a: int
    b: int
    pivot: int
    complete_pivots: int
    shared_tokens: int

    @property
    def prefix(self) -> str:
        """`immediate` or `shared` as the tokens say, whatever the file's tag."""
        return "shared" if self.shared_tokens else "immediate"


@dataclass(frozen=True)
class TokenGroups:
    """Contrastive groups in one tokenizer's ids.

    Attributes:
        sequences: each once, though several pairs hold it.
        pairs: in the order of the file.
        dropped: why pairs are missing, by family (our format) or group (the source's).
    """

    sequences: tuple[TokenSequence, ...]
    pairs: tuple[ContrastivePair, ...]
    dropped: dict[str, str]


def tokenised(
    content: ContrastiveGroups, tokenizer: Any, frame: str, *, require_complete_pivot: bool = True
) -> TokenGroups:
    """The pairs that this tokenizer allows to compare.

    A pair without pivot, because one sequence is the beginning of the other, is dropped. So is, with
    `require_complete_pivot`, a pair of which one completion goes on behind its pivot: the model's next token there is
    the rest of a word or phrase, and two different rests differ whatever the words mean. In our format, a pair that
    is dropped takes all groups of its family along, so that what is left is matched, and prefixes must be as tagged.
    Style groups are sentences and never end at their pivot.

    Args:
        content: the groups.
        tokenizer: a fast Transformers tokenizer.
        frame: `chat` or `plain`, see `lab.corpora.rendering`.
        require_complete_pivot: False keeps incomplete pivots, as the source does.
    """
    rendered = cache(lambda prompt: render(tokenizer, frame, content.system_message, prompt))
    sequences: dict[TokenSequence, int] = {}
    pairs: list[ContrastivePair] = []
    dropped: dict[str, str] = {}
    for group in content.groups:
        ids = [_sequence(rendered(group.prompt), text, tokenizer, frame) for text in group.completions]
        for first, second in combinations(ids, 2):
            pair = _pair(group, first, second, sequences)
            fault = "one completion is the beginning of the other" if pair is None else None
            if pair is not None:
                fault = _fault(pair, trust_tags=not content.matched, require_complete_pivot=require_complete_pivot)
                pairs += [] if fault else [pair]
            if fault:
                dropped.setdefault(group.family if content.matched else group.id, f"{group.id}: {fault}")
    lost = dropped.keys() if content.matched else ()
    kept = tuple(pair for pair in pairs if pair.group.family not in lost)
    return TokenGroups(tuple(sequences), kept, dropped)


def _fault(pair: ContrastivePair, *, trust_tags: bool, require_complete_pivot: bool) -> str | None:
    group = pair.group
    if require_complete_pivot and group.relationship != "style" and pair.complete_pivots < 2:
        return "a completion goes on behind its pivot token"
    return None if trust_tags or pair.prefix == group.prefix else f"it is {pair.prefix}, not {group.prefix} as tagged"


def _pair(
    group: Group, first: TokenSequence, second: TokenSequence, sequences: dict[TokenSequence, int]
) -> ContrastivePair | None:
    pivot = next((i for i, (x, y) in enumerate(zip(first.ids, second.ids, strict=False)) if x != y), None)
    if pivot is None:
        return None
    a, b = (sequences.setdefault(one, len(sequences)) for one in (first, second))
    complete = sum(pivot == len(one.ids) - 1 for one in (first, second))
    return ContrastivePair(group, a, b, pivot, complete, pivot - first.prompt_tokens)


def _sequence(rendering: Rendering, completion: str, tokenizer: Any, frame: str) -> TokenSequence:
    """Ids of prompt and completion as one string; joined from two where the boundary would merge."""
    behind = completion if frame == "chat" else f" {completion}"  # the plain frame ends in a colon
    ids = tuple(tokenizer(rendering.text + behind, add_special_tokens=frame == "plain")["input_ids"])
    if ids[: len(rendering.ids)] != rendering.ids:
        ids = rendering.ids + tuple(tokenizer(behind, add_special_tokens=False)["input_ids"])
    return TokenSequence(ids, len(rendering.ids))
