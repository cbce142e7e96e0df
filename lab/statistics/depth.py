"""Profiles over depth: how they differ between zones, and how far a few layers carry what they seem to show.

Neighbouring layers are alike, so tests that take them for independent overstate the evidence: a circular shift keeps
a profile's autocorrelation, and leaving out each layer in turn shows which one a correlation rests on.
"""

from __future__ import annotations

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
    # The shift by nothing is one of them, so the share is never 0; of a profile with NaN nothing is known.
    return float((null >= null[0] - 1e-12).mean()) if np.isfinite(null[0]) else float("nan")


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
