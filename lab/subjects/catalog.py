"""The catalog of subjects, and the facts of models that it does not know."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from lab.corpora.fields import Fields
from lab.errors import UserError, first_line
from lab.subjects.configuration import facts_of_folder, slug
from lab.subjects.facts import Adapted, Facts, Hub, Local, Source, WheelPart, Wheels

__all__ = ["Facts", "catalog", "default_subject", "facts", "facts_of_model"]


@cache
def catalog() -> Mapping[str, Facts]:
    """All catalogued subjects by name, in the catalog's order."""
    return read(Path(__file__).with_name("catalog.toml"))


def read(path: Path) -> dict[str, Facts]:
    """The subjects of a catalog file, by name.

    Raises:
        UserError: the file is no TOML, or an entry is not as `Facts` has it.
    """
    try:
        return read_tables(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the catalog {path} is not whole TOML ({first_line(error)}); mend it") from error


def read_tables(tables: Any) -> dict[str, Facts]:
    """The subjects that parsed tables describe, by name.

    Raises:
        UserError: an entry lacks a field, has one too many, or one of another type, or adapts a subject that does not
            stand before it; names the entry.
    """
    entries = Fields(tables, "catalog")
    found: dict[str, Facts] = {}
    for name in tables:
        entry = entries.object(name)
        found[name] = _adapted(name, entry, found) if "specimen" in entry else _facts(name, entry)
    return found


def facts(name: str) -> Facts:
    """The catalogued subject of this name.

    Raises:
        UserError: there is none; the message names the nearest ones.
    """
    known = catalog()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the catalog has {', '.join(known)};"
    raise UserError(f"unknown subject {name!r}: {hint} other models are named by path or hub id")


def default_subject() -> str:
    """Name of the subject that is measured when none is named."""
    return next(name for name, subject in catalog().items() if subject.default)


def facts_of_model(model: str | Path) -> Facts:
    """Facts of a model that the catalog does not know: a local folder, a GGUF file or a hub id.

    Raises:
        UserError: no such model, no configuration, pickled weights only, or a configuration without
            the sizes that a decoder has.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return facts_of_folder(path.resolve(), Local(path.resolve()), slug(path.resolve().name))
    if path.is_file() and path.suffix == ".gguf":
        from lab.subjects.gguf import facts_of_gguf

        return facts_of_gguf(path.resolve())
    if path.exists():
        raise UserError(f"{path} is neither a folder with config.json and safetensors nor a .gguf file")
    from lab.subjects.hub import facts_of_hub

    return facts_of_hub(str(model))


SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocabulary")
CHOICES = {"frame": ("chat", "plain"), "device": ("cpu", "gpu")}


def _facts(name: str, entry: Fields) -> Facts:
    entry.known(*(field.name for field in fields(Facts)), "hub", "revision", "wheels", "sha256")
    for key, choices in CHOICES.items():
        if entry.text(key) not in choices:
            raise entry.wrong(key, f"is {entry.text(key)!r}; it must be one of {', '.join(choices)}")
    sizes: dict[str, Any] = {key: entry.integer(key) for key in SIZES}
    flags = {key: entry.truth(key) for key in ("tied", "default") if key == "tied" or key in entry}
    return Facts(
        name=name,
        architecture=entry.filled("architecture"),
        licence=entry.filled("licence"),
        parameters=entry.integer("parameters") if "parameters" in entry else None,
        size_bytes=entry.integer("size_bytes") if "size_bytes" in entry else None,
        frame="chat" if entry.text("frame") == "chat" else "plain",
        device="cpu" if entry.text("device") == "cpu" else "gpu",
        source=_source(entry),
        published=entry.texts("published") if "published" in entry else (),
        **sizes,
        **flags,
    )


def _adapted(name: str, entry: Fields, known: Mapping[str, Facts]) -> Facts:
    """A subject that has everything but its weights from another."""
    entry.known("base", "specimen")
    base = entry.filled("base")
    if base not in known:
        raise entry.wrong("base", f"is {base!r}; it must be a subject that stands before this one")
    source = Adapted(base, entry.filled("specimen"))
    return replace(known[base], name=name, source=source, default=False, published=())


def _source(entry: Fields) -> Source:
    if "hub" in entry:
        return Hub(id=entry.filled("hub"), revision=entry.filled("revision"))
    parts = entry.objects("wheels", "wheel")
    names = [field.name for field in fields(WheelPart)]
    if not parts:
        raise entry.wrong("wheels", "is empty")
    for part in parts:
        part.known(*names)
    return Wheels(
        parts=tuple(WheelPart(**{name: part.filled(name) for name in names}) for part in parts),
        sha256=entry.filled("sha256"),
    )
