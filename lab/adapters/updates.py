"""What an adapter does to a weight matrix, from the factors of its update: no SVD, and no second Gram product."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lab.adapters.lora import Factors
from lab.adapters.merging import bfloat16, merge
from lab.statistics.spectra import effective_rank_of_gram, gram, top_right_subspace

LEADING = 0.05  #: share of min(shape) that counts as the leading directions of a weight
NAMES = (
    "update_relative_norm",
    "merge_loss",
    "merge_unchanged_fraction",
    "effective_rank_ratio_change",
    "subspace_overlap_left",
    "subspace_overlap_right",
)


def leading(shape: Sequence[int]) -> int:
    """Number of leading directions, k = 5 % of min(shape)."""
    return max(1, round(LEADING * min(shape)))


class WeightUnderStudy:
    """A weight matrix W [out, in] with what all its updates are compared to.

    Args:
        weight: on the bfloat16 grid; it is put there if it is not.
    """

    def __init__(self, weight: np.ndarray):
        self.weight = bfloat16(weight)
        self.tall = weight.shape[0] >= weight.shape[1]
        self.gram = gram(self.weight)
        self.norm = float(np.sqrt(np.trace(self.gram)))
        self.left, self.right = _leading_subspaces(self.weight)

    @property
    def effective_rank_ratio(self) -> float:
        """Participation ratio of the squared singular values over min(shape)."""
        return effective_rank_of_gram(self.gram) / float(min(self.weight.shape))

    def changed_by(self, factors: Factors) -> dict[str, float]:
        """What an update does, by the names of `NAMES`; NaN for an update of 0."""
        down, up = factors.down.astype(np.float64), factors.scale * factors.up.astype(np.float64)
        size = update_norm(factors)
        merging = merge(self.weight, factors.update)
        after = effective_rank_of_gram(self._gram_after(down, up)) / min(self.weight.shape)
        return {
            "update_relative_norm": size / self.norm,
            "merge_loss": merging.loss,
            "merge_unchanged_fraction": merging.unchanged,
            "effective_rank_ratio_change": after - self.effective_rank_ratio,
            "subspace_overlap_left": _share(size, self.left.T @ up, down @ down.T),
            "subspace_overlap_right": _share(size, (down @ self.right).T, up.T @ up),
        }

    def _gram_after(self, down: np.ndarray, up: np.ndarray) -> np.ndarray:
        """The smaller Gram matrix of W + B A from W's own: G + P A + (P A)' + A'(B'B)A with P = W'B, or transposed."""
        weight = self.weight.astype(np.float64)
        inner, outer = (down, up) if self.tall else (up.T, down.T)
        cross = (outer.T @ (weight if self.tall else weight.T)).T @ inner
        after: np.ndarray = self.gram + cross + cross.T + inner.T @ (outer.T @ outer) @ inner
        return after


def update_norm(factors: Factors) -> float:
    """||s B A||_F = s sqrt(tr((A A')(B'B))): r x r products alone."""
    down, up = factors.down.astype(np.float64), factors.up.astype(np.float64)
    squared = float(np.vdot(down @ down.T, up.T @ up))
    return float(factors.scale * np.sqrt(max(0.0, squared)))


def _share(size: float, projected: np.ndarray, other: np.ndarray) -> float:
    """||U' B A||_F^2 / ||B A||_F^2 from U'B [k, r] and A A' [r, r] (or the same of the other side)."""
    return float(np.vdot(projected @ other, projected)) / size**2 if size else float("nan")


def _leading_subspaces(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leading left [out, k] and right [in, k] singular vectors, from the smaller side's Gram matrix."""
    wide = weight.astype(np.float64)
    count = leading(weight.shape)
    if weight.shape[0] >= weight.shape[1]:
        right = top_right_subspace(wide, count)
        return _unit(wide @ right), right
    left = top_right_subspace(wide.T, count)
    return left, _unit(wide.T @ left)


def _unit(columns: np.ndarray) -> np.ndarray:
    """Columns at length 1: W v has the length of its singular value."""
    unit: np.ndarray = columns / np.linalg.norm(columns, axis=0)
    return unit
