"""Whether few differences have a sign: their share, tests of their mean and median, and families of tests."""

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
