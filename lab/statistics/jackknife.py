"""Jackknife pseudo-values: means over pairs of prompts as means over prompts, which the bootstrap can resample."""

from __future__ import annotations

import numpy as np


def pair_mean_pseudovalues(similarity: np.ndarray) -> np.ndarray:
    """One value per item [..., n] whose mean is the mean of a symmetric similarity [..., n, n] over pairs of items.

    With U the mean over pairs i < j and U_-i the same without item i, item i's value is n U - (n - 1) U_-i (Tukey
    1958). A bootstrap of whole pairs would meet every item as its own partner; the pseudo-values have the
    jackknife's variance, which is the right one to first order.

    Raises:
        ValueError: fewer than three items: without one of two there is no pair left.
    """
    n = similarity.shape[-1]
    if n < 3:
        raise ValueError(f"the mean over pairs of {n} items has no pseudo-values; at least three are needed")
    own = np.diagonal(similarity, axis1=-2, axis2=-1)
    of_item = similarity.sum(-1) - own
    total = of_item.sum(-1, keepdims=True) / 2
    without = (total - of_item) / ((n - 1) * (n - 2) / 2)
    values: np.ndarray = n * total / (n * (n - 1) / 2) - (n - 1) * without
    return values
