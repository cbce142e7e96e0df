"""The file `completions.json`: what one subject answered to a prompt set, and under which settings.

    {format, config: {...}, completions: [{id, category, prompt, templated_prompt, completion, finish_reason,
     flags, user_span, answer_start, greedy_agreement, loss, prompt_token_ids, completion_token_ids}, ...]}

`completion_token_ids` holds the end-of-turn id where generation stopped by itself; `completion` does not.
Every id list is one line, so that a changed answer shows as a changed line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lab import files
from lab.corpora import degeneration
from lab.corpora.fields import Fields

FORMAT = "dl-findings completions 1"
FINISH_REASONS = ("stop", "length", "cut")


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        id: the prompt's id.
        category: the prompt's category.
        prompt: the user's words.
        templated_prompt: the rendered prompt, special tokens included.
        completion: the answer's text, special tokens left out.
        finish_reason: `stop` (end token), `length` (token limit), or `cut` (shortened afterwards, see `plain_answer`).
        flags: see `lab.corpora.degeneration`.
        user_span: start and stop of the tokens of the user's words inside `prompt_token_ids`.
        answer_start: index into `completion_token_ids` where the answer begins; more than 0 only after reasoning.
        greedy_agreement: share of the completion's tokens that are the model's argmax; None if not determined.
        loss: mean loss of the completion's tokens [nat/token]; None if not determined.
        prompt_token_ids: ids of `templated_prompt`.
        completion_token_ids: ids of the answer, with the end token where there is one.
    """

    id: str
    category: str
    prompt: str
    templated_prompt: str
    completion: str
    finish_reason: str
    flags: tuple[str, ...]
    user_span: tuple[int, int]
    answer_start: int
    greedy_agreement: float | None
    loss: float | None
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]

    @property
    def end_id(self) -> int | None:
        """The end token, if the model set one."""
        return self.completion_token_ids[-1] if self.finish_reason == "stop" else None

    @property
    def body_ids(self) -> tuple[int, ...]:
        """The completion's ids without the end token."""
        return self.completion_token_ids[:-1] if self.finish_reason == "stop" else self.completion_token_ids


@dataclass(frozen=True)
class CompletionsFile:
    """Settings and answers.

    Attributes:
        settings: what the answers depend on; see `lab.corpora.completions`.
        system_message: the system message of all prompts; None if the file does not say.
        completions: one per prompt, in the order of the prompts.
    """

    settings: Mapping[str, Any]
    system_message: str | None
    completions: tuple[Completion, ...]


def write(path: Path, content: CompletionsFile) -> None:
    """Write the file, whole or not at all."""
    config = {
        **content.settings,
        "system_message": content.system_message,
        "total_prompt_tokens": sum(len(entry.prompt_token_ids) for entry in content.completions),
        "total_completion_tokens": sum(len(entry.completion_token_ids) for entry in content.completions),
    }
    entries = ",\n".join(_entry_text(asdict(entry)) for entry in content.completions)
    head = json.dumps({"format": FORMAT, "config": config}, indent=2, ensure_ascii=False)
    files.write_text(path, f'{head.removesuffix("}").rstrip()},\n  "completions": [\n{entries}\n  ]\n}}\n')


def read(path: Path) -> CompletionsFile:
    """Read a file of our own format.

    Raises:
        UserError: unreadable, truncated, of another schema, or contradicting itself.
    """
    return parse(files.read_json(path, "completions file"), path)


def parse(content: Any, path: Path) -> CompletionsFile:
    """The same, of a file that is already parsed; `path` names it in errors."""
    top = Fields(content, f"completions file {path}")
    top.known("format", "config", "completions")
    if top.text("format") != FORMAT:
        raise top.wrong("format", f"is {top.text('format')!r}, not {FORMAT!r}; make the file again")
    config = top.object("config")
    entries = tuple(_entry(entry) for entry in top.objects("completions", "entry"))
    _check_sums(config, entries)
    settings = dict(top.mapping("config"))
    message = settings.pop("system_message", None) and config.text("system_message")
    for total in ("total_prompt_tokens", "total_completion_tokens"):
        settings.pop(total)
    return CompletionsFile(settings, message, entries)


def check_unique(entries: tuple[Completion, ...], where: Fields) -> None:
    """Refuse a file without answers, or with two of one id."""
    ids = [entry.id for entry in entries]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice or not ids:
        raise where.wrong("completions", f"holds {twice[0]!r} twice" if twice else "is empty")


def _entry(entry: Fields) -> Completion:
    entry.known(*(field.name for field in fields(Completion)))
    reason = entry.text("finish_reason")
    if reason not in FINISH_REASONS:
        raise entry.wrong("finish_reason", f"is {reason!r}; it must be one of {', '.join(FINISH_REASONS)}")
    completion = Completion(
        id=entry.filled("id"),
        category=entry.filled("category"),
        prompt=entry.filled("prompt"),
        templated_prompt=entry.text("templated_prompt"),
        completion=entry.text("completion"),
        finish_reason=reason,
        flags=_flags(entry),
        user_span=_span(entry),
        answer_start=entry.integer("answer_start"),
        greedy_agreement=entry.share("greedy_agreement") if "greedy_agreement" in entry else None,
        loss=_loss(entry) if "loss" in entry else None,
        prompt_token_ids=entry.ids("prompt_token_ids"),
        completion_token_ids=entry.ids("completion_token_ids"),
    )
    if reason == "stop" and not completion.completion_token_ids:
        raise entry.wrong("completion_token_ids", "is empty, but the answer is said to have ended with an end token")
    if completion.answer_start > len(completion.body_ids):
        raise entry.wrong("answer_start", "lies behind the completion")
    return completion


def _flags(entry: Fields) -> tuple[str, ...]:
    flags = entry.texts("flags")
    for flag in flags:
        if flag not in degeneration.FLAGS:
            raise entry.wrong("flags", f"holds {flag!r}; known are {', '.join(degeneration.FLAGS)}")
    return flags


def _loss(entry: Fields) -> float:
    loss = entry.number("loss")
    if loss < 0:
        raise entry.wrong("loss", f"is {loss:g}; a cross-entropy is 0 or more")
    return loss


def _span(entry: Fields) -> tuple[int, int]:
    span, length = entry.ids("user_span"), len(entry.ids("prompt_token_ids"))
    if len(span) != 2 or not span[0] < span[1] <= length:
        raise entry.wrong("user_span", f"must be a start and a stop within the {length} prompt tokens")
    return span[0], span[1]


def _check_sums(config: Fields, entries: tuple[Completion, ...]) -> None:
    check_unique(entries, config)
    sums = {
        "total_prompt_tokens": sum(len(entry.prompt_token_ids) for entry in entries),
        "total_completion_tokens": sum(len(entry.completion_token_ids) for entry in entries),
    }
    for name, total in sums.items():
        if config.integer(name) != total:
            raise config.wrong(name, f"is {config.integer(name)}, but the entries hold {total}; make the file again")


def _entry_text(entry: dict[str, Any]) -> str:
    told = {name: json.dumps(value, ensure_ascii=False) for name, value in entry.items() if value is not None}
    return "    {\n" + ",\n".join(f'      "{name}": {value}' for name, value in told.items()) + "\n    }"
