"""Tests of profiles over few layers: signs, means, rank correlations without each layer in turn, families of tests."""

from __future__ import annotations

import numpy as np
import scipy

Profile = np.ndarray  # or anything that numpy takes for one, such as a DataArray over `layer`


def sign_share(differences: Profile) -> float:
    """Share of positive entries [n]."""
    return float((np.asarray(differences) > 0).mean())


def t_test_p_value(profile: Profile) -> float:
    """Two-sided p-value of Student's t-test that the mean of a profile [n] is zero."""
    return float(scipy.stats.ttest_1samp(np.asarray(profile), 0).pvalue)


def wilcoxon_p_value(differences: Profile) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that differences [n] are symmetric about zero."""
    return float(scipy.stats.wilcoxon(np.asarray(differences)).pvalue)


def spearman_p_value(x: Profile, y: Profile) -> float:
    """Two-sided p-value of Spearman's correlation of two profiles [n], by its t distribution."""
    return float(scipy.stats.spearmanr(np.asarray(x), np.asarray(y)).pvalue)


def leave_one_out(x: Profile, y: Profile) -> np.ndarray:
    """Spearman's correlation of two profiles [n] without each entry in turn [n]."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return np.array([_rank_correlation(np.delete(a, i), np.delete(b, i)) for i in range(len(a))])


def holm(p_values: Profile) -> np.ndarray:
    """p-values [m] of a family of tests adjusted by Holm's step-down method (Holm 1979) [m].

    The i-th smallest is multiplied by m - i, i = 0, 1, ...; the result never falls with i and is at most 1.
    """
    given = np.asarray(p_values, dtype=float)
    order = np.argsort(given)
    stepped = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1))
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def rank_correlation(x: Profile, y: Profile) -> float:
    """Spearman's correlation of two profiles [n], whatever their labels; NaN where either is constant."""
    return _rank_correlation(np.asarray(x, dtype=float), np.asarray(y, dtype=float))


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    a, b = (scipy.stats.rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")
