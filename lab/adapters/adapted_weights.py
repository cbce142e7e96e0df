"""What a record tells of rank allocations and of the weights that adapters changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import xarray as xr

from lab.adapters.allocations import LATE, layers_between
from lab.adapters.merging import largest_update_rms, total_rate
from lab.errors import NotApplicable
from lab.records import Record
from lab.statistics.correlations import spearman_by_order

GENTLE, AGGRESSIVE = "gentle", "aggressive"
FASTER = 40  #: the aggressive rate over the gentle one
ALPHA = 2.0  #: scale of an update: alpha over rank, in all configurations


class AdaptedWeights(Record):
    """Ranks, spectra and updates by `configuration`, `rate`, `layer` and `matrix`."""

    @cached_property
    def configurations(self) -> list[str]:
        """Names of the configurations."""
        return [str(name) for name in self.data["configuration"].values]

    @cached_property
    def rates(self) -> list[str]:
        """Names of the learning rates."""
        return [str(name) for name in self.data["rate"].values]

    def place(self, configuration: str, rate: str) -> tuple[int, int]:
        """Indices of a rate and a configuration.

        Raises:
            NotApplicable: the record has one of them not.
        """
        if configuration not in self.configurations or rate not in self.rates:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no {configuration} at the {rate} rate")
        return self.rates.index(rate), self.configurations.index(configuration)

    # ---- spectra and ranks

    @cached_property
    def effective_rank_ratio(self) -> xr.DataArray:
        """Of the weights before training [layer, matrix]; see T-9."""
        return self.variable("effective_rank_ratio_before")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.data.sizes["layer"])

    @cached_property
    def late(self) -> np.ndarray:
        """Whether a layer lies behind the border of B's two regions [layer]."""
        late: np.ndarray = np.isin(np.arange(self.n_layers), layers_between(*LATE, self.n_layers))
        return late

    @cached_property
    def region_rank(self) -> xr.DataArray:
        """Ranks of the phase-aware allocation [matrix, region]; of B or, at A's budget, of B_matched."""
        if self.has("region_rank"):
            return self.variable("region_rank")
        name = next((name for name in ("B", "B_matched") if name in self.configurations), None)
        if name is None:
            raise NotApplicable(f"no phase-aware allocation was trained on {self.subject}")
        return self.by_region(self.variable("rank").sel(configuration=name))

    @cached_property
    def region_effective_rank(self) -> xr.DataArray:
        """Mean effective rank ratio of the weights [matrix, region]."""
        return self.by_region(self.effective_rank_ratio)

    def by_region(self, values: xr.DataArray) -> xr.DataArray:
        """Means of a quantity [layer, matrix] over the plateau and over the late layers [matrix, region]."""
        means = [values.isel(layer=np.flatnonzero(chosen)).mean("layer") for chosen in (~self.late, self.late)]
        return xr.concat(means, xr.Variable("region", ["plateau", "late"])).transpose("matrix", "region")

    def rank_agreement(self, regions: Sequence[str] = ("plateau", "late")) -> float:
        """Spearman's correlation of B's ranks with the effective rank ratios, over matrices and regions."""
        ranks, effective = (
            values.sel(region=list(regions)).values.ravel() for values in (self.region_rank, self.region_effective_rank)
        )
        return spearman_by_order(ranks, effective)

    def allocation_agreement(self, configuration: str) -> float:
        """Spearman's correlation of a configuration's ranks with the effective rank ratios, over all matrices."""
        if configuration not in self.configurations:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no {configuration}")
        ranks = self.variable("rank").sel(configuration=configuration)
        return spearman_by_order(ranks.values.ravel(), self.effective_rank_ratio.values.ravel())

    def largest_updates(self, norm_squared: xr.DataArray, rate: str) -> list[tuple[float, float]]:
        """Largest update of B that the source's schedule allows, and the weight: root mean squares by matrix, region.

        Args:
            norm_squared: squared Frobenius norms of the weights [layer, matrix], see T-9.
            rate: gentle, or aggressive, which is 40 times that.
        """
        settings = self.provenance["settings"]
        peak = settings["learning_rate"] * (FASTER if rate == AGGRESSIVE else 1)
        total = total_rate(peak, settings["steps"], settings["warmup_steps"])
        columns = self.variable("columns")
        weight = self.by_region((norm_squared / (self.variable("rows") * columns)) ** 0.5)
        update = largest_update_rms(self.region_rank.values, ALPHA, columns.values[:, None], total)
        return list(zip(update.ravel().tolist(), weight.values.ravel().tolist(), strict=True))

    def weights(self, name: str, layer: int, configuration: str = "A", rate: str = GENTLE) -> np.ndarray:
        """What an adapter did to the matrices of a layer [matrix], NaN-free: a variable [rate, configuration, ...]."""
        if "configuration" not in self.variable(name).dims:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds {name} of one run alone, rounded")
        self.place(configuration, rate)
        values = self.variable(name).sel(rate=rate, configuration=configuration, layer=layer).values
        found: np.ndarray = values[~np.isnan(values)]
        if not len(found):
            raise NotApplicable(f"{configuration} at the {rate} rate adapts nothing in layer {layer} of {self.subject}")
        return found

    def rank_change(self, layer: int) -> np.ndarray:
        """Change of the effective rank ratio of a layer's matrices by the gentle run [matrix]; published, by B."""
        change = self.variable("effective_rank_ratio_change")
        if "configuration" in change.dims:
            return self.weights("effective_rank_ratio_change", layer)
        found: np.ndarray = change.sel(layer=layer).values
        return found
