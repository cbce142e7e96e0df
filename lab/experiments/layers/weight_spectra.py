"""T-9 weight spectra: how much of its rank does each weight matrix use, judged by its singular values alone?

No text is read and no layer is run: the matrices come one at a time from the files, as they are stored, and all
arithmetic is float64. With energies e_i = s_i^2 the effective rank is (sum e)^2 / sum e^2. It depends on the shape
even where there is no structure: matrices of different shapes are compared relative to a random one of each shape
(`relative_effective_rank`, `relative_exponent`).

Two controls stand beside the spectra: the same with the gains of the neighbouring norms folded in, and, where the
weights lie on a grid because the file was stored in few bits, the same after as much rounding once more.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.records import Record
from lab.statistics.correlations import spearman_by_order
from lab.statistics.depth import best_split, zone_difference
from lab.statistics.random_matrices import (
    gaussian_effective_rank_ratio,
    gaussian_spectrum,
    product_effective_rank_ratio,
)

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

ROUTING, VALUES = ("q_proj", "k_proj"), ("v_proj", "o_proj")
ATTENTION = (*ROUTING, *VALUES)
MLP = ("gate_proj", "up_proj", "down_proj")
MATRICES = (*ATTENTION, *MLP)
#: border between the source's zones, layers 0-16 and 17-35 of 36
BORDER = 17 / 36
#: root mean square of the relative error of rounding to bfloat16: half a unit in the last of 8 digits, over sqrt 3,
#: averaged over mantissas that are uniform in their logarithm
BFLOAT16_ERROR = 2.0**-7 / 12**0.5 * (0.75 / (2 * np.log(2))) ** 0.5


class WeightSpectra(Record):
    """Statistics of singular values by layer and matrix, and what claims derive from them.

    Dimensions: `layer`, `layer_other`, `matrix` (names as in Llama), `head`, `circuit` (qk, ov). Entries are NaN where
    a layer has no such matrix.
    """

    sampling: ClassVar = {}  # weights are not sampled: there is nothing to resample

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return int(self.data.sizes["layer"])

    @cached_property
    def depth(self) -> np.ndarray:
        """Relative depth of each layer [layer]: layer / number of layers."""
        return np.arange(self.n_layers) / self.n_layers

    # ---- which matrices, and how they were stored

    def require(self, *names: str) -> None:
        """Raise NotApplicable unless the model has all of these matrices."""
        missing = [name for name in names if name not in self._stored]
        if missing:
            raise NotApplicable(f"{self.subject} has no {' and no '.join(missing)}")

    def require_free_tail(self) -> None:
        """Raise NotApplicable where weights lie on a grid: their smallest singular values are the rounding's."""
        if self.has("grid_levels") and not bool(np.isnan(self.variable("grid_levels")).all()):
            share, levels = float(self.variable("rounding_share").max()), float(self.variable("grid_levels").median())
            raise NotApplicable(
                f"the weights of {self.subject} lie on a grid ({levels:.0f} levels in a block of 16, rounding up to "
                f"{share:.1%} of the energy): their smallest singular values are the rounding's"
            )

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices that claims speak of, as far as the model has them."""
        return [name for name in MATRICES if name in self._stored]

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(self.data["matrix"].values.tolist())

    # ---- profiles, groups and means

    def of(self, quantity: xr.DataArray, *names: str) -> xr.DataArray:
        """A quantity [layer, matrix] of one matrix, or its mean over several, in the layers that have them [layer]."""
        self.require(*names)
        mean: xr.DataArray = quantity.sel(matrix=list(names)).mean("matrix", skipna=False).dropna("layer")
        return mean

    @staticmethod
    def at(profile: xr.DataArray, layer: int) -> float:
        """The entry of a profile at a layer; NotApplicable where the layer has no such matrix."""
        if layer not in profile["layer"].values:
            raise NotApplicable(f"layer {layer} has no such matrix")
        return float(profile.sel(layer=layer))

    def entry(self, quantity: xr.DataArray, layer: int, name: str) -> float:
        """A quantity [layer, matrix] of one matrix of one layer; NotApplicable where there is none."""
        self.require(name)
        # By position: 2,600 times in an audit, and two selections by label cost a hundred times as much.
        place: dict[Hashable, object] = {"layer": layer, "matrix": name}
        labels = quantity.indexes
        present = layer in labels["layer"]
        value = quantity.values[tuple(labels[dim].get_loc(place[dim]) for dim in quantity.dims)] if present else np.nan
        if np.isnan(value):
            raise NotApplicable(f"layer {layer} has no such matrix")
        return float(value)

    def entries(self, quantity: xr.DataArray) -> np.ndarray:
        """A quantity of all matrices that claims speak of, in all layers, without gaps [entry]."""
        values = quantity.sel(matrix=self.matrices).values.ravel()
        present: np.ndarray = values[~np.isnan(values)]
        return present

    def mean_of(self, quantity: xr.DataArray, *names: str) -> float:
        """A quantity's mean over layers and the named matrices."""
        return float(self.of(quantity, *names).mean())

    def type_means(self, quantity: xr.DataArray, names: Sequence[str] = MATRICES) -> xr.DataArray:
        """A quantity's mean over layers for each matrix [matrix]."""
        self.require(*names)
        means: xr.DataArray = quantity.sel(matrix=list(names)).mean("layer")
        return means

    # ---- effective rank

    @cached_property
    def max_rank(self) -> xr.DataArray:
        """min(rows, columns)."""
        rows, columns = self.variable("rows"), self.variable("columns")
        return rows.where(rows < columns, columns)

    @cached_property
    def effective_rank(self) -> xr.DataArray:
        """(sum e)^2 / sum e^2 [layer, matrix]."""
        return self.variable("effective_rank")

    @cached_property
    def ratio(self) -> xr.DataArray:
        """Effective rank over min(rows, columns) [layer, matrix]; the source's figures at their four decimals."""
        if self.has("effective_rank_ratio"):
            return self.variable("effective_rank_ratio")
        return self.effective_rank / self.max_rank

    @cached_property
    def gaussian_ratio(self) -> xr.DataArray:
        """What a random matrix of each shape would have as ratio."""
        rows, columns = self.variable("rows"), self.variable("columns")
        return rows.copy(data=gaussian_effective_rank_ratio(rows.values, columns.values))

    @cached_property
    def relative_rank(self) -> xr.DataArray:
        """The ratio over that of a random matrix of the shape [layer, matrix]; 1 is no structure."""
        return self.ratio / self.gaussian_ratio

    @cached_property
    def folded_ratio(self) -> xr.DataArray:
        """Effective rank over min(rows, columns) with the neighbouring norms' gains folded in [layer, matrix]."""
        return self.variable("folded_effective_rank") / self.max_rank

    @cached_property
    def mean_ratio(self) -> xr.DataArray:
        """Mean ratio of a layer's matrices [layer]."""
        return self.of(self.ratio, *self.matrices)

    def group_gap(self, ratio: xr.DataArray) -> xr.DataArray:
        """Mean of v and o minus mean of q and k [layer], of any quantity [layer, matrix]."""
        gap: xr.DataArray = (self.of(ratio, *VALUES) - self.of(ratio, *ROUTING)).dropna("layer")
        return gap

    @property
    def mlp_matrices(self) -> list[str]:
        """The MLP's matrices; two where it has no gate."""
        found = [name for name in MLP if name in self.matrices]
        if not found:
            raise NotApplicable(f"the MLPs of {self.subject} are no plain matrices")
        return found

    # ---- decay of the singular values

    @cached_property
    def exponent(self) -> xr.DataArray:
        """Exponent of s_i ~ i^-a, fitted over all singular values [layer, matrix]."""
        return self.variable("power_law_exponent")

    @cached_property
    def _null_fit(self) -> xr.DataArray:
        """Exponent and R^2 of the same fit to a random matrix of each shape [..., fit]."""
        rows, columns = xr.broadcast(self.variable("rows"), self.variable("columns"))
        fits = [_null_power_law(m, n) for m, n in zip(rows.values.ravel(), columns.values.ravel(), strict=True)]
        values = np.array(fits).reshape(*rows.shape, 2)
        return xr.DataArray(values, dims=(*rows.dims, "fit"), coords={**rows.coords, "fit": ["exponent", "r_squared"]})

    @cached_property
    def relative_exponent(self) -> xr.DataArray:
        """The exponent over that of the same fit to a random matrix of the shape [layer, matrix]."""
        return self.exponent / self._null_fit.sel(fit="exponent", drop=True)

    @cached_property
    def excess_r_squared(self) -> xr.DataArray:
        """R^2 of the power law minus that of the same fit to a random matrix of the shape [layer, matrix]."""
        return self.variable("power_law_r_squared") - self._null_fit.sel(fit="r_squared", drop=True)

    # ---- the ends of the spectrum

    @cached_property
    def top_share(self) -> xr.DataArray:
        """Share of the energy in the largest singular value [layer, matrix]: 1 / stable rank."""
        return 1 / self.variable("stable_rank")

    @cached_property
    def stable_share(self) -> xr.DataArray:
        """Stable rank over effective rank [layer, matrix], at most 1."""
        return self.variable("stable_rank") / self.effective_rank

    @cached_property
    def gaussian_stable_share(self) -> xr.DataArray:
        """What a large random matrix of each shape would have: its s_1 is sqrt(m) + sqrt(n) (Bai and Yin 1993).

        Smaller ones have a little more: s_1 reaches that from below.
        """
        rows, columns = self.variable("rows"), self.variable("columns")
        stable_rank = rows * columns / (rows**0.5 + columns**0.5) ** 2
        return stable_rank / (self.gaussian_ratio * self.max_rank)

    @cached_property
    def condition_number(self) -> xr.DataArray:
        """s_1 over the smallest singular value [layer, matrix]."""
        return self.variable("condition_number")

    @cached_property
    def above_bfloat16(self) -> xr.DataArray:
        """Smallest singular value over the largest that rounding to bfloat16 would have by itself [layer, matrix].

        Rounding is noise of 0.17 % of the weights' size; its largest singular value is that times sqrt m + sqrt n.
        """
        rows, columns = self.variable("rows"), self.variable("columns")
        size = np.sqrt(self.variable("frobenius_norm_squared") / (rows * columns))
        edge = BFLOAT16_ERROR * size * (np.sqrt(rows) + np.sqrt(columns))
        above: xr.DataArray = self.variable("largest_singular_value") / self.condition_number / edge
        return above

    @cached_property
    def energy_rank_90(self) -> xr.DataArray:
        """Fewest singular values with 90 % of the energy [layer, matrix]."""
        return self.variable("energy_rank_90")

    @cached_property
    def factor_saving(self) -> xr.DataArray:
        """Share of the parameters saved by two factors of rank `energy_rank_90` [layer, matrix]: 1 - r (m + n) / mn."""
        rows, columns = self.variable("rows"), self.variable("columns")
        return 1 - self.energy_rank_90 * (rows + columns) / (rows * columns)

    @cached_property
    def matrix_norm(self) -> xr.DataArray:
        """Root of a layer's summed squared Frobenius norms [layer]."""
        squares = self.variable("frobenius_norm_squared").sel(matrix=self.matrices)
        norm: xr.DataArray = squares.sum("matrix") ** 0.5
        return norm

    # ---- depth

    @property
    def border(self) -> int:
        """First layer of the late zone: layer 17 of 36, the same depth elsewhere."""
        return round(BORDER * self.n_layers)

    def zone_effects(self, names: Sequence[str] = MATRICES) -> xr.DataArray:
        """Mean ratio of the late zone minus that of the layers before it [matrix]."""
        self.require(*names)
        profiles = [self.of(self.ratio, name) for name in names]
        effects = [zone_difference(each.values, int((each["layer"] < self.border).sum())) for each in profiles]
        return xr.DataArray(effects, dims="matrix", coords={"matrix": list(names)})

    def depth_correlation(self, name: str) -> float:
        """Spearman's correlation of a matrix's ratio with depth."""
        profile = self.of(self.ratio, name)
        return spearman_by_order(profile.values, profile["layer"].values)

    def split(self, name: str) -> tuple[int, float]:
        """First layer of the second of two constants that fit a matrix's ratio best, and the variance they explain."""
        profile = self.of(self.ratio, name)
        place, explained = best_split(profile.values)
        return int(profile["layer"][place]), explained

    def extremes(self, quantity: xr.DataArray, count: int) -> list[tuple[int, str]]:
        """(layer, matrix) of the `count` smallest entries, the smallest first."""
        flat = quantity.sel(matrix=self.matrices).stack(entry=("layer", "matrix")).dropna("entry")
        return [(int(layer), str(name)) for layer, name in flat.entry.values[np.argsort(flat.values)[:count]]]

    # ---- heads, neighbours, rounding

    def circuit_ratio(self, circuit: str) -> xr.DataArray:
        """Effective rank over the head width of each head's circuit [layer, head], without layers that have none."""
        ranks = self.variable("circuit_effective_rank").sel(circuit=circuit) / self.variable("head_width")
        present: xr.DataArray = ranks.dropna("layer", how="all")
        return present

    def relative_circuit_ratio(self, circuit: str) -> xr.DataArray:
        """That over what a product of two random factors would have [layer, head]."""
        width, rank = self.provenance["settings"]["width"], self.variable("head_width")
        null = rank.copy(data=[product_effective_rank_ratio(size, width, width) for size in rank.values])
        relative: xr.DataArray = self.circuit_ratio(circuit) / null
        return relative

    @cached_property
    def query_overlap(self) -> xr.DataArray:
        """Mean squared cosine between the leading input directions of two layers' queries [layer, layer_other]."""
        return self.variable("query_overlap")

    def overlaps_apart(self, *distances: int) -> np.ndarray:
        """Query overlaps of all pairs of layers at these distances in depth [pair], without gaps."""
        found = np.concatenate([np.diagonal(self.query_overlap.values, distance) for distance in distances])
        present: np.ndarray = found[~np.isnan(found)]
        return present

    @property
    def chance_overlap(self) -> float:
        """Overlap of two random subspaces of that size: their dimension over the width."""
        return float(self.provenance["settings"]["subspace"] / self.provenance["settings"]["width"])

    def rounding_shift(self, name: str) -> xr.DataArray:
        """Relative change of a variable's type means when the matrices are rounded once more [matrix].

        Raises:
            NotApplicable: nothing was rounded.
        """
        if not (self.variable("rounding_share") > 0).any():
            raise NotApplicable(f"the weights of {self.subject} lie on no grid")
        again, given = (self.type_means(self.variable(part), self.matrices) for part in (f"rounded_{name}", name))
        return abs(again / given - 1)


