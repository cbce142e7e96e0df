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

    NaN for a profile that is constant or has NaN.
    """
    generator = np.random.default_rng(SEED)
    shuffled = generator.permuted(np.tile(profile, (PERMUTATIONS, 1)), axis=1)
    return float(share_reached(lag_one_autocorrelation(profile), lag_one_autocorrelation(shuffled), 1e-12))


def hub_p_value(strength: np.ndarray) -> float:
    """Chance of a hub as strong as the strongest node of a complete graph [n, n] (symmetric, diagonal unused).

    A node's strength is the mean rank of its edges. The null shuffles all edges over the graph, so
    the maximum over nodes is compared with the maximum over nodes: no correction for n is needed. NaN if an edge is.
    """
    rows, columns = np.triu_indices(len(strength), k=1)
    if np.isnan(strength[rows, columns]).any():
        return float("nan")
    ranks = strength[rows, columns].argsort().argsort().astype(float)
    generator = np.random.default_rng(SEED)
    shuffled = generator.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
    given, null = (_strongest_node(edges, rows, columns, len(strength)) for edges in (ranks[None], shuffled))
    return float(share_reached(given[0], null, 1e-12))


def share_reached(given: np.ndarray | float, null: np.ndarray, tolerance: np.ndarray | float) -> np.ndarray:
    """Share of the permuted statistics that are as large as the given one; the p-value of a one-sided test.

    The given arrangement counts as one of them, so the share is never 0 (Phipson and Smyth 2010). NaN where the
    statistic is: what cannot be said of the given data is no evidence.

    Args:
        given: the statistic of the data [...].
        null: the same of permuted data [permutation, ...].
        tolerance: what counts as equal, for rounding [...].
    """
    share = (1 + (null >= given - tolerance).sum(0)) / (1 + len(null))
    return np.where(np.isnan(given), np.nan, share)


def _strongest_node(edges: np.ndarray, rows: np.ndarray, columns: np.ndarray, nodes: int) -> np.ndarray:
    incidence = np.zeros((len(rows), nodes))
    incidence[np.arange(len(rows)), rows] = incidence[np.arange(len(rows)), columns] = 1
    strongest: np.ndarray = (edges @ incidence).max(axis=1) / (nodes - 1)
    return strongest
