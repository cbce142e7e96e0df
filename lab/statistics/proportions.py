"""Shares of right answers compared: exact tests for two models on the same, or as many, problems."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy

NORMAL_95 = 1.959963984540054  #: the normal distribution's 97.5 % quantile


@lru_cache(maxsize=4096)
def fisher_p_value(right: int, other_right: int, problems: int) -> float:
    """Two-sided p-value of Fisher's exact test for two counts of right answers, each of so many problems."""
    table = [[right, problems - right], [other_right, problems - other_right]]
    return float(scipy.stats.fisher_exact(table).pvalue)


@lru_cache(maxsize=4096)
def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: a coin toss for each problem that one of two models alone solves.

    1 where there is no such problem.
    """
    discordant = only_first + only_second
    return float(scipy.stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def best_case_p_value(right: int, other_right: int) -> float:
    """Smallest p-value that McNemar's test could give for two counts: all discordant problems in one direction."""
    return mcnemar_p_value(abs(right - other_right), 0)


def paired_p_value(right: np.ndarray, other_right: np.ndarray) -> float:
    """`mcnemar_p_value` of two vectors of right answers to the same problems [problem], truth values."""
    first, second = np.asarray(right, dtype=bool), np.asarray(other_right, dtype=bool)
    return mcnemar_p_value(int((first & ~second).sum()), int((second & ~first).sum()))


def difference_half_width(share: float, other_share: float, problems: int) -> float:
    """Half of the 95 % interval of the difference of two shares, each of so many problems (normal approximation)."""
    variance = share * (1 - share) + other_share * (1 - other_share)
    return float(NORMAL_95 * np.sqrt(variance / problems))