def _null_power_law(rows: float, columns: float) -> tuple[float, float]:
    if np.isnan(rows) or np.isnan(columns):  # the layer has no such matrix
        return float("nan"), float("nan")
    return gaussian_spectrum(int(rows), int(columns)).power_law


@dataclass(frozen=True)
class Budget:
    """What is measured beside the spectra, which are exact and the same under every budget.

    Attributes:
        subspace_share: leading input directions of the queries that are compared between layers, as a share of the
            width of the residual stream.
    """

    subspace_share: float = 1 / 8


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Singular values of every weight matrix of the layers, from the subject's files; the corpus is not read."""
    from lab.experiments.layers.measuring import weight_spectra

    return weight_spectra.measure(subject, budget, sweep)


COUNT = Tolerance(0, 1, "a sum that meets a limit within rounding may count one singular value more or less")
TAIL = Tolerance(2e-2, 0, "the smallest singular values of square matrices lose digits with their condition number")
AGAIN = Tolerance(1e-2, 0, "noise is drawn from a seed; another generator would draw other noise")
TOLERANCES = {
    "": Tolerance(
        1e-4, 1e-7, "exact arithmetic in float64: other kernels move the 10th digit; 1e-4 shows other weights"
    ),
    "energy_rank_50": COUNT,
    "energy_rank_90": COUNT,
    "energy_rank_99": COUNT,
    "numerical_rank_deficit": COUNT,
    "outliers": COUNT,
    "condition_number": TAIL,
    "power_law_exponent": Tolerance(1e-3, 0, "the fit reads the smallest singular values too"),
    "power_law_r_squared": Tolerance(1e-3, 0, "the fit reads the smallest singular values too"),
    "rounded_effective_rank": AGAIN,
    "rounded_power_law_exponent": AGAIN,
    "rounded_energy_rank_90": Tolerance(1e-2, 1, AGAIN.reason),
}
EXPERIMENT = Experiment(
    id="T-9",
    title="Weight spectra",
    question="How much of its nominal rank does each weight matrix use, judged by its singular values alone?",
    record=WeightSpectra,
    measure=measure,
    budgets={"quick": Budget(), "full": Budget()},
    tolerances=TOLERANCES,
)
