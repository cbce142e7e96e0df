"""Shape of a cloud of points: how many directions it uses, how evenly, and how alike its points are."""

from __future__ import annotations

import numpy as np

#: eigenvalues below this do not count in the source's spectral flatness
EIGENVALUE_FLOOR = 1e-15


def participation_ratio(trace: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Effective number of directions, (sum e_i)^2 / sum e_i^2 with the eigenvalues e of a covariance matrix.

    1 for a line, d for a ball in d dimensions. Needs no decomposition: the sums are trace and squared Frobenius norm.

    Args:
        trace: tr C [...]; any common scale of C.
        square: ||C||_F^2 [...].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = np.asarray(trace) ** 2 / square
    return ratio


def spectral_flatness(eigenvalues: np.ndarray, floor: float | np.ndarray = EIGENVALUE_FLOOR) -> np.ndarray:
    """Geometric over arithmetic mean of the eigenvalues above a floor [..., n] -> [...]; 1 if all are equal."""
    kept = np.where(eigenvalues > floor, eigenvalues, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        flatness: np.ndarray = np.exp(np.nanmean(np.log(kept), axis=-1)) / np.nanmean(kept, axis=-1)
    return flatness


def rounding(eigenvalues: np.ndarray, size: int) -> np.ndarray:
    """What eigenvalues [..., n] of a float64 Gram matrix may be by rounding alone [..., 1].

    Args:
        eigenvalues: of the Gram matrix.
        size: larger side of the matrix whose Gram matrix it is, as in numpy's matrix_rank.
    """
    limit: np.ndarray = eigenvalues.max(axis=-1, keepdims=True) * size * np.finfo(np.float64).eps
    return limit


def pair_mean(sums: np.ndarray, tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean of a quantity that is 1 for a point with itself, over all ordered pairs of different points [...].

    With unit rows u, sums_rs = sum over points t of group r and v of group s of <u_t, u_v> gives the mean cosine,
    sums of <u_t, u_v>^2 the mean squared cosine: exact, where the source draws 5000 pairs.

    Args:
        sums: per pair of groups, pairs of a point with itself included [..., R, R].
        tokens: points of each group [R].
        draws: how often each group is drawn [R]; copies of a point are no pair.
    """
    itself = draws**2 @ tokens
    mean: np.ndarray = (draws @ sums @ draws - itself) / ((draws @ tokens) ** 2 - itself)
    return mean
