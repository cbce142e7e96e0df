"""Paths of a target's rank over depth: when it enters the shortlist for good, when it first leads, where it is hurt.

Ranks are arrays [slot, token], 0 = best. Slot 0 of the array is the token embedding, entry s + 1 the residual stream
after layer s; results are in slot labels, -1 for the embedding.
"""

from __future__ import annotations

import numpy as np

EMBEDDING = -1
SHORTLIST = 10
HURT_RANK_LIMIT = 100


def first_below(ranks: np.ndarray, limit: float = 1) -> np.ndarray:
    """First slot of rank < limit, whether or not it lasts [token]; NaN where there is none.

    With limit 1 this is the source's first top-1 layer.
    """
    below = ranks < limit
    return np.where(below.any(axis=0), below.argmax(axis=0) + EMBEDDING, np.nan)


def below_from(ranks: np.ndarray, limit: float = SHORTLIST) -> np.ndarray:
    """First slot from which rank < limit holds up to the last one [token]; NaN where the last slot fails.

    With limit 10 this is the source's crystallization layer, with limit 1 the stable top-1 layer.
    """
    above = ranks >= limit
    since = np.where(above.any(axis=0), len(ranks) - above[::-1].argmax(axis=0), 0)
    return np.where(above[-1], np.nan, since + EMBEDDING)


def hurt(ranks: np.ndarray, limit: float = HURT_RANK_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Whose rank each layer worsens, and whose it could have worsened: two masks [layer, token].

    Hurt at layer l: rank_l > rank_(l-1) and rank_(l-1) < limit. Eligible: rank_(l-1) < limit.
    """
    eligible = ranks[:-1] < limit
    return eligible & (ranks[1:] > ranks[:-1]), eligible
