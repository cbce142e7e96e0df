"""How T-7 measures: one pass that keeps the states, readings of every layer's derivative, and layers as matrices."""

from __future__ import annotations

import json

import numpy as np
import torch
import xarray as xr

from lab.corpora.corpus import Corpus
from lab.experiments.layers.linearization_gap import TOP, Budget
from lab.experiments.layers.measuring import linear_replacement, local_linearity
from lab.records import variable
from lab.residual.executor import Executor
from lab.residual.sweeps import sample
from lab.statistics.spectrum_size import effective_rank, participation_ratio
from lab.store import Arrays, Sweep
from lab.subjects.loading import LoadedSubject

Variables = dict[str, xr.Variable]


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.layers.linearization_gap.measure`."""
    executor = Executor(subject.decoder)
    states = linear_replacement.collect(executor, corpus, budget, sweep)
    spectra = sweep.shard("spectra", lambda: _spectra(states))
    sizes = linear_replacement.energy_factors(states)
    layers = linear_replacement.replaced_layers(sizes, budget.layer_stride)
    local = sample(corpus, budget.local_prompts, budget.local_tokens)
    variables = local_linearity.measured(executor, local, spectra["directions"], layers, budget, sweep)
    variables |= _spectrum_variables(spectra["eigenvalues"])
    variables["outlier_energy_factor"] = variable(
        "layer", sizes, "1", "mean squared deviation of the update, all tokens, over squared mean completion update"
    )
    variables |= linear_replacement.measured(executor, states, corpus, layers, budget, sweep)
    coords = {
        "layer": np.arange(subject.decoder.n_layers),
        "eps": list(budget.eps),
        "rank": list(budget.ranks),
        "prompt_id": ("prompt", list(local.prompts)),
    }
    return xr.Dataset(variables, coords, {"settings": json.dumps({"replaced_layers": layers})})


def _spectra(states: linear_replacement.States) -> Arrays:
    """Covariance of each layer's input over completion tokens: eigenvalues [L, d], and some leading directions."""
    eigenvalues, directions = [], []
    for inputs in states.inputs:
        centred = inputs[states.completion].double()
        centred = centred - centred.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        eigenvalues.append(values.flip(0).numpy())
        directions.append(vectors.flip(1)[:, :TOP].T.float().numpy())
    return {"eigenvalues": np.stack(eigenvalues), "directions": np.stack(directions)}


def _spectrum_variables(eigenvalues: np.ndarray) -> Variables:
    described = {
        f"effective_rank_top{TOP}": f"directions for 95 % of the variance of the {TOP} leading ones, as published",
        "rank95": "directions for 95 % of the variance of the layer's input over completion tokens",
    }
    top = [effective_rank(values, leading=TOP) for values in eigenvalues]
    whole = [effective_rank(values) for values in eigenvalues]
    found = {
        name: variable("layer", values, "direction", described[name])
        for name, values in zip(described, (top, whole), strict=True)
    }
    found["participation_ratio"] = variable(
        "layer",
        [participation_ratio(values) for values in eigenvalues],
        "direction",
        "participation ratio of the layer's input over completion tokens",
    )
    return found
