"""What a matrix of independent Gaussian entries would show: the null of every comparison between shapes.

The squared singular values of such a matrix [m, n], over N = max(m, n), follow Marchenko and Pastur's law with
c = min / max, once the entries have variance 1. Statistics that do not depend on the entries' variance depend on
the shape alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lab.statistics.spectra import Spectrum

GRID = 20_000  #: points on which the law's distribution function is summed


def gaussian_effective_rank_ratio(rows: float | np.ndarray, columns: float | np.ndarray) -> np.ndarray:
    """Effective rank over min(m, n) of a Gaussian matrix [m, n]: max(m, n) / (m + n + 1).

    From E tr(W'W) = mn and E tr(W'W)^2 = mn (m + n + 1); the ratio of expectations, exact for large matrices.
    """
    ratio: np.ndarray = np.maximum(rows, columns) / (np.asarray(rows) + columns + 1)
    return ratio


def product_effective_rank_ratio(rank: float, first: float, second: float) -> float:
    """Effective rank over k of A' B with Gaussian A [k, m], B [k, n]: 1 / (1 + k/m + k/n) for large matrices.

    A A' / m and B B' / n are asymptotically free, with first moments 1 and second moments 1 + k/m and 1 + k/n; the
    second moment of a free product is m2(a) + m2(b) - 1 (Nica and Speicher, Lectures on free probability, 14).
    """
    return 1 / (1 + rank / first + rank / second)


@lru_cache(maxsize=256)
def gaussian_spectrum(rows: int, columns: int) -> Spectrum:
    """Singular values of a typical Gaussian matrix [m, n] of unit variance: Marchenko-Pastur quantiles.

    The i-th of k is the quantile (i - 1/2) / k. No random numbers are drawn.
    """
    small, large = sorted((int(rows), int(columns)))
    levels = (np.arange(small, 0, -1) - 0.5) / small
    return Spectrum(np.sqrt(large * marchenko_pastur_quantiles(levels, small / large)), int(rows), int(columns))


def marchenko_pastur_quantiles(levels: np.ndarray, ratio: float) -> np.ndarray:
    """Quantiles of Marchenko and Pastur's law with unit variance at the given levels in (0, 1).

    density(x) = sqrt((b - x)(x - a)) / (2 pi c x), a, b = (1 -+ sqrt c)^2. Substituting x = (1 + c) - 2 sqrt(c) cos t
    takes the square roots out of the integrand, which is then smooth on (0, pi).

    Args:
        levels: in (0, 1), any order.
        ratio: c = min(m, n) / max(m, n), in (0, 1].
    """
    step = np.pi / GRID
    middles = (np.arange(GRID) + 0.5) * step
    density = 2 * np.sin(middles) ** 2 / (np.pi * (1 + ratio - 2 * np.sqrt(ratio) * np.cos(middles)))
    cumulated = np.concatenate([[0.0], np.cumsum(density) * step])
    angles = np.interp(levels, cumulated / cumulated[-1], np.arange(GRID + 1) * step)
    quantiles: np.ndarray = 1 + ratio - 2 * np.sqrt(ratio) * np.cos(angles)
    return quantiles


def spiked_singular_value(strength: float, rows: int, columns: int, deviation: float = 1.0) -> float:
    """Largest singular value of noise [m, n] of this standard deviation plus a rank-one matrix of this norm.

    sqrt((t^2 + s^2 m)(t^2 + s^2 n)) / t above the threshold t > s (mn)^(1/4), and the edge s (sqrt m + sqrt n)
    below it (Benaych-Georges and Nadakuditi 2012).
    """
    if strength <= deviation * (rows * columns) ** 0.25:
        return deviation * float(np.sqrt(rows) + np.sqrt(columns))
    grown = [strength**2 + deviation**2 * size for size in (rows, columns)]
    return float(np.sqrt(grown[0] * grown[1])) / strength
