"""Permutation tests: how often would chance alone give as much?"""

from __future__ import annotations

import numpy as np

PERMUTATIONS = 999
SEED = 20260704


def lag_one_autocorrelation(profile: np.ndarray) -> np.ndarray:
    """Lag-1 autocorrelation along the last axis [..., n] -> [...].

    sum_i c_i c_(i+1) / sum_i c_i^2 with c the centred values (Box and Jenkins' estimator).
    """
    centred = profile - profile.mean(-1, keepdims=True)
    products: np.ndarray = (centred[..., :-1] * centred[..., 1:]).sum(-1)
    autocorrelation: np.ndarray = products / (centred**2).sum(-1)
    return autocorrelation


def clustering_p_value(profile: np.ndarray) -> float:
    """Share of orders of a depth profile [n] at least as autocorrelated as the given one (one-sided).

    The given order counts as one of them, so the value is never 0 (Phipson and Smyth 2010).
    """
    generator = np.random.default_rng(SEED)
    shuffled = generator.permuted(np.tile(profile, (PERMUTATIONS, 1)), axis=1)
    reached = lag_one_autocorrelation(shuffled) >= lag_one_autocorrelation(profile) - 1e-12
    return float((1 + reached.sum()) / (1 + PERMUTATIONS))


def hub_p_value(strength: np.ndarray) -> float:
    """Chance of a hub as strong as the strongest node of a complete graph [n, n] (symmetric, diagonal unused).

    A node's strength is the mean rank of its edges. The null shuffles all edges over the graph, so
    the maximum over nodes is compared with the maximum over nodes: no correction for n is needed.
    """
    rows, columns = np.triu_indices(len(strength), k=1)
    ranks = strength[rows, columns].argsort().argsort().astype(float)
    generator = np.random.default_rng(SEED)
    shuffled = generator.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
    given, null = (_strongest_node(edges, rows, columns, len(strength)) for edges in (ranks[None], shuffled))
    return float((1 + (null >= given - 1e-12).sum()) / (1 + PERMUTATIONS))


def _strongest_node(edges: np.ndarray, rows: np.ndarray, columns: np.ndarray, nodes: int) -> np.ndarray:
    incidence = np.zeros((len(rows), nodes))
    incidence[np.arange(len(rows)), rows] = incidence[np.arange(len(rows)), columns] = 1
    strongest: np.ndarray = (edges @ incidence).max(axis=1) / (nodes - 1)
    return strongest
