"""How many directions a spectrum of variances fills."""

from __future__ import annotations

import numpy as np


def effective_rank(eigenvalues: np.ndarray, share: float = 0.95, *, leading: int | None = None) -> int:
    """Smallest number of leading eigenvalues that hold a share of their sum.

    Args:
        eigenvalues: of a covariance [d], any order.
        share: of the sum.
        leading: take the sum over so many leading eigenvalues only. The published form does so with 20, and can
            therefore not exceed 20, whatever the spectrum.
    """
    falling = np.sort(eigenvalues)[::-1][:leading].clip(min=0)
    reached = np.cumsum(falling) >= share * falling.sum()
    return int(reached.argmax()) + 1


def participation_ratio(eigenvalues: np.ndarray) -> float:
    """(sum e)^2 / sum e^2 of variances or energies [k]: how many equal ones would be as spread; NaN if all are 0.

    k for a flat spectrum, 1 for a single direction.
    """
    squares = float(eigenvalues @ eigenvalues)
    return float(eigenvalues.sum() ** 2 / squares) if squares else float("nan")
