"""Contrastive groups: short completions of one prompt that differ in one known respect.

Two formats are read. Ours holds matched families: one prompt, an anchor word and one contrast word per relationship,
each at once and behind a stem, so that relationships and prefixes are compared within a prompt; and style entries, the
same content in two registers. That of hivaze/dl-experiments (`contrastive_pairs.json`) lists groups one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.corpora.fields import Fields
from lab.errors import UserError

RELATIONSHIPS = ("antonym", "synonym", "style", "unrelated")
#: the words of a family: the anchor, then one per relationship
WORDS = ("anchor", "antonym", "synonym", "unrelated")
CONTRASTS = WORDS[1:]
PREFIXES = ("immediate", "shared")
TRUTHS = ("asserted", "open")


@dataclass(frozen=True)
class Family:
    """One prompt and four words that could answer it.

    Attributes:
        id: stable name.
        truth: `asserted` if anchor and synonym are right and the antonym is wrong, `open` if all three would do.
        prompt: the user's words.
        stem: how an answer begins in the shared condition.
        anchor, synonym, antonym, unrelated: the words, lower case.
        unrelated_pos: part of speech of the unrelated word, where it is not the others'.
    """

    id: str
    truth: str
    prompt: str
    stem: str
    anchor: str
    synonym: str
    antonym: str
    unrelated: str
    unrelated_pos: str = ""

    def words(self) -> tuple[str, ...]:
        """The four words in the order of `WORDS`."""
        return tuple(getattr(self, name) for name in WORDS)

    def completion(self, word: str, prefix: str) -> str:
        """The completion that ends in one of its words."""
        return word if prefix == "immediate" else f"{self.stem} {word}"


@dataclass(frozen=True)
class Style:
    """One content in two registers.

    Attributes:
        id: stable name.
        prompt: the user's words.
        texts: the completion in formal and in colloquial words.
        stem: how both begin; empty if they differ from the first word on.
    """

    id: str
    prompt: str
    texts: tuple[str, str]
    stem: str = ""

    @property
    def prefix(self) -> str:
        """`shared` if there is a stem."""
        return "shared" if self.stem else "immediate"


@dataclass(frozen=True)
class Group:
    """Completions of one prompt, all pairs of which are compared.

    Attributes:
        id: unique name.
        relationship: one of `RELATIONSHIPS`.
        prefix: `immediate` or `shared`, as the file says; only tokens tell what is true.
        prompt: the user's words.
        completions: at least two texts.
        family: matched groups have the same.
    """

    id: str
    relationship: str
    prefix: str
    prompt: str
    completions: tuple[str, ...]
    family: str


@dataclass(frozen=True)
class ContrastiveGroups:
    """What a file of contrastive groups holds.

    Attributes:
        version: of the data.
        system_message: goes with every prompt.
        families, style: our format; empty in the source's.
        groups: the groups of either format.
    """

    version: int
    system_message: str
    families: tuple[Family, ...]
    style: tuple[Style, ...]
    groups: tuple[Group, ...]

    @property
    def matched(self) -> bool:
        """Whether the groups come in matched families (our format)."""
        return bool(self.families)


def default_path() -> Path:
    """The committed file of contrastive groups."""
    return paths.DATA / "contrastive_groups.json"


def load_contrastive_groups(path: Path | None = None) -> ContrastiveGroups:
    """Read a file of contrastive groups, ours or of hivaze/dl-experiments.

    Raises:
        UserError: unreadable, truncated, of another schema, an id twice, or completions that cannot be compared.
    """
    path = path or default_path()
    content = Fields(files.read_json(path, "file of contrastive groups"), f"file of contrastive groups {path}")
    found = _of_the_source(content) if "groups" in content else _ours(content)
    _require_unique("id", (group.id for group in found.groups), content)
    if not found.groups:
        raise UserError(f"{content.where}: it holds no groups")
    return found


def _ours(content: Fields) -> ContrastiveGroups:
    content.known("version", "description", "system_message", "families", "style")
    content.text("description")
    families = tuple(map(_family, content.objects("families", "family")))
    style = tuple(map(_style, content.objects("style", "style entry")))
    _require_unique("id", [*(family.id for family in families), *(entry.id for entry in style)], content)
    _require_unique("anchor", (family.anchor for family in families), content)
    groups = [group for family in families for group in _groups_of(family)]
    groups += [Group(f"{s.id}/style", "style", s.prefix, s.prompt, s.texts, s.id) for s in style]
    message = content.filled("system_message")
    return ContrastiveGroups(content.integer("version"), message, families, style, tuple(groups))


def _family(entry: Fields) -> Family:
    names = ("id", "truth", "prompt", "stem", *WORDS)
    entry.known(*names, "unrelated_pos")
    other = entry.filled("unrelated_pos") if "unrelated_pos" in entry else ""
    family = Family(**{name: _trimmed(entry, name) for name in names}, unrelated_pos=other)
    if family.truth not in TRUTHS:
        raise entry.wrong("truth", f"is {family.truth!r}; it must be one of {', '.join(TRUTHS)}")
    for name in WORDS:
        word = entry.text(name)
        if word != word.lower() or len(word.split()) != 1:
            raise entry.wrong(name, f"is {word!r}; it must be one word in lower case")
    if len(set(family.words())) < len(WORDS):
        raise entry.wrong("anchor", "and its contrasts must be four different words")
    return family


def _style(entry: Fields) -> Style:
    entry.known("id", "prompt", "stem", "texts")
    texts = entry.texts("texts")
    stem = _trimmed(entry, "stem") if "stem" in entry else ""
    if len(texts) != 2 or texts[0] == texts[1]:
        raise entry.wrong("texts", "must be two different texts")
    strange = [text for text in texts if not text.startswith(stem) or text != text.strip()]
    if strange:
        raise entry.wrong("texts", f"must begin with the stem and have no blanks around them, unlike {strange[0]!r}")
    return Style(_trimmed(entry, "id"), _trimmed(entry, "prompt"), (texts[0], texts[1]), stem)


def _groups_of(family: Family) -> Iterator[Group]:
    for prefix in PREFIXES:
        for relationship in CONTRASTS:
            words = (family.anchor, getattr(family, relationship))
            completions = tuple(family.completion(word, prefix) for word in words)
            name = f"{family.id}/{relationship}/{prefix}"
            yield Group(name, relationship, prefix, family.prompt, completions, family.id)


def _of_the_source(content: Fields) -> ContrastiveGroups:
    content.known("version", "description", "system_message", "relationships", "groups")
    groups = tuple(map(_source_group, content.objects("groups", "group")))
    return ContrastiveGroups(content.integer("version"), content.filled("system_message"), (), (), groups)


def _source_group(entry: Fields) -> Group:
    entry.known(
        "id", "prompt", "category", "relationship", "completions", "expected", "pivot_token", "prefix_group", "notes"
    )
    completions = entry.objects("completions", "completion")
    texts, labels = (tuple(one.filled(name) for one in completions) for name in ("text", "label"))
    for name, choices in (("relationship", RELATIONSHIPS), ("prefix_group", PREFIXES)):
        if entry.text(name) not in choices:
            raise entry.wrong(name, f"is {entry.text(name)!r}; it must be one of {', '.join(choices)}")
    if len(texts) < 2 or len(set(labels)) < len(labels):
        raise entry.wrong("completions", "must be two or more, with labels of their own")
    name = str(entry.integer("id"))
    return Group(name, entry.text("relationship"), entry.text("prefix_group"), entry.filled("prompt"), texts, name)


def _trimmed(entry: Fields, name: str) -> str:
    text = entry.filled(name)
    if text != text.strip():
        raise entry.wrong(name, "begins or ends with white space")
    return text


def _require_unique(name: str, values: Iterable[Any], content: Fields) -> None:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise UserError(f"{content.where}: the {name} {value!r} occurs twice")
        seen.add(value)
