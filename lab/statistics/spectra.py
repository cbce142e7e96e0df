"""The spectrum of a matrix: singular values from its Gram matrix, and how many directions they amount to.

For a matrix [m, n] with k = min(m, n), singular values s_1 >= ... >= s_k, energies e_i = s_i^2 and shares
p_i = e_i / sum(e). All arithmetic is float64: the Gram matrix squares the condition number, and float32 would
lose s_k where s_1 / s_k exceeds about 3000.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lab.statistics.spectrum_size import participation_ratio

#: condition number from which the Gram matrix, whose own is its square, gives s_k to less than five digits
GRAM_LIMIT = 1e5
TAIL = 0.1  #: share of the largest energies that a tail estimate reads
TRACY_WIDOM_99 = 2.02  #: 99 % quantile of the largest eigenvalue's fluctuation, real matrices
RANK_TOLERANCE = 1e-6  #: absolute, as in the source


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Singular values of a matrix [m, n], largest first [min(m, n)], float64.

    The roots of the eigenvalues of the smaller of W W' and W' W: half the arithmetic of an SVD, most of it in one
    symmetric product. Matrices whose condition number exceeds `GRAM_LIMIT` go through the SVD.
    """
    energies = np.linalg.eigvalsh(gram(matrix))[::-1]
    if energies[-1] * GRAM_LIMIT**2 < energies[0]:
        values: np.ndarray = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
        return values
    return np.sqrt(energies)


def gram(matrix: np.ndarray) -> np.ndarray:
    """The smaller of W W' and W' W [min(m, n), min(m, n)] in float64."""
    wide = np.asarray(matrix, dtype=np.float64)
    tall = wide.T if wide.shape[0] < wide.shape[1] else wide
    product: np.ndarray = tall.T @ tall  # numpy sees that the factors are one matrix and forms half of the product
    return product


def effective_rank_of_gram(product: np.ndarray) -> float:
    """Participation ratio from a Gram matrix alone: ||W||_F^4 / ||W'W||_F^2, no eigenvalues needed."""
    total = float(np.trace(product))
    return total**2 / float(np.vdot(product, product)) if total else float("nan")


@dataclass(frozen=True)
class Spectrum:
    """Statistics of singular values [k], largest first, of a matrix of shape [rows, columns]."""

    values: np.ndarray
    rows: int
    columns: int

    @property
    def energies(self) -> np.ndarray:
        """Squared singular values e [k]."""
        squares: np.ndarray = self.values**2
        return squares

    @property
    def frobenius_norm_squared(self) -> float:
        """Sum of the energies."""
        return float(self.energies.sum())

    @property
    def effective_rank(self) -> float:
        """Participation ratio of the energies, (sum e)^2 / sum e^2 = 1 / sum p^2, between 1 and k; NaN for zeros."""
        return participation_ratio(self.energies)

    @property
    def stable_rank(self) -> float:
        """Energies over the largest of them, sum e / e_1; never more than the effective rank."""
        return self.frobenius_norm_squared / float(self.energies[0]) if self.values[0] else float("nan")

    @property
    def spectral_entropy(self) -> float:
        """Shannon entropy of the shares over ln k: -sum p ln p / ln k; 1 for a flat spectrum."""
        if not self.values[0] or len(self.values) < 2:
            return float("nan")
        shares = self.energies[self.values > 0] / self.frobenius_norm_squared
        return float(-(shares * np.log(shares)).sum() / np.log(len(self.values)))

    def energy_rank(self, percent: float) -> int:
        """Fewest leading singular values that hold `percent` of the energy."""
        cumulated = np.cumsum(self.energies) / self.frobenius_norm_squared
        # What sums lose must not cost a rank where the limit is met exactly.
        return min(int(np.searchsorted(cumulated, percent / 100 - 1e-12)) + 1, len(self.values))

    @property
    def numerical_rank(self) -> int:
        """Singular values above 1e-6, an absolute tolerance as in the source."""
        return int((self.values > RANK_TOLERANCE).sum())

    @property
    def condition_number(self) -> float:
        """s_1 over the smallest singular value that the numerical rank counts."""
        return float(self.values[0] / self.values[self.numerical_rank - 1]) if self.numerical_rank else float("nan")

    @property
    def power_law(self) -> tuple[float, float]:
        """Exponent and R^2 of s_i ~ i^-exponent: least squares of ln s_i on ln i over the numerical rank.

        Almost all points lie in the bulk, so compare with the same fit to a random matrix of this shape.
        """
        return power_law(self.values[: self.numerical_rank])

    @property
    def noise_edge(self) -> float:
        """Largest energy of a random matrix of this shape and norm, exceeded in 1 % of them.

        s^2 ((sqrt m + sqrt n)^2 + 2.02 (sqrt m + sqrt n)(1/sqrt m + 1/sqrt n)^(1/3)) with s^2 = ||W||_F^2 / (mn): the
        edge of the bulk and the 99 % quantile of Tracy and Widom's law about it (Johnstone 2001).
        """
        variance = self.frobenius_norm_squared / (self.rows * self.columns)
        reach = np.sqrt(self.rows) + np.sqrt(self.columns)
        fluctuation = reach * (1 / np.sqrt(self.rows) + 1 / np.sqrt(self.columns)) ** (1 / 3)
        return float(variance * (reach**2 + TRACY_WIDOM_99 * fluctuation))

    @property
    def outliers(self) -> int:
        """Energies above `noise_edge`: directions that no random matrix of this size would have."""
        return int((self.energies > self.noise_edge).sum())

    @property
    def outlier_energy_share(self) -> float:
        """Share of the energy that the outliers hold."""
        return float(self.energies[: self.outliers].sum() / self.frobenius_norm_squared)

    @property
    def tail_exponent(self) -> float:
        """Hill's estimate of alpha, density(e) ~ e^-alpha, on the largest tenth of the energies; see `hill`."""
        return hill(self.energies, min(max(2, round(TAIL * len(self.values))), len(self.values)))


