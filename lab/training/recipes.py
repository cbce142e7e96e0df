"""Recipes of specimens: `data/specimens/recipes.toml`, from which each can be made again.

A specimen is a low-rank adapter of a catalogued subject. Those of T-18 differ in rank allocation, learning rate and
seed alone and share one recipe; the name of such a run says which: `spectral-peft-B_matched-0.0001-0`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lab import paths
from lab.adapters.allocations import ALLOCATIONS
from lab.errors import UserError

Task = Literal["competence", "narrow", "novel", "thinking"]
FAMILY = "spectral-peft"
_RUN = re.compile(rf"{FAMILY}-(?P<configuration>\w+)-(?P<learning_rate>[\d.e-]+)-(?P<seed>\d+)")


@dataclass(frozen=True)
class Recipe:
    """How a specimen is made.

    Attributes:
        name: of the specimen.
        subject: catalog name of the model that is adapted.
        base: name of a specimen that is merged into the model first; None for the subject as it is.
        task: what is learned.
        configuration: rank allocation, a key of `lab.adapters.allocations.ALLOCATIONS`.
        rank_scale: of all ranks, relative to the source's 16.
        learning_rate: peak.
        steps, batch, warmup: see `lab.training.loop.Settings`.
        seed: of the adapter's beginning and the order of the texts.
    """

    name: str
    subject: str
    base: str | None
    task: Task
    configuration: str
    rank_scale: float
    learning_rate: float
    steps: int
    batch: int
    warmup: int
    seed: int

    @property
    def digest(self) -> str:
        """Digest of everything that the recipe says, that of its base included."""
        said = {**asdict(self), "base": None if self.base is None else recipe(self.base).digest}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Rates:
    """Learning rates of T-18: those that A is swept over, the gentle one among them, and 40 times that."""

    sweep: tuple[float, ...]
    gentle: float
    aggressive: float


def path() -> Path:
    """The committed file of recipes."""
    return paths.DATA / "specimens" / "recipes.toml"


def rates() -> Rates:
    """The learning rates of T-18."""
    table = _document()["rates"]
    return Rates(tuple(table["sweep"]), table["gentle"], table["aggressive"])


def family() -> Mapping[str, Any]:
    """What all runs of T-18 share: fields of `Recipe`."""
    found: Mapping[str, Any] = _document()["families"][FAMILY]
    return found


def run_name(configuration: str, learning_rate: float, seed: int) -> str:
    """Name of a run of T-18."""
    return f"{FAMILY}-{configuration}-{learning_rate:g}-{seed}"


def recipe(name: str) -> Recipe:
    """The recipe of a specimen.

    Raises:
        UserError: there is none of this name; the message names the nearest ones.
    """
    single = _document()["specimens"]
    if name in single:
        return Recipe(name=name, **{"base": None, **single[name]})
    run = _RUN.fullmatch(name)
    if run and run["configuration"] in ALLOCATIONS:
        rate, seed = float(run["learning_rate"]), int(run["seed"])
        return Recipe(name=name, configuration=run["configuration"], learning_rate=rate, seed=seed, **family())
    names = [*single, run_name("A", rates().gentle, 0)]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.4)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"there are {', '.join(single)}, and {FAMILY}, the runs of T-18;"
    )
    raise UserError(f"no recipe makes {name!r}: {hint} see {path().relative_to(paths.REPOSITORY)}")


@cache
def _document() -> dict[str, Any]:
    with open(path(), "rb") as file:
        return tomllib.load(file)
