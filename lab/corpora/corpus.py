"""The corpus of a subject: prompts and the subject's own greedy completions, fit to be measured on.

    targets of a text with P prompt ids and T ids in all: t = P .. T - 1, predicted from position t - 1.

The end token is no target unless asked for. Averages run over novel tokens: what the model copies
from its own loop says nothing about what it knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.corpora import degeneration, limits, reading
from lab.corpora.completions_file import Completion

if TYPE_CHECKING:
    from lab.corpora.batches import TokenText
    from lab.subjects.catalog import Facts


@dataclass(frozen=True)
class Text:
    """One prompt with its completion.

    Attributes:
        id: the prompt's id.
        category: the prompt's category.
        prompt_ids: ids of the rendered prompt, P of them.
        completion_ids: ids of the completion without end token.
        user_span: start and stop of the tokens of the user's own words inside `prompt_ids`.
        novel: per completion token, whether the 8-gram that ends here is new in the completion.
        flags: warnings (`echo`, `truncated`); texts with rejecting flags do not enter a corpus.
        answer_start: index into `completion_ids` of the first token of the answer; more than 0 only after reasoning.
        end_id: the end token, where the model set one.
        greedy_agreement: share of completion tokens that are the model's argmax; None if not determined.
        loss: mean loss of the completion tokens [nat/token]; None if not determined.
    """

    id: str
    category: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    user_span: tuple[int, int]
    novel: tuple[bool, ...]
    flags: tuple[str, ...] = ()
    answer_start: int = 0
    end_id: int | None = None
    greedy_agreement: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Corpus:
    """The texts of one subject.

    Attributes:
        subject: catalog name.
        texts: in an order of which any prefix is balanced over categories.
        system_message: the one of all prompts; None if the file does not say.
        settings: generator, dtype, versions, ...; part of the digest.
        rejected: id -> flags of the completions that are left out.
        categories: all categories of the file, also of what is left out.
    """

    subject: str
    texts: tuple[Text, ...]
    system_message: str | None
    settings: Mapping[str, Any]
    rejected: Mapping[str, tuple[str, ...]]
    categories: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the ids and the settings; neither the file's layout nor what was rejected counts."""
        names = ("id", "category", "prompt_ids", "completion_ids", "user_span", "answer_start", "end_id")
        texts = [[getattr(text, name) for name in names] for text in self.texts]
        content = {"subject": self.subject, "texts": texts, "settings": dict(self.settings)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def prefix(self, n: int) -> Corpus:
        """The corpus of the first n texts, balanced over categories."""
        return replace(self, texts=self.texts[:n])

    def problems(self, *, score_repeated: bool = False) -> list[str]:
        """Why claims cannot be judged on this corpus; empty if they can.

        Args:
            score_repeated: whether tokens of repeated 8-grams are to be scored too.
        """
        return limits.problems(self, score_repeated)


def completion_slice(prompt_tokens: int, total_tokens: int) -> slice:
    """Indices of the targets of a text: its completion tokens, each once."""
    return slice(prompt_tokens, total_tokens)


def token_text(
    text: Text,
    *,
    max_tokens: int | None = None,
    stride: int = 1,
    score_repeated: bool = False,
    score_end_token: bool = False,
) -> TokenText:
    """The text's ids with the targets of its completion.

    Args:
        text: P prompt ids and a completion.
        max_tokens: cut the completion after so many tokens; the end token then goes, too.
        stride: score every so manieth of the targets.
        score_repeated: score tokens of repeated 8-grams too, as the published runs did.
        score_end_token: score the end token, where the model set one and the completion is not cut.
    """
    from lab.corpora.batches import TokenText

    body = text.completion_ids[:max_tokens]
    targets = [target for target in scored_targets(text, score_repeated) if target < len(text.prompt_ids) + len(body)]
    ids = text.prompt_ids + body
    if score_end_token and text.end_id is not None and len(body) == len(text.completion_ids):
        targets.append(len(ids))
        ids += (text.end_id,)
    return TokenText(ids, tuple(targets[::stride]))


def user_text(text: Text) -> tuple[int, ...]:
    """Targets of the user's own words: indices into the prompt's ids, each with a predecessor."""
    start, stop = text.user_span
    return tuple(range(max(start, 1), stop))


def balanced(texts: list[Text]) -> tuple[Text, ...]:
    """The texts, category by category in turn, so that any prefix is balanced; the order within a category stays."""
    turn: dict[str, count[int]] = {}
    category_order = {category: place for place, category in enumerate(dict.fromkeys(text.category for text in texts))}
    keyed = [(next(turn.setdefault(text.category, count())), category_order[text.category]) for text in texts]
    return tuple(texts[index] for index in sorted(range(len(texts)), key=keyed.__getitem__))


def load_corpus(facts: Facts, tokenizer: Any | None, path: Path | None = None) -> Corpus:
    """The corpus of a subject.

    Args:
        facts: the subject's catalog entry.
        tokenizer: the subject's tokenizer. None leaves out the checks that need one, which is enough
            for the corpus of a record that was measured before.
        path: a completions file, ours or of hivaze/dl-experiments; default: the committed one.

    Raises:
        UserError: no such file, unreadable, of another schema, or made with another tokenizer.
    """
    content = reading.read_completions(facts, tokenizer, path)
    fit = [_text(entry) for entry in content.completions if not degeneration.rejected(entry.flags)]
    unfit = {entry.id: entry.flags for entry in content.completions if degeneration.rejected(entry.flags)}
    categories = tuple(dict.fromkeys(entry.category for entry in content.completions))
    return Corpus(facts.name, balanced(fit), content.system_message, content.settings, unfit, categories)


def _text(entry: Completion) -> Text:
    return Text(
        id=entry.id,
        category=entry.category,
        prompt_ids=entry.prompt_token_ids,
        completion_ids=entry.body_ids,
        user_span=entry.user_span,
        novel=degeneration.novel(entry.body_ids),
        flags=entry.flags,
        answer_start=entry.answer_start,
        end_id=entry.end_id,
        greedy_agreement=entry.greedy_agreement,
        loss=entry.loss,
    )


def scored_targets(text: Text, score_repeated: bool = False) -> list[int]:
    """Indices of the completion tokens that count, in the ids of prompt and completion joined."""
    targets = range(len(text.prompt_ids) + len(text.completion_ids))
    targets = targets[completion_slice(len(text.prompt_ids), len(targets))][text.answer_start :]
    return [target for target in targets if score_repeated or text.novel[target - len(text.prompt_ids)]]