def power_law(values: np.ndarray) -> tuple[float, float]:
    """Exponent a and R^2 of values_i ~ i^-a [k], i from 1: least squares in natural logarithms, equal weights.

    R^2 is 1 for equal values, which the fit meets exactly. NaN with fewer than two values.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    x, y = np.log(np.arange(1, len(values) + 1)), np.log(values)
    x, y = x - x.mean(), y - y.mean()
    explained = float(x @ y) ** 2 / float(x @ x)
    total = float(y @ y)
    return float(-(x @ y) / (x @ x)), explained / total if total > 1e-20 * len(y) else 1.0


def hill(energies: np.ndarray, count: int) -> float:
    """Hill's maximum-likelihood exponent of the largest `count` energies [k], largest first.

    alpha = 1 + count / sum_i ln(e_i / e_count), the exponent of the density beyond the threshold e_count
    (Hill 1975; Clauset, Shalizi and Newman 2009). NaN where they are all equal.
    """
    logarithms = np.log(energies[:count] / energies[count - 1]).sum()
    return float(1 + count / logarithms) if logarithms > 0 else float("nan")


def circuit_energies(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared singular values of A' B [k], largest first, of two factors with k rows each [k, m], [k, n].

    They are the eigenvalues of (A A')(B B'), a k x k problem, whatever m and n: with the root R of A A', those of
    R (B B') R.
    """
    left, right = (np.asarray(factor, dtype=np.float64) for factor in (first, second))
    values, vectors = np.linalg.eigh(left @ left.T)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    energies: np.ndarray = np.maximum(np.linalg.eigvalsh(root @ (right @ right.T) @ root)[::-1], 0)
    return energies


def top_right_subspace(matrix: np.ndarray, count: int) -> np.ndarray:
    """Orthonormal right singular vectors of the `count` largest singular values of a matrix [m, n] -> [n, count]."""
    from scipy.linalg import eigh

    wide = np.asarray(matrix, dtype=np.float64)
    n = wide.shape[1]
    _, vectors = eigh(wide.T @ wide, subset_by_index=(n - count, n - 1), check_finite=False)
    return np.asarray(vectors)


def subspace_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared cosine of the principal angles of two subspaces [n, r]: ||A' B||_F^2 / r; r / n by chance."""
    return float(np.square(first.T @ second).sum() / first.shape[1])
