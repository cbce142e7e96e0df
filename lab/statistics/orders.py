"""How well an order was recovered: Kendall's tau, exact places, displacements, and what chance gives.

An order lists the items 0..n-1 as they were placed, `order[..., position] = item`; its inverse lists where each
item went, `positions[..., item] = position`. All functions take any number of leading axes.
"""

from __future__ import annotations

import numpy as np
import scipy


def positions_of(orders: np.ndarray) -> np.ndarray:
    """Where each item was placed [..., n], from orders [..., n]; the same turns positions into orders."""
    inverse: np.ndarray = np.argsort(orders, axis=-1, kind="stable")
    return inverse


def inversions(orders: np.ndarray) -> np.ndarray:
    """Pairs in the wrong relative order [...]; the same for an order and for its positions."""
    first, second = np.triu_indices(np.shape(orders)[-1], k=1)
    wrong: np.ndarray = (orders[..., first] > orders[..., second]).sum(-1)
    return wrong


def kendall_tau(orders: np.ndarray) -> np.ndarray:
    """Kendall's tau against 0..n-1 [...]: 1 - 4 inversions / (n (n - 1)); the share of pairs in order is (1 + tau) / 2.

    Without ties tau-a and tau-b are the same (Kendall 1938). NaN for fewer than two items.
    """
    n = np.shape(orders)[-1]
    if n < 2:
        return np.full(np.shape(orders)[:-1], np.nan)
    tau: np.ndarray = 1 - 4 * inversions(orders) / (n * (n - 1))
    return tau


def position_accuracy(orders: np.ndarray) -> np.ndarray:
    """Share of positions that hold the right item [...]."""
    share: np.ndarray = (orders == np.arange(np.shape(orders)[-1])).mean(-1)
    return share


def displacements(orders: np.ndarray) -> np.ndarray:
    """|order[p] - p| [..., n]: how far the item at each position is from home; 0..n-1 in order has none.

    Its mean is the same over positions as over items; a random order has (n^2 - 1) / (3 n) on average.
    """
    far: np.ndarray = np.abs(orders - np.arange(np.shape(orders)[-1]))
    return far


def chance_deviation(n: int) -> float:
    """Standard deviation of tau of a uniformly random order of n items, sqrt(2 (2n + 5) / (9 n (n - 1))); mean 0."""
    return float(np.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1))))


def chance_p_value(tau: float, n: int) -> float:
    """Chance that a random order has |tau| at least as large, by the normal approximation (good from n = 10 on).

    Two-sided: an order that may be reversed as a whole, as chains are, has two attempts.
    """
    return float(2 * scipy.stats.norm.sf(abs(tau) / chance_deviation(n)))
