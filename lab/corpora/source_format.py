"""Completions files of hivaze/dl-experiments (`text_completions/<model>/completions.json`).

They hold the rendered prompts and the ids, the end token included where there is one, but neither a
finish reason nor where the user's words are: both are derived with the subject's tokenizer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.corpora.checks import another_tokenizer, answer_start, flags_of
from lab.corpora.completions_file import Completion, CompletionsFile, check_unique
from lab.corpora.fields import Fields
from lab.corpora.rendering import special_ids, text_span


def parse(parsed: Any, path: Path, tokenizer: Any, subject: str) -> CompletionsFile:
    """Read a parsed file, checking all that it says twice.

    Raises:
        UserError: another schema, a contradiction, or a tokenizer that does not reproduce the ids.
    """
    top = Fields(parsed, f"completions file {path}")
    config = top.object("config")
    entries = top.objects("completions", "entry")
    special = special_ids(tokenizer)
    completions = tuple(_completion(entry, index, tokenizer, special, subject) for index, entry in enumerate(entries))
    check_unique(completions, top)
    sums = {
        "num_prompts": len(entries),
        "total_prompt_tokens": sum(len(entry.prompt_token_ids) for entry in completions),
        "total_completion_tokens": sum(len(entry.completion_token_ids) for entry in completions),
    }
    for name, total in sums.items():
        if config.integer(name) != total:
            raise config.wrong(name, f"is {config.integer(name)}, but the entries hold {total}")
    settings = {
        "subject": config.filled("model"),
        "frame": "chat",
        "max_tokens": config.integer("max_new_tokens"),
        "temperature": config.number("temperature"),
        "generator": "dl-experiments",
        "completion_source": "greedy",
    }
    if settings["temperature"]:
        raise config.wrong("temperature", "is not 0: sampled text is not the model's argmax; use greedy completions")
    return CompletionsFile(settings, None, completions)


def _completion(entry: Fields, index: int, tokenizer: Any, special: frozenset[int], subject: str) -> Completion:
    prompt_ids, ids = entry.ids("prompt_token_ids"), entry.ids("completion_token_ids")
    text, templated = entry.text("completion"), entry.filled("templated_prompt")
    _check_entry(entry, index)
    ended = bool(ids) and ids[-1] in special
    body = ids[:-1] if ended else ids
    if tokenizer.decode(body, skip_special_tokens=True) != text:
        raise another_tokenizer(entry.where, "the completion's ids decode to another text", subject)
    completion = Completion(
        id=f"prompt-{index:03d}",
        category=entry.filled("category"),
        prompt=entry.filled("prompt"),
        templated_prompt=templated,
        completion=text,
        finish_reason="stop" if ended else "length",
        flags=(),
        user_span=_user_span(entry, prompt_ids, tokenizer, subject),
        answer_start=answer_start(body, templated, tokenizer),
        greedy_agreement=None,
        loss=None,
        prompt_token_ids=prompt_ids,
        completion_token_ids=ids,
    )
    return replace(completion, flags=flags_of(completion, special))


def _check_entry(entry: Fields, index: int) -> None:
    prompt_ids, ids = entry.ids("prompt_token_ids"), entry.ids("completion_token_ids")
    if entry.integer("idx") != index:
        raise entry.wrong("idx", f"is {entry.integer('idx')}, but the entry is number {index}")
    if entry.ids("full_token_ids") != prompt_ids + ids:
        raise entry.wrong("full_token_ids", "are not the ids of prompt and completion joined")
    if entry.text("full_text") != entry.text("templated_prompt") + entry.text("completion"):
        raise entry.wrong("full_text", "is not prompt and completion joined")
    for name, length in (("prompt_token_count", len(prompt_ids)), ("completion_token_count", len(ids))):
        if entry.integer(name) != length:
            raise entry.wrong(name, f"is {entry.integer(name)}, but there are {length} ids")


def _user_span(entry: Fields, prompt_ids: tuple[int, ...], tokenizer: Any, subject: str) -> tuple[int, int]:
    templated = entry.text("templated_prompt")
    for with_start in (False, True):
        encoding = tokenizer(templated, add_special_tokens=with_start, return_offsets_mapping=True)
        if tuple(encoding["input_ids"]) == prompt_ids:
            begin = templated.rfind(entry.text("prompt").strip())  # the last: the system message stands before
            return text_span(templated, begin, entry.text("prompt"), encoding["offset_mapping"])
    raise another_tokenizer(entry.where, "the prompt is tokenised to other ids", subject)
