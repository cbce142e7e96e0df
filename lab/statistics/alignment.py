"""Centred kernel alignment of two sets of vectors of the same things (Kornblith et al. 2019, arXiv:1905.00414)."""

from __future__ import annotations

import numpy as np

#: below it the product of norms is rounding, and the published estimator gives 0
_NOTHING = 1e-10
#: the unbiased estimator divides by n - 3
FEWEST_ROWS = 4


def linear_cka(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Linear CKA [...] of two clouds of row vectors [..., n, d], columns centred; the usual, biased estimator.

    sum(K * M) / sqrt(sum(K * K) sum(M * M)) with K = XX', M = YY'. For n much smaller than d it is near 1 whatever the
    clouds are; at n = 2 it is 1.
    """
    k, m = (_gram(cloud - cloud.mean(-2, keepdims=True)) for cloud in (x, y))
    scale = np.sqrt(_product(k, k) * _product(m, m))
    aligned: np.ndarray = np.where(scale < _NOTHING, 0.0, _product(k, m) / np.maximum(scale, _NOTHING))
    return aligned


def unbiased_cka(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """CKA [...] with the unbiased estimator of HSIC (Song et al. 2012, eq. 5), of row vectors [..., n, d].

    Near 0 for independent clouds, and it may be negative. NaN below 4 rows, where the estimator does not exist, and
    where a cloud has no positive variance by this estimator.
    """
    if x.shape[-2] < FEWEST_ROWS:
        return np.full(x.shape[:-2], np.nan)
    k, m = map(_gram, (x, y))
    own = _hsic(k, k) * _hsic(m, m)
    with np.errstate(invalid="ignore"):
        aligned: np.ndarray = np.where(own > 0, _hsic(k, m) / np.sqrt(own), np.nan)
    return aligned


def _hsic(k: np.ndarray, m: np.ndarray) -> np.ndarray:
    n = k.shape[-1]
    off = 1 - np.eye(n)
    k, m = k * off, m * off
    of_sums = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
    of_rows = 2 / (n - 2) * (k.sum(-1) * m.sum(-1)).sum(-1)
    value: np.ndarray = (_product(k, m) + of_sums - of_rows) / (n * (n - 3))
    return value


def _gram(x: np.ndarray) -> np.ndarray:
    x = x.astype(float)
    return np.asarray(x @ np.swapaxes(x, -1, -2))


def _product(k: np.ndarray, m: np.ndarray) -> np.ndarray:
    return np.asarray((k * m).sum((-2, -1)))
