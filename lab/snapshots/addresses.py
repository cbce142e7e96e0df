"""Where snapshots lie, `snapshots/<subject>/<condition>/<experiment>.json`, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.errors import UserError
from lab.snapshots import form

WHAT = "snapshot"
UPDATE = "--snapshot-update"


@dataclass(frozen=True)
class Address:
    """Which snapshot: subject, condition, experiment."""

    subject: str
    condition: str
    experiment: str

    @property
    def path(self) -> Path:
        """The snapshot's file."""
        return paths.SNAPSHOTS / self.subject / self.condition / f"{self.experiment}.json"


def all_addresses() -> Iterator[Address]:
    """Every snapshot that is committed, in the order of their paths."""
    for path in sorted(paths.SNAPSHOTS.glob("*/*/*.json")):
        yield Address(path.parts[-3], path.parts[-2], path.stem)


def load(path: Path) -> dict[str, Any]:
    """A snapshot's content; empty if there is none.

    Raises:
        UserError: truncated, empty, or of another form.
    """
    return checked(files.read_json(path, WHAT), str(path)) if path.exists() else {}


def checked(content: Any, name: str) -> dict[str, Any]:
    """A snapshot's parsed content, if it has a snapshot's form.

    Raises:
        UserError: it has not; `name` says where it lies.
    """
    part = form.fault(content)
    if part is not None:
        raise UserError(f"the {WHAT} {name} has no proper {part}; restore it, or record it anew with {UPDATE}")
    return dict(content)


def key(claim: str, where: str | None) -> str:
    """A verdict's key: `T-2.1`, `T-2.2 L07`."""
    return claim if where is None else f"{claim} {where}"


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key in which the numbers inside ids count as numbers: T-2.9 before T-2.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text)]
