"""Correlations that one outlying layer cannot carry."""

from __future__ import annotations

import numpy as np
import scipy
import xarray as xr


def spearman(x: xr.DataArray, y: xr.DataArray) -> float:
    """Spearman's rank correlation of two arrays over the same labels [n]; mid-ranks for ties.

    NaN where either array is constant, for then no order exists.
    """
    x, y = xr.align(x, y, join="exact")
    ranks = scipy.stats.rankdata(x.values), scipy.stats.rankdata(y.values)
    return _pearson(*ranks)


def pearson(x: xr.DataArray, y: xr.DataArray) -> float:
    """Pearson's correlation of two arrays over the same labels [n]; NaN where either is constant."""
    x, y = xr.align(x, y, join="exact")
    return _pearson(x.values.astype(float), y.values.astype(float))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")
