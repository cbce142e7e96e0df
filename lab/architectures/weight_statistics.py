"""Published norms and singular values of a speech model's weight matrices, as the quantities that claims speak of.

The figures are the source's: Frobenius norm F, largest singular value s1, and exp of the entropy of the
singular values p = s / sum s ("entropy effective rank"), which the source left out for matrices with a side above
8192, so that of a layer only the two attention matrices have one. Headers cannot give any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from lab.records import Record
from lab.statistics.correlations import spearman

#: shares of the depth that count as its beginning and its end, where the source sees other weights than between
FIRST, LAST = 0.15, 0.08


class WeightStatistics(Record):
    """Statistics of the weights of two stacks.

    Dimensions: `layer`, `fast_layer`, `matrix` (five per layer), `attention_matrix` (wqkv, wo), `tensor`
    (embeddings and output head).
    """

    sampling: ClassVar[Mapping[str, str | None]] = {}

    @cached_property
    def frobenius(self) -> xr.DataArray:
        """Mean F of the five matrices of a Slow AR layer [layer]."""
        return self.variable("slow_ar_frobenius_norm").mean("matrix")

    @cached_property
    def spectral(self) -> xr.DataArray:
        """Mean s1 of the five matrices of a Slow AR layer [layer]."""
        return self.variable("slow_ar_spectral_norm").mean("matrix")

    @cached_property
    def matrix_peakedness(self) -> xr.DataArray:
        """s1 / F of each matrix of a Slow AR layer [layer, matrix]; 1 for rank one."""
        return self.variable("slow_ar_spectral_norm") / self.variable("slow_ar_frobenius_norm")

    @cached_property
    def peakedness(self) -> xr.DataArray:
        """Mean s1 / F of the five matrices of a Slow AR layer [layer]."""
        return self.matrix_peakedness.mean("matrix")

    @cached_property
    def peaked_at_both_ends(self) -> dict[str, bool]:
        """Whether a matrix's mean s1 / F over the first 15 % and over the last 8 % is above the middle half's."""
        found = {str(name): self.matrix_peakedness.sel(matrix=name) for name in self.matrix_peakedness.matrix.values}
        return {name: min(self.beginning(own), self.end(own)) > self.middle(own) for name, own in found.items()}

    @cached_property
    def effective_rank(self) -> xr.DataArray:
        """Mean entropy effective rank of the two attention matrices of a Slow AR layer [layer]."""
        return self.variable("slow_ar_entropy_effective_rank").mean("attention_matrix")

    @cached_property
    def fast_effective_rank(self) -> xr.DataArray:
        """The same of a Fast AR layer [fast_layer]."""
        return self.variable("fast_ar_entropy_effective_rank").mean("attention_matrix")

    @cached_property
    def fast_frobenius(self) -> xr.DataArray:
        """Mean F of the five matrices of a Fast AR layer [fast_layer]."""
        return self.variable("fast_ar_frobenius_norm").mean("matrix")

    @cached_property
    def fast_spectral(self) -> xr.DataArray:
        """Mean s1 of the five matrices of a Fast AR layer [fast_layer]."""
        return self.variable("fast_ar_spectral_norm").mean("matrix")

    def rank_ratio(self, matrix: str) -> xr.DataArray:
        """Effective rank over that of an i.i.d. Gaussian matrix of the same shape [layer].

        Args:
            matrix: `attention.wqkv` or `attention.wo`.
        """
        rows, columns = self.matrix_shapes[matrix]
        found = self.variable("slow_ar_entropy_effective_rank").sel(attention_matrix=matrix)
        return found / (gaussian_effective_rank(rows / columns) * min(rows, columns))

    def tensor(self, name: str, tensor: str) -> float:
        """A statistic of an embedding or output tensor, e.g. `spectral_norm` of `text_model.model.embeddings`."""
        return float(self.variable(f"embedding_{name}").sel(tensor=tensor))

    def dominance(self, tensor: str) -> float:
        """s1 / F of an embedding or output tensor: the share of its norm along one direction."""
        return self.tensor("spectral_norm", tensor) / self.tensor("frobenius_norm", tensor)

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of a layer's matrices."""
        raise NotImplementedError

    @cached_property
    def norm_mismatch(self) -> float:
        """Largest relative difference between F and what std and mean imply, F^2 = n (std^2 (n-1)/n + mean^2).

        Means of layer matrices are not published and count as 0: they are some 1e-5 of a standard deviation.
        """
        found = []
        for stack in ("slow_ar", "fast_ar"):
            norms, spreads = self.variable(f"{stack}_frobenius_norm"), self.variable(f"{stack}_weight_std")
            sizes = xr.DataArray(
                [float(np.prod(self.matrix_shapes[str(name)])) for name in norms.matrix.values], dims="matrix"
            )
            found.append(float(np.abs(norms / (spreads * np.sqrt(sizes - 1)) - 1).max()))
        return max(found)

    @cached_property
    def spearman_with_depth(self) -> dict[str, float]:
        """Rank correlation of each layer mean with the layer's number."""
        means = {"frobenius": self.frobenius, "spectral": self.spectral, "effective_rank": self.effective_rank}
        return {name: self.trend(mean) for name, mean in means.items()}

    @staticmethod
    def trend(profile: xr.DataArray) -> float:
        """Spearman's correlation of a profile with the layer's number."""
        return spearman(profile.reset_coords(drop=True), profile.layer)

    @staticmethod
    def within(profile: xr.DataArray, first: int, last: int) -> xr.DataArray:
        """Layers `first` to `last`, both included."""
        return profile.sel(layer=slice(first, last))

    @staticmethod
    def beginning(profile: xr.DataArray) -> float:
        """Mean over the first 15 % of the layers."""
        return float(profile[: round(FIRST * profile.size)].mean())

    @staticmethod
    def middle(profile: xr.DataArray) -> float:
        """Mean over the middle half of the layers."""
        return float(profile[profile.size // 4 : profile.size - profile.size // 4].mean())

    @staticmethod
    def end(profile: xr.DataArray) -> float:
        """Mean over the last 8 % of the layers."""
        return float(profile[-round(LAST * profile.size) :].mean())

    @staticmethod
    def rest(profile: xr.DataArray) -> float:
        """Mean over all layers but the first 15 %."""
        return float(profile[round(FIRST * profile.size) :].mean())


def gaussian_effective_rank(aspect: float, points: int = 20_000) -> float:
    """Entropy effective rank of a large i.i.d. Gaussian matrix over its smaller side.

    Singular values follow the Marchenko-Pastur law: s^2 has density sqrt((b - x)(x - a)) / (2 pi c x) on [a, b] =
    [(1 - sqrt c)^2, (1 + sqrt c)^2], c the smaller over the larger side. With E the mean over the law, exp of the
    entropy of s / sum s is r E[s] exp(-E[s ln s] / E[s]).

    Args:
        aspect: rows over columns, either way round.
        points: of the midpoint rule in the angle t, x = 1 + c + 2 sqrt(c) cos t.
    """
    c = min(aspect, 1 / aspect)
    angle: Any = (np.arange(points) + 0.5) * np.pi / points
    x = 1 + c + 2 * np.sqrt(c) * np.cos(angle)
    weights = np.sin(angle) ** 2 / x
    weights /= weights.sum()
    s = np.sqrt(x)
    mean, entropy = float(weights @ s), float(weights @ (s * np.log(s)))
    return mean * float(np.exp(-entropy / mean))
