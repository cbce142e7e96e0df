"""The prompt set: questions and instructions of seven categories, each with a reference answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab import files, paths
from lab.corpora.fields import Fields
from lab.errors import UserError

CATEGORIES = ("factual", "reasoning", "linguistic", "code", "world_knowledge", "technical", "rare")
ANSWER_STYLES = ("word", "sentence", "paragraph", "code")


@dataclass(frozen=True)
class Prompt:
    """One user turn.

    Attributes:
        id: stable name, also of the text made from it.
        category: one of `CATEGORIES`.
        text: the user's words.
        answer_style: one of `ANSWER_STYLES`.
        reference: a correct answer, for use where a subject's own text is of no use.
        checks: strings one of which a correct answer contains.
    """

    id: str
    category: str
    text: str
    answer_style: str
    reference: str
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which any prefix is balanced over categories, and the system message of all."""

    version: int
    description: str
    system_message: str
    prompts: tuple[Prompt, ...]


def default_path() -> Path:
    """The committed prompt file."""
    return paths.DATA / "prompts.json"


def load_prompts(path: Path | None = None) -> PromptSet:
    """Read a prompt file.

    Raises:
        UserError: unreadable, truncated, of another schema, or two prompts of one id.
    """
    path = path or default_path()
    content = Fields(files.read_json(path, "prompt file"), f"prompt file {path}")
    prompts = tuple(_prompt(entry) for entry in content.objects("prompts", "prompt"))
    ids = [prompt.id for prompt in prompts]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice or not prompts:
        fault = f"the id {twice[0]!r} occurs twice" if twice else "it holds no prompts"
        raise UserError(f"prompt file {path}: {fault}")
    return PromptSet(content.integer("version"), content.text("description"), content.filled("system_message"), prompts)


def _prompt(entry: Fields) -> Prompt:
    entry.known("id", "category", "text", "answer_style", "reference", "checks")
    for name, choices in (("category", CATEGORIES), ("answer_style", ANSWER_STYLES)):
        if entry.text(name) not in choices:
            raise entry.wrong(name, f"is {entry.text(name)!r}; it must be one of {', '.join(choices)}")
    return Prompt(
        id=entry.filled("id"),
        category=entry.text("category"),
        text=entry.filled("text"),
        answer_style=entry.text("answer_style"),
        reference=entry.filled("reference"),
        checks=entry.texts("checks") if "checks" in entry else (),
    )
