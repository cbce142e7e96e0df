"""How T-9 measures: the matrices of each layer read from the files, their spectra, heads' circuits, and controls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from threadpoolctl import threadpool_limits

from lab.experiments.layers.weight_spectra import Budget
from lab.records import variable
from lab.statistics.spectra import (
    Spectrum,
    circuit_energies,
    effective_rank_of_gram,
    gram,
    singular_values,
    subspace_overlap,
    top_right_subspace,
)
from lab.statistics.spectrum_size import participation_ratio
from lab.statistics.storage_grid import levels, rounded_again, rounding_share, steps
from lab.store import Arrays, Sweep
from lab.subjects.loading import LoadedSubject
from lab.subjects.matrices import LayerWeights, Matrix
from lab.subjects.weights import required_location

Item = TypeVar("Item")
Result = TypeVar("Result")

NAN = float("nan")
QK, OV = 0, 1
AT_ONCE = 8  #: layers at most: the largest matrix of a 4B model takes 0.6 GB with its copies in float64

#: variable -> unit, description, and how it is read off a spectrum
OF_SPECTRUM: Mapping[str, tuple[str, str, Callable[[Spectrum], float]]] = {
    "rows": ("1", "output features of the weight", lambda s: s.rows),
    "columns": ("1", "input features of the weight", lambda s: s.columns),
    "effective_rank": ("1", "participation ratio of the squared singular values", lambda s: s.effective_rank),
    "stable_rank": ("1", "squared Frobenius norm over squared spectral norm", lambda s: s.stable_rank),
    "spectral_entropy": ("1", "entropy of the energy shares over its maximum", lambda s: s.spectral_entropy),
    "energy_rank_50": ("1", "fewest singular values with 50 % of the energy", lambda s: s.energy_rank(50)),
    "energy_rank_90": ("1", "fewest singular values with 90 % of the energy", lambda s: s.energy_rank(90)),
    "energy_rank_99": ("1", "fewest singular values with 99 % of the energy", lambda s: s.energy_rank(99)),
    "power_law_exponent": ("1", "minus slope of ln s_i on ln i, all singular values", lambda s: s.power_law[0]),
    "power_law_r_squared": ("1", "squared correlation of that fit", lambda s: s.power_law[1]),
    "tail_exponent": ("1", "Hill exponent of the density of the largest tenth of e", lambda s: s.tail_exponent),
    "numerical_rank_deficit": (
        "1",
        "smaller dimension minus number of singular values above 1e-6",
        lambda s: len(s.values) - s.numerical_rank,
    ),
    "condition_number": ("1", "largest over smallest singular value", lambda s: s.condition_number),
    "frobenius_norm_squared": ("1", "sum of squared weights", lambda s: s.frobenius_norm_squared),
    "largest_singular_value": ("1", "s_1", lambda s: float(s.values[0])),
    "second_singular_value": ("1", "s_2", lambda s: float(s.values[1]) if len(s.values) > 1 else NAN),
    "outliers": ("1", "energies beyond the edge of a random matrix", lambda s: s.outliers),
    "outlier_energy_share": ("1", "share of the energy in these", lambda s: s.outlier_energy_share),
}
#: variable -> unit and description of what needs the matrix itself
OF_MATRIX = {
    "folded_effective_rank": ("1", "effective rank with the neighbouring norms' gains folded in"),
    "grid_levels": ("1", "median levels that a block of 16 weights spans; NaN where weights lie on no grid"),
    "rounding_share": ("1", "share of the energy that is the storing's rounding, from the steps of the grid"),
    "rounded_effective_rank": ("1", "effective rank after as much rounding once more"),
    "rounded_power_law_exponent": ("1", "power-law exponent after as much rounding once more"),
    "rounded_energy_rank_90": ("1", "fewest singular values with 90 % of the energy after as much rounding once more"),
}
Variables = dict[str, xr.Variable]
Gains = Mapping[tuple[int, str], tuple[np.ndarray | None, np.ndarray | None]]


def measure(subject: LoadedSubject, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.layers.weight_spectra.measure`."""
    weights = LayerWeights(subject.decoder, required_location(subject.facts))
    gains, width = weights.gains(), subject.decoder.width
    subspace = max(1, round(budget.subspace_share * width))
    layers = _layers(subject.decoder.n_layers, sweep, lambda layer: _of_layer(weights, gains, layer, subspace))
    named = {name: entry[:2] for name, entry in OF_SPECTRUM.items()} | OF_MATRIX
    variables = {
        name: variable(("layer", "matrix"), [shard[name] for shard in layers], *about) for name, about in named.items()
    }
    kinds = _attention_kinds(subject)
    variables |= _attention_variables(weights, layers, kinds)
    settings = {
        "width": width,
        "subspace": subspace,
        "stored": weights.stored_dtypes(),
        "arithmetic": "float64",
        "attention_kinds": sorted(set(kinds)),
        "folded": _folded_sides(weights, gains),
        "left_out": sorted(weights.left_out),
    }
    numbers = np.arange(len(layers))
    coords = {"layer": numbers, "layer_other": numbers, "matrix": weights.names, "circuit": ["qk", "ov"]}
    return xr.Dataset(variables, coords, {"settings": json.dumps(settings)})


