"""Association of symmetric matrices over the same n items, and what chance alone would give.

The n(n-1)/2 pairs of n items are not independent (each item is in n-1 of them), so a plain p-value
of a correlation over pairs is far too small. The tests here shuffle items, not pairs (Mantel 1967).
Only the upper triangle is read.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy
import xarray as xr

from lab.statistics.permutation import share_reached

PERMUTATIONS = 999
SEED = 20260704

Matrix = np.ndarray | xr.DataArray


def upper_triangle(matrix: Matrix) -> np.ndarray:
    """The entries i < j of a matrix [n, n], row by row [n(n-1)/2]."""
    values = np.asarray(matrix)
    return values[np.triu_indices(len(values), k=1)]


def matrix_correlation(x: Matrix, y: Matrix, given: Matrix | None = None) -> float:
    """Spearman's correlation over the pairs of two symmetric matrices [n, n]; NaN where either is constant.

    Args:
        x: one matrix.
        y: the other.
        given: a third one, held constant: the correlation of what its ranks leave of the ranks of x and y.
    """
    a, b = _ranks(x, given), _ranks(y, given)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def mantel_p_value(x: Matrix, y: Matrix, given: Matrix | None = None) -> float:
    """Share of relabelled copies of x that correlate with y as highly as x does (Mantel, one-sided).

    Args:
        x: symmetric matrix [n, n] whose items are relabelled.
        y: symmetric matrix [n, n]; pass its negative to test for a negative association.
        given: held constant; the residuals of the ranks are relabelled (Legendre 2000).
    """
    a, b = _ranks(x, given), _ranks(y, given)
    null = _symmetric(a).ravel()[_relabelled_pairs(len(np.asarray(x)))] @ b
    return _share_reached(float(a @ b), null)


def label_contrast(matrix: Matrix, labels: np.ndarray) -> float:
    """Mean of the pairs with different labels minus mean of the pairs with equal labels.

    Args:
        matrix: symmetric [n, n].
        labels: label of each item [n]; two labels at least, and one of them twice.
    """
    different = _different(labels)[np.triu_indices(len(labels), k=1)]
    pairs = upper_triangle(matrix)
    return float(pairs[different].mean() - pairs[~different].mean())


def label_contrast_p_value(matrix: Matrix, labels: np.ndarray) -> float:
    """Share of shuffled labels that give at least this `label_contrast` (one-sided)."""
    pairs, n = upper_triangle(matrix), len(labels)
    # The number of pairs with different labels is the same in every shuffle, so their sum orders as the contrast does.
    null = _different(labels).ravel()[_relabelled_pairs(n)] @ pairs
    given = float(_different(labels)[np.triu_indices(n, k=1)] @ pairs)
    return _share_reached(given, null)


def _ranks(matrix: Matrix, given: Matrix | None) -> np.ndarray:
    ranks = scipy.stats.rankdata(upper_triangle(matrix))
    centred: np.ndarray = ranks - ranks.mean()
    if given is None:
        return centred
    other = _ranks(given, None)
    rest: np.ndarray = centred - other * (centred @ other) / (other @ other)
    return rest


def _symmetric(pairs: np.ndarray) -> np.ndarray:
    n = round((1 + np.sqrt(1 + 8 * len(pairs))) / 2)
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, k=1)] = pairs
    return matrix + matrix.T


def _different(labels: np.ndarray) -> np.ndarray:
    different: np.ndarray = labels[:, None] != labels[None, :]
    return different


@lru_cache(maxsize=8)
def _relabelled_pairs(n: int) -> np.ndarray:
    """Where the pairs i < j lie in a flattened [n, n] matrix after each relabelling [permutation, pair]."""
    rows, columns = np.triu_indices(n, k=1)
    generator = np.random.default_rng(SEED)
    orders = generator.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)
    flat: np.ndarray = orders[:, rows] * n + orders[:, columns]
    return flat


def _share_reached(given: float, null: np.ndarray) -> float:
    return float(share_reached(given, null, 1e-9 * max(1.0, abs(given))))
