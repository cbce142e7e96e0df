"""Contrasts between kinds of pairs, layer by layer: permutation tests over groups, corrected for the number of layers.

Pairs of one group are not independent; average them first (`group_means`). Layers are strongly correlated too, which
the tests respect by permuting whole groups with all their layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lab.statistics.permutation import share_reached

PERMUTATIONS = 10_000
SIGNIFICANT = 0.05
SEED = 20260704
#: null values at least as large as the observed one count, up to rounding
_SAME = 1e-6


@dataclass(frozen=True)
class Contrast:
    """One kind of pairs against another, layer by layer.

    Attributes:
        difference: mean of the first kind minus mean of the second [layer].
        p: two-sided permutation p values [layer].
        q: the same adjusted for the number of layers (Benjamini and Hochberg).
    """

    difference: np.ndarray
    p: np.ndarray
    q: np.ndarray

    def found(self, layers: Iterable[int], *, sign: int) -> bool:
        """Whether one of these layers at least has a significant difference of this sign (1 or -1)."""
        return any(self.q[layer] < SIGNIFICANT and sign * self.difference[layer] > 0 for layer in layers)


def paired_contrast(differences: np.ndarray) -> Contrast:
    """Contrast of matched pairs, from their differences [n, layer], tested by random signs of whole rows."""
    p = sign_flip_p_values(differences)
    return Contrast(differences.mean(0), p, benjamini_hochberg(p))


def grouped_contrast(values: np.ndarray, labels: np.ndarray, strata: np.ndarray | None = None) -> Contrast:
    """Contrast of groups that are not matched; see `label_p_values` for the arguments."""
    p = label_p_values(values, labels, strata)
    return Contrast(label_contrast(values, labels, strata), p, benjamini_hochberg(p))


def group_means(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the pairs of each group [g, k], and the index of each group's first pair [g].

    Args:
        values: of pairs [n, k].
        groups: label of each pair's group [n].
    """
    _, first, index, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    sums = np.zeros((len(first), values.shape[1]))
    np.add.at(sums, index, values)
    return sums / counts[:, None], first


def eta_squared(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of the variance that lies between classes [k]: between sum of squares / total sum of squares.

    Args:
        values: [n, k].
        labels: class of each row [n].
    """
    total = ((values - values.mean(0)) ** 2).sum(0)
    between = np.zeros(values.shape[1])
    for label in np.unique(labels):
        members = values[labels == label]
        between += len(members) * (members.mean(0) - values.mean(0)) ** 2
    share: np.ndarray = between / total
    return share


def sign_flip_p_values(differences: np.ndarray) -> np.ndarray:
    """Two-sided p values [k] of mean paired differences [n, k] under random signs of whole rows.

    The given signs count as one of the permutations, so that no value is 0 (Phipson and Smyth 2010).
    """
    values = differences.astype(np.float32)
    null = np.abs(_signs(len(values)) @ values)
    return _share_reached(np.abs(values.sum(0)), null)


def label_contrast(values: np.ndarray, labels: np.ndarray, strata: np.ndarray | None = None) -> np.ndarray:
    """Difference [k] between the rows labelled True and the others, at equal stratum.

    The least squares coefficient of the label beside one constant per stratum; without strata, a difference of means.
    """
    centred = _centred(labels.astype(float), strata)
    difference: np.ndarray = centred @ values / (centred**2).sum()
    return difference


def label_p_values(values: np.ndarray, labels: np.ndarray, strata: np.ndarray | None = None) -> np.ndarray:
    """Two-sided p values [k] of `label_contrast`, under permutations of the labels within strata.

    Args:
        values: one row per group [n, k].
        labels: truth value of each row [n].
        strata: class of each row within which labels may be exchanged [n]; None is one class.
    """
    strata = np.zeros(len(labels)) if strata is None else strata
    generator = np.random.default_rng(SEED)
    shuffled = np.tile(_centred(labels.astype(float), strata), (PERMUTATIONS, 1))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        shuffled[:, members] = generator.permuted(shuffled[:, members], axis=1)
    # labels that sum to 0 in every stratum see nothing of the strata's means, so values need no centring
    return _share_reached(np.abs(_centred(labels.astype(float), strata) @ values), np.abs(shuffled @ values))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p values [k] that control the false discovery rate (Benjamini and Hochberg 1995); NaN are no tests."""
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested])]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return adjusted


def _centred(values: np.ndarray, strata: np.ndarray | None) -> np.ndarray:
    """Values less the mean of their stratum."""
    if strata is None:
        whole: np.ndarray = values - values.mean(0)
        return whole
    centred = np.array(values, dtype=float)
    for stratum in np.unique(strata):
        centred[strata == stratum] -= centred[strata == stratum].mean(0)
    return centred


def _share_reached(given: np.ndarray, null: np.ndarray) -> np.ndarray:
    return share_reached(given, null, given * _SAME)


@lru_cache(maxsize=8)
def _signs(n: int) -> np.ndarray:
    # drawn once: bootstrap resamples and layers share the same permutations
    return np.random.default_rng(SEED).choice(np.array([-1, 1], np.float32), (PERMUTATIONS, n))