def _attention_variables(weights: LayerWeights, layers: Sequence[Arrays], kinds: Sequence[str]) -> Variables:
    """What is measured of heads and of attention as a whole; NaN for heads and layers that have none."""
    ranks = np.full((len(layers), max(len(shard["circuits"]) for shard in layers), 2), NAN)
    for layer, shard in enumerate(layers):
        ranks[layer, : len(shard["circuits"])] = shard["circuits"]
    widths = [weights.head_dim(layer) for layer in range(len(layers))]
    overlaps = _overlaps([shard["query_subspace"] for shard in layers])
    numbered = [sorted(set(kinds)).index(kind) for kind in kinds]
    return {
        "circuit_effective_rank": variable(
            ("layer", "head", "circuit"), ranks, "1", "effective rank of a head's W_q' W_k and W_o W_v"
        ),
        "head_width": variable("layer", widths, "1", "head width"),
        "query_overlap": variable(
            ("layer", "layer_other"),
            overlaps,
            "1",
            "mean squared cosine of the leading input directions of two layers' queries",
        ),
        "attention_kind": variable(
            "layer", numbered, "1", "kind of attention, numbered as in the settings (attention_kinds)"
        ),
    }


def _layers(count: int, sweep: Sweep, compute: Callable[[int], Arrays]) -> list[Arrays]:
    """Every layer's arrays; those that an earlier run has saved are read back."""
    done = itertools.count(1)

    def of_layer(layer: int) -> Arrays:
        arrays = sweep.shard(f"layer {layer}", lambda: compute(layer))
        sweep.progress(next(done), count, "spectra of layers")
        return arrays

    return each_on_one_core(of_layer, range(count))


