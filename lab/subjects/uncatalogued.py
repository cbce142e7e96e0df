"""Models named by path or hub id, under names that no catalogued subject has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lab.subjects.catalog import catalog, facts_of_model
from lab.subjects.facts import Facts, Hub


def named_model(model: str | Path) -> Facts:
    """Facts of a model that is named by path or hub id; see `catalog.facts_of_model`.

    A hub id that the catalog has is the catalogued subject, at the revision pinned there. Any other
    model whose name is taken (a fine-tune saved under its base's name) is called `<name>-local` or
    `<name>-hub`: it must not be compared with, or recorded as, what it is not.

    Raises:
        UserError: as `facts_of_model`.
    """
    found = facts_of_model(model)
    known = catalog().get(found.name)
    if known is None:
        return found
    if isinstance(found.source, Hub) and isinstance(known.source, Hub) and found.source.id == known.source.id:
        return known
    return replace(found, name=f"{found.name}-{'hub' if isinstance(found.source, Hub) else 'local'}")
