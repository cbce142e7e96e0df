"""Completions files, ours and those of hivaze/dl-experiments, checked against the subject that is to read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import files, paths
from lab.corpora import completions_file, source_format
from lab.corpora.checks import another_tokenizer, flags_of
from lab.corpora.completions_file import Completion, CompletionsFile
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.subjects.catalog import Facts


def committed_path(subject: str) -> Path:
    """Where the completions of a catalogued subject lie."""
    return paths.DATA / "completions" / subject / "completions.json"


def read_completions(facts: Facts, tokenizer: Any | None, path: Path | None = None) -> CompletionsFile:
    """Read and check a completions file; see `lab.corpora.corpus.load_corpus`."""
    if path is None and not committed_path(facts.name).exists():
        remedy = f"make them with `python -m lab complete {facts.name}`, or name a file with --corpus"
        raise UserError(f"there are no completions of {facts.name} yet; {remedy}")
    path = path or committed_path(facts.name)
    parsed = files.read_json(path, "completions file")
    if isinstance(parsed, dict) and "format" in parsed:
        content = completions_file.parse(parsed, path)
        if tokenizer is not None:
            _check_rendering(content, tokenizer, path, facts.name)
    else:
        if tokenizer is None:
            remedy = f"fetch it with `python -m lab fetch {facts.name}`"
            raise UserError(f"{path} can be read with the tokenizer of {facts.name} only; {remedy}")
        content = source_format.parse(parsed, path, tokenizer, facts.name)
    _check_ids(content.completions, facts.vocabulary, path, facts.name)
    _check_flags(content, tokenizer, path)
    return content


def _check_rendering(content: CompletionsFile, tokenizer: Any, path: Path, subject: str) -> None:
    from lab.corpora.rendering import render

    frame, message = str(content.settings.get("frame", "chat")), content.system_message or ""
    for entry in content.completions:
        rendered = render(tokenizer, frame, message, entry.prompt)
        if (rendered.ids, rendered.user_span) != (entry.prompt_token_ids, entry.user_span):
            raise another_tokenizer(path, f"the prompt {entry.id!r} is rendered to other ids", subject)
        if tokenizer.decode(entry.body_ids, skip_special_tokens=True) != entry.completion:
            raise another_tokenizer(path, f"the ids of {entry.id!r} decode to another text", subject)


def _check_ids(entries: Iterable[Completion], vocabulary: int, path: Path, subject: str) -> None:
    for entry in entries:
        largest = max(entry.prompt_token_ids + entry.completion_token_ids)
        if largest >= vocabulary:
            detail = f"the id {largest} of {entry.id!r} is outside the vocabulary of {vocabulary}"
            raise another_tokenizer(path, detail, subject)


def _check_flags(content: CompletionsFile, tokenizer: Any | None, path: Path) -> None:
    from lab.corpora.rendering import special_ids

    special = special_ids(tokenizer) if tokenizer is not None else frozenset()
    # without a tokenizer it is not known which ids are special, so `leak` is taken from the file
    untold = {"leak"} if tokenizer is None else set()
    for entry in content.completions:
        expected = set(flags_of(entry, special))
        if expected - untold != set(entry.flags) - untold:
            said, true = (", ".join(sorted(flags)) or "none" for flags in (entry.flags, expected))
            fault = f"the flags of {entry.id!r} are {said}, but its ids say {true}"
            raise UserError(f"{path}: {fault}; make the file again")
