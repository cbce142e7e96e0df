"""Specimens on disk: `data/specimens/<name>/`, and the manifest of their digests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.adapters.names import CONFIG, WEIGHTS
from lab.errors import NotApplicable
from lab.training.recipes import Recipe, recipe

LOG = "training.json"
FILES = (CONFIG, WEIGHTS, LOG)


def root() -> Path:
    """The folder of all specimens."""
    return paths.DATA / "specimens"


def folder(name: str) -> Path:
    """Where a specimen lies, or would lie."""
    return root() / name


def manifest() -> dict[str, Any]:
    """Digests by specimen: that of its recipe, and those of its files."""
    found: dict[str, Any] = files.read_json(root() / "manifest.json", "manifest of specimens")
    return found


def problem(one: Recipe) -> str | None:
    """Why a specimen cannot be used, in words; None if it can."""
    entry = manifest().get(one.name)
    if entry is None or not all((folder(one.name) / file).is_file() for file in FILES):
        return "is not here"
    if entry["recipe"] != one.digest:
        return "was made by another recipe"
    for file, digest in entry["files"].items():
        if files.sha256(folder(one.name) / file) != digest:
            return f"has another {file} than the manifest says"
    return None


def require(names: Sequence[str], remedy: str | None = None) -> dict[str, Path]:
    """The folders of specimens, by name.

    Args:
        names: of specimens.
        remedy: what to train instead of the first one that is wanting, e.g. the name of a set.

    Raises:
        NotApplicable: one is missing or not the one that the manifest names; the message says how to make it.
    """
    problems = {name: found for name in names if (found := problem(recipe(name))) is not None}
    if problems:
        name, found = next(iter(problems.items()))
        more = f" (and {len(problems) - 1} more of {len(names)})" if len(problems) > 1 else ""
        raise NotApplicable(f"the adapter {name} {found}{more}; make it with `python -m lab train {remedy or name}`")
    return {name: folder(name) for name in names}


def training_log(name: str) -> dict[str, Any]:
    """What was noted when a specimen was trained."""
    found: dict[str, Any] = files.read_json(folder(name) / LOG, "training log")
    return found


@contextmanager
def building(one: Recipe) -> Iterator[Path]:
    """A folder to build a specimen in; it takes the specimen's place, and the manifest names it, only at the end.

    Two processes may make different specimens at once; the same one waits for the other.
    """
    target = folder(one.name)
    with files.locked(paths.cache() / "specimens" / one.name):
        part = target.with_name(f".{one.name}.building")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            _note(one, part)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _note(one: Recipe, built: Path) -> None:
    entry = {"recipe": one.digest, "files": {file: files.sha256(built / file) for file in FILES}}
    path = root() / "manifest.json"
    with files.locked(paths.cache() / "specimens" / "manifest"):
        everything = manifest() | {one.name: entry}
        files.write_text(path, json.dumps(dict(sorted(everything.items())), indent=1) + "\n")
