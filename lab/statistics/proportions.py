"""Shares of right answers compared: exact tests and intervals for two models on the same, or as many, problems."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

NORMAL_95 = 1.959963984540054  #: the normal distribution's 97.5 % quantile


@lru_cache(maxsize=4096)
def fisher_p_value(right: int, other_right: int, problems: int) -> float:
    """Two-sided p-value of Fisher's exact test for two counts of right answers, each of so many problems."""
    table = [[right, problems - right], [other_right, problems - other_right]]
    return float(stats.fisher_exact(table).pvalue)


@lru_cache(maxsize=4096)
def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: a coin toss for each problem that one of two models alone solves.

    1 where there is no such problem.
    """
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def best_case_p_value(right: int, other_right: int) -> float:
    """Smallest p-value that McNemar's test could give for two counts: all discordant problems in one direction."""
    return mcnemar_p_value(abs(right - other_right), 0)


def paired_p_value(right: np.ndarray, other_right: np.ndarray) -> float:
    """`mcnemar_p_value` of two vectors of right answers to the same problems [problem], truth values."""
    first, second = np.asarray(right, dtype=bool), np.asarray(other_right, dtype=bool)
    return mcnemar_p_value(int((first & ~second).sum()), int((second & ~first).sum()))


def wilson_interval(right: int, problems: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    share, z = right / problems, NORMAL_95
    centre = share + z**2 / (2 * problems)
    reach = z * np.sqrt(share * (1 - share) / problems + z**2 / (4 * problems**2))
    low, high = (float((centre + sign * reach) / (1 + z**2 / problems)) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def difference_half_width(share: float, other_share: float, problems: int) -> float:
    """Half of the 95 % interval of the difference of two shares, each of so many problems (normal approximation)."""
    variance = share * (1 - share) + other_share * (1 - other_share)
    return float(NORMAL_95 * np.sqrt(variance / problems))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of k independent runs by Student's t with k - 1 degrees of freedom; NaN for one run."""
    runs = np.asarray(values, dtype=float)
    if len(runs) < 2:
        return float("nan"), float("nan")
    reach = stats.t.ppf(0.975, len(runs) - 1) * runs.std(ddof=1) / np.sqrt(len(runs))
    return float(runs.mean() - reach), float(runs.mean() + reach)


def bootstrap_interval(differences: np.ndarray, resamples: int = 10_000, seed: int = 20260704) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences [problem], whole problems drawn with replacement."""
    values = np.asarray(differences, dtype=float)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
    return float(low), float(high)
