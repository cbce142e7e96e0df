"""Profiles over depth: how they differ between zones, and how far a few layers carry what they seem to show.

Neighbouring layers are alike, so tests that take them for independent overstate the evidence: a circular shift keeps
a profile's autocorrelation, and leaving out each layer in turn shows which one a correlation rests on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy
import xarray as xr

Profile = np.ndarray | xr.DataArray


def welch_p_value(profile: Profile, border: int) -> float:
    """Two-sided p-value of Welch's t-test between the layers before `border` and those from it on [n]."""
    values = np.asarray(profile, dtype=float)
    return float(scipy.stats.ttest_ind(values[:border], values[border:], equal_var=False).pvalue)


def zone_difference(profile: Profile, border: int) -> float:
    """Mean from layer `border` on minus mean before it, of a profile [n]."""
    values = np.asarray(profile, dtype=float)
    return float(values[border:].mean() - values[:border].mean())


def zone_shift_p_value(profile: Profile, border: int) -> float:
    """Share of the n circular shifts of a profile [n] whose zones differ by as much, either way, as the given ones.

    The null for two zones of an autocorrelated profile: only where the border lies is left to chance.
    """
    values = np.asarray(profile, dtype=float)
    null = np.array([abs(zone_difference(np.roll(values, shift), border)) for shift in range(len(values))])
    # The shift by nothing is one of them, so the share is never 0.
    return float((null >= null[0] - 1e-12).mean())


def best_split(profile: Profile, shortest: int = 2) -> tuple[int, float]:
    """Where two constant segments fit a profile [n] best: first layer of the second one, and share of variance.

    Args:
        profile: values by depth, not all equal.
        shortest: least length of a segment.
    """
    values = np.asarray(profile, dtype=float)
    borders = range(shortest, len(values) - shortest + 1)
    shares = [explained_by_split(values, border) for border in borders]
    best = int(np.argmax(shares))
    return borders[best], shares[best]


def explained_by_split(profile: Profile, border: int) -> float:
    """Share of a profile's variance [n] that two constants, before `border` and from it on, explain."""
    values = np.asarray(profile, dtype=float)
    rest = sum(float(((part - part.mean()) ** 2).sum()) for part in (values[:border], values[border:]))
    return 1 - rest / float(((values - values.mean()) ** 2).sum())


def label_of_largest(profile: xr.DataArray) -> int:
    """The label of a profile's largest value [n], NaN left out, the first of equals: `idxmax` in a 50th of the time.

    Raises:
        ValueError: all values are NaN.
    """
    return int(profile.get_index(profile.dims[0])[np.nanargmax(profile.values)])


def pearson_of(x: Profile, y: Profile) -> float:
    """Pearson's correlation of two profiles [n] in the same order, whatever their labels; NaN where one is constant.

    Where one of two labelled profiles is shorter, as in models that have attention in some layers only, those layers
    count that both have; so it is for `spearman_of` and `without_each`.
    """
    a, b = (values - values.mean() for values in _pair(x, y))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def spearman_of(x: Profile, y: Profile) -> float:
    """Spearman's correlation of two profiles [n] in the same order, mid-ranks for ties."""
    return pearson_of(*map(scipy.stats.rankdata, _pair(x, y)))


def p_value_of(correlation: float, n: int) -> float:
    """Two-sided p-value of a correlation of n independent pairs, by Student's t with n - 2 degrees of freedom."""
    if abs(correlation) >= 1:
        return 0.0
    t = abs(correlation) * np.sqrt((n - 2) / (1 - correlation**2))
    return float(2 * scipy.stats.t.sf(t, n - 2))


def without_each(x: Profile, y: Profile, correlate: Callable[[Profile, Profile], float]) -> np.ndarray:
    """The correlation of two profiles [n] without each layer in turn [n]."""
    rest = [np.stack([np.delete(values, layer) for layer in range(len(values))]) for values in _pair(x, y)]
    if correlate is spearman_of:  # scipy ranks all rows in the time of one
        rest, correlate = [scipy.stats.rankdata(rows, axis=1) for rows in rest], pearson_of
    return np.array([correlate(a, b) for a, b in zip(*rest, strict=True)])


def _pair(x: Profile, y: Profile) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(x, xr.DataArray) and isinstance(y, xr.DataArray) and len(x) != len(y):
        x, y = xr.align(x, y, join="inner")
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)