def each_on_one_core(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The function's results for all items, in order: several at once (`AT_ONCE` at most), each on one thread.

    Eigenvalue routines gain little from a second thread and lose much where cores are shared; NumPy releases the
    interpreter while it multiplies.
    """
    with threadpool_limits(1), ThreadPoolExecutor(min(AT_ONCE, torch.get_num_threads())) as pool:
        return list(pool.map(function, items))


def _of_layer(weights: LayerWeights, gains: Gains, layer: int, subspace: int) -> Arrays:
    arrays = {name: np.full(len(weights.names), NAN) for name in (*OF_SPECTRUM, *OF_MATRIX)}
    attention: dict[str, np.ndarray] = {}
    for matrix in weights.matrices:
        if matrix.layer == layer:
            values = weights.read(matrix)
            at = weights.names.index(matrix.name)
            for name, value in _of_matrix(values, matrix, _around(matrix, gains), at).items():
                arrays[name][at] = value
            if matrix.name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                attention[matrix.name] = values
    query = attention.get("q_proj")
    arrays["query_subspace"] = np.empty((0, 0)) if query is None else top_right_subspace(query, subspace)
    arrays["circuits"] = circuits(attention, weights.head_dim(layer))
    return arrays


def _of_matrix(
    values: np.ndarray, matrix: Matrix, around: tuple[np.ndarray | None, np.ndarray | None], at: int
) -> dict[str, float]:
    spectrum = Spectrum(singular_values(values), *values.shape)
    found = {name: read(spectrum) for name, (_, _, read) in OF_SPECTRUM.items()}
    stored = values.T if matrix.transposed else values  # blocks run along the rows of the file
    grid, again = steps(stored), spectrum
    if grid.any():
        again = Spectrum(singular_values(rounded_again(stored, grid, seed=100 * matrix.layer + at)), *values.shape)
    return found | {
        "folded_effective_rank": effective_rank_of_gram(gram(folded(values, *around))),
        "grid_levels": levels(stored, grid),
        "rounding_share": rounding_share(stored, grid),
        "rounded_effective_rank": again.effective_rank,
        "rounded_power_law_exponent": again.power_law[0],
        "rounded_energy_rank_90": again.energy_rank(90),
    }


def _around(matrix: Matrix, gains: Gains) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Gains of the norms before and after a matrix; of a fused output the norm that was seen is its first part's."""
    before, after = gains.get((matrix.layer, matrix.module), (None, None))
    return before, after if matrix.rows is None or matrix.rows[0] == 0 else None


def folded(weight: np.ndarray, before: np.ndarray | None, after: np.ndarray | None) -> np.ndarray:
    """diag(after) W diag(before) [out, in]: the weight with the gains of the norms before and after it.

    Args:
        weight: [out, in].
        before: gain of the norm that feeds it [in], or None.
        after: gain of the norm of its output [out], or of one head's part of it, or None.
    """
    result = np.asarray(weight, dtype=np.float64)
    if before is not None:
        result = result * before
    if after is not None:
        result = result * np.tile(after, len(result) // len(after))[:, None]
    return result


def circuits(attention: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """Effective ranks of each head's W_q' W_k and W_o W_v [head, 2]; no heads where the shapes are not of such heads.

    The query-key form is that of two tokens at the same place, without rotary embedding, biases or norms of heads;
    query heads that share a key head have circuits of their own.
    """
    if set(attention) != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return np.empty((0, 2))
    query, key, value, out = (attention[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    heads, groups = len(query) // size, len(key) // size
    if query.shape[0] != heads * size or not groups or heads % groups or out.shape[1] != heads * size:
        return np.empty((0, 2))
    if len(value) != len(key) or len(key) != groups * size:
        return np.empty((0, 2))
    found = np.empty((heads, 2))
    for head in range(heads):
        own, shared = (slice(at * size, (at + 1) * size) for at in (head, head * groups // heads))
        found[head, QK] = participation_ratio(circuit_energies(query[own], key[shared]))
        found[head, OV] = participation_ratio(circuit_energies(out[:, own].T, value[shared]))
    return found


def _overlaps(subspaces: list[np.ndarray]) -> np.ndarray:
    """Overlap of every two layers' query subspaces [layer, layer]; NaN for layers without queries."""
    count = len(subspaces)
    found = np.full((count, count), NAN)
    for i in range(count):
        for j in range(i, count):
            if subspaces[i].size and subspaces[j].size:
                found[i, j] = found[j, i] = subspace_overlap(subspaces[i], subspaces[j])
    return found


def _folded_sides(weights: LayerWeights, gains: Gains) -> dict[str, list[str]]:
    """Which matrices have gains folded in, before or after them, in any layer."""
    sides: dict[str, set[str]] = {name: set() for name in weights.names}
    for matrix in weights.matrices:
        before, after = _around(matrix, gains)
        sides[matrix.name] |= ({"before"} if before is not None else set()) | (
            {"after"} if after is not None else set()
        )
    return {name: sorted(found) for name, found in sides.items() if found}


def _attention_kinds(subject: LoadedSubject) -> list[str]:
    configured = getattr(subject.decoder.config, "layer_types", None)
    return list(configured) if configured else ["full_attention"] * subject.decoder.n_layers
