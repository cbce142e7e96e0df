"""Correlations that one outlying layer cannot carry."""

from __future__ import annotations

import numpy as np
import scipy
import xarray as xr


def spearman(x: xr.DataArray, y: xr.DataArray) -> float:
    """Spearman's rank correlation of two arrays over the same labels [n]; mid-ranks for ties.

    NaN where either array is constant, for then no order exists.
    """
    return _pearson(*map(scipy.stats.rankdata, _paired(x, y)))


def pearson(x: xr.DataArray, y: xr.DataArray) -> float:
    """Pearson's correlation of two arrays over the same labels [n]; NaN where either is constant."""
    a, b = _paired(x, y)
    return _pearson(a.astype(float), b.astype(float))


def _paired(x: xr.DataArray, y: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    if x.dims != y.dims or not all(x.get_index(name).equals(y.get_index(name)) for name in x.dims):
        x, y = xr.align(x, y, join="exact")  # says what differs
    return x.values, y.values


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")
