"""Trials of the drift gate: measure a subject twice, the second time with something changed, and compare.

Nothing here knows what a good answer is; `circumstances` must leave every number within its tolerance,
`changes` must move at least one beyond it. Both are tried with the experiments' own `measure` and
tolerances, on a budget of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import xarray as xr

from lab import experiments
from lab.alarms.trial import Trial
from lab.code_digest import code_digest
from lab.snapshots import drift, numbers
from lab.snapshots.drift import Move
from lab.snapshots.labels import Numbers
from lab.store import Store, Sweep

LIBRARIES = ("torch", "transformers", "numpy")
PLAIN = "plain"  #: of trials that nothing was varied in


def measured(trial: Trial, name: str) -> Numbers:
    """The numbers of one experiment, as a snapshot would hold them."""
    return numbers.of_summary(_record(name, _measure(trial, name, Sweep())).summary())


def kept(
    trial: Trial,
    name: str,
    variation: str = PLAIN,
    module: str | None = None,
    libraries: Mapping[str, str] | None = None,
) -> Numbers:
    """The same through the measurement store, so that an interrupted series of trials resumes.

    Args:
        trial: the trial, varied already.
        name: experiment.
        variation: what was varied; part of the address, beside everything else that determines the numbers.
        module: dotted name of the module that says how; its source is part of the address, too.
        libraries: versions under which it was measured; those of this process if None. Others are only read.

    Raises:
        KeyError: numbers under versions that are not here, and that the store does not have either.
    """
    own = libraries_here()
    parts = {
        "trial": variation,
        "weights": trial.subject.digest,
        "corpus": trial.corpus.digest,
        "budget": dataclasses.asdict(trial.budgets[name]),
        "libraries": dict(libraries or own),
        "source": [code_digest(each) for each in (experiments.modules()[name], module) if each],
    }
    store = Store()
    if parts["libraries"] != own and not store.path(f"{name}.trial", parts).exists():
        raise KeyError(f"nobody measured {name} under {libraries}")
    dataset = store.record(f"{name}.trial", parts, lambda sweep: _measure(trial, name, sweep))
    return numbers.of_summary(_record(name, dataset).summary())


def libraries_here() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    return {library: version(library) for library in LIBRARIES}


def largest_moves(name: str, before: Numbers, after: Numbers) -> dict[str, Move]:
    """Per quantity the number that moved farthest, in tolerances; a quantity of another form moved infinitely far."""
    one_sided = before.keys() ^ after.keys()
    gone = {quantity: Move(quantity, "measured on one side only", float("inf")) for quantity in one_sided}
    return gone | {quantity: drift.largest(name, quantity, before, after) for quantity in before.keys() & after.keys()}


def _measure(trial: Trial, name: str, sweep: Sweep) -> xr.Dataset:
    return experiments.experiment(name).measure(trial.subject, trial.corpus, trial.budgets[name], sweep)


def _record(name: str, dataset: xr.Dataset) -> Any:
    named = {"experiment": name, "subject": "trial", "source": "measured", "condition": "trial"}
    return experiments.experiment(name).record(dataset.assign_attrs(named))
