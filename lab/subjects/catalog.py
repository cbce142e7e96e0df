"""The catalog of subjects, and the facts of models that it does not know."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.subjects.configuration import facts_of_folder, slug
from lab.subjects.facts import Facts, Hub, Local, Source, WheelPart, Wheels

__all__ = ["Facts", "catalog", "default_subject", "facts", "facts_of_model"]


@cache
def catalog() -> Mapping[str, Facts]:
    """All catalogued subjects by name, in the catalog's order."""
    with open(Path(__file__).with_name("catalog.toml"), "rb") as file:
        tables = tomllib.load(file)
    return {name: _facts(name, table) for name, table in tables.items()}


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


def _facts(name: str, table: dict[str, Any]) -> Facts:
    source = _source(table)
    return Facts(name=name, source=source, published=tuple(table.pop("published", ())), **table)


def _source(table: dict[str, Any]) -> Source:
    if "hub" in table:
        return Hub(id=table.pop("hub"), revision=table.pop("revision"))
    return Wheels(parts=tuple(WheelPart(**part) for part in table.pop("wheels")), sha256=table.pop("sha256"))
