"""Correlations of profiles over few layers, and how far one layer carries them.

`pearson` and `spearman` pair values by their labels and refuse labels that differ. `pearson_by_order` and
`spearman_by_order` pair the first with the first, whatever the labels: for profiles that were measured under other
names, or that have none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy
import xarray as xr

Profile = np.ndarray | xr.DataArray  # or anything else that numpy takes for an array


def pearson(x: xr.DataArray, y: xr.DataArray) -> float:
    """Pearson's correlation of two arrays over the same labels [n]; NaN where either is constant.

    Raises:
        ValueError: the labels differ.
    """
    return _pearson(*_by_label(x, y))


def spearman(x: xr.DataArray, y: xr.DataArray) -> float:
    """Spearman's rank correlation of two arrays over the same labels [n], mid-ranks for ties; NaN as in `pearson`.

    Raises:
        ValueError: the labels differ.
    """
    return _pearson(*map(scipy.stats.rankdata, _by_label(x, y)))


def pearson_by_order(x: Profile, y: Profile) -> float:
    """Pearson's correlation of two profiles [n] in the same order, whatever their labels; NaN where one is constant.

    Where one of two labelled profiles is shorter, as in models that have attention in some layers only, those layers
    count that both have; so it is for `spearman_by_order` and `without_each`.
    """
    return _pearson(*_by_order(x, y))


def spearman_by_order(x: Profile, y: Profile) -> float:
    """Spearman's correlation of two profiles [n] in the same order, mid-ranks for ties."""
    return _pearson(*map(scipy.stats.rankdata, _by_order(x, y)))


def without_each(x: Profile, y: Profile, correlate: Callable[[Profile, Profile], float]) -> np.ndarray:
    """The correlation of two profiles [n] in the same order without each entry in turn [n]."""
    rest = [np.stack([np.delete(values, entry) for entry in range(len(values))]) for values in _by_order(x, y)]
    if correlate is spearman_by_order:  # scipy ranks all rows in the time of one
        rest, correlate = [scipy.stats.rankdata(rows, axis=1) for rows in rest], pearson_by_order
    return np.array([correlate(a, b) for a, b in zip(*rest, strict=True)])


def correlation_p_value(correlation: float, n: int) -> float:
    """Two-sided p-value of a correlation of n independent pairs, by Student's t with n - 2 degrees of freedom.

    NaN for fewer than three pairs.
    """
    if n < 3:
        return float("nan")  # any two points lie on a line
    if abs(correlation) >= 1:
        return 0.0
    t = abs(correlation) * np.sqrt((n - 2) / (1 - correlation**2))
    return float(2 * scipy.stats.t.sf(t, n - 2))


def spearman_p_value(x: Profile, y: Profile) -> float:
    """Two-sided p-value of Spearman's correlation of two profiles [n] in the same order, as `correlation_p_value`."""
    pairs = _by_order(x, y)
    return correlation_p_value(spearman_by_order(*pairs), len(pairs[0]))


def _by_label(x: xr.DataArray, y: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    if x.dims != y.dims or not all(x.get_index(name).equals(y.get_index(name)) for name in x.dims):
        x, y = xr.align(x, y, join="exact")  # says what differs
    return x.values.astype(float), y.values.astype(float)


def _by_order(x: Profile, y: Profile) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(x, xr.DataArray) and isinstance(y, xr.DataArray) and len(x) != len(y):
        x, y = xr.align(x, y, join="inner")
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    # rounding leaves something of a constant less its mean, so its range is what shows it
    if not (len(x) and np.ptp(x) > 0 and np.ptp(y) > 0):
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")
