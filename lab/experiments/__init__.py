"""The experiments, one module each: `lab/experiments/<group>/<name>.py`.

A module ends in an `EXPERIMENT`, which ties together what the suite needs: the question, the record
class, the `measure` function, the budgets and the tolerances of its numbers. Modules import torch
only inside `measure`, so that published figures are audited without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import xarray as xr

from lab.records import Record

#: `(subject, corpus, budget, sweep) -> Dataset`, see `lab.subjects.loading`, `lab.corpora.corpus`, `lab.store`
Measure = Callable[..., xr.Dataset]


@dataclass(frozen=True)
class Tolerance:
    """How far a recorded number may move before it counts as drift: |a - b| <= absolute + relative |b|.

    Attributes:
        relative, absolute: the two parts.
        reason: where they come from.
        logarithmic: a and b stand for the logarithms of the numbers, all positive: for what grows from layer to layer
            by a factor, whose error grows likewise.
    """

    relative: float
    absolute: float
    reason: str
    logarithmic: bool = False


@dataclass(frozen=True)
class Experiment:
    """One item of the research agenda.

    Attributes:
        id: the agenda's id, e.g. `T-2`.
        title: its name in words.
        question: the question in one sentence.
        record: the record class.
        measure: `(subject, corpus, budget, sweep) -> Dataset`; every variable has a `unit` and a `description`.
        budgets: settings per budget name (`quick`, `full`); plain dataclasses, part of the store's key.
        tolerances: per variable of the summary; `""` is the default.
        data: files besides the corpus that `measure` reads; part of the store's key.
        libraries: whose versions its numbers depend on, besides torch, transformers and numpy; part of the store's key.
    """

    id: str
    title: str
    question: str
    record: type[Record]
    measure: Measure
    budgets: Mapping[str, Any]
    tolerances: Mapping[str, Tolerance]
    data: tuple[Path, ...] = ()
    libraries: tuple[str, ...] = ()

    def tolerance(self, variable: str) -> Tolerance:
        """The tolerance of a variable."""
        return self.tolerances.get(variable, self.tolerances[""])


@cache
def modules() -> Mapping[str, str]:
    """Experiment name -> dotted module name, found in the tree without importing anything."""
    here = Path(__file__).parent
    found = sorted(here.glob("*/*.py"))
    return {path.stem: f"lab.experiments.{path.parent.name}.{path.stem}" for path in found if path.stem != "__init__"}


@cache
def experiment(name: str) -> Experiment:
    """The experiment of this name."""
    found: Experiment = import_module(modules()[name]).EXPERIMENT
    return found


def name_of(experiment_id: str) -> list[str]:
    """Names of the experiments with this agenda id; `activation_patching` shares T-2 with `layer_knockout`."""
    return [name for name in modules() if experiment(name).id == experiment_id]
