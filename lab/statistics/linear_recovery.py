"""The half of T-7's record that is about layers replaced by matrices: recovered loss and explained variance."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.records import Record
from lab.statistics.correlations import spearman

#: A layer whose absence costs less leaves a recovery that sampling noise rules (pilot: +-0.15 at 0.12 nat).
LEAST_DAMAGE = 0.15
#: Fewer replaced layers cannot speak for all of them: of 8 one chance correlation in 20 exceeds 0.74 in size.
LEAST_LAYERS = 8
#: Mean squared deviation over squared mean size beyond which a few tokens carry the variance; 0.35 to 1 is ordinary.
OUTLIERS = 10


class LinearRecovery(Record):
    """What a layer's absence costs, and the share of it that a matrix in its place recovers.

    Layers that were not replaced hold NaN in the record, and are left out of what is said of replaced layers.
    """

    @cached_property
    def knockout_delta(self) -> xr.DataArray:
        """Rise of the loss without the layer [layer], nat/token; NaN where no layer was replaced."""
        if self.has("knockout_loss_delta"):
            return self.variable("knockout_loss_delta")
        return self.mean("knockout_loss") - self.mean("baseline_loss")

    def _recovery(self, name: str) -> xr.DataArray:
        if self.has(f"recovery_{name}"):
            return self.variable(f"recovery_{name}")
        return 1 - (self.mean(f"{name}_loss") - self.mean("baseline_loss")) / self.knockout_delta

    def _replaced(self, quantity: xr.DataArray) -> xr.DataArray:
        """The layers that were replaced and whose absence costs enough for a recovery to be told from noise."""
        damage = self.knockout_delta.values
        # Published figures rest on 29,161 tokens, measured ones on some hundred.
        least = 0 if self.has("knockout_loss_delta") else LEAST_DAMAGE
        return quantity[np.nan_to_num(damage, nan=-1) >= least]

    @cached_property
    def recovery(self) -> xr.DataArray:
        """Share of the knockout loss that the residual map recovers [replaced layer]: 1 is all, 0 is nothing.

        Measured on prompts that were not fitted to, with the first position exact; the published maps were fitted to
        four fifths of the tokens they are scored on, the first position among them.
        """
        return self._replaced(self._recovery("residual"))

    @cached_property
    def replaced_recovery(self) -> xr.DataArray:
        """The same for every layer that was replaced, however little its absence costs [replaced layer]."""
        return self._recovery("residual")[np.isfinite(self.knockout_delta.values)]

    @cached_property
    def normalized_recovery(self) -> xr.DataArray:
        """The same for a map of the normed stream [replaced layer]."""
        return self._replaced(self._recovery("normalized"))

    @cached_property
    def all_tokens_recovery(self) -> xr.DataArray:
        """The same for a residual map fitted to and used at every position, without intercept [replaced layer]."""
        return self.recovery if self.has("recovery_residual") else self._replaced(self._recovery("all_tokens"))

    @cached_property
    def best_recovery(self) -> xr.DataArray:
        """The larger recovery of the maps that take a layer's whole rank [replaced layer]."""
        if self.has("recovery_best"):
            return self.variable("recovery_best")
        best: xr.DataArray = xr.apply_ufunc(np.fmax, self.recovery, self.normalized_recovery)
        return best

    @cached_property
    def best_all_tokens_recovery(self) -> xr.DataArray:
        """The best recovery without an exact first position [replaced layer]; published figures know no other."""
        return self.best_recovery if self.has("recovery_best") else self.all_tokens_recovery

    def require_unseen(self) -> None:
        """Raise NotApplicable for published figures: maps of all positions, scored where they were fitted."""
        if self.has("recovery_residual"):
            raise NotApplicable(
                f"the {self.source} record of {self.subject} holds no map with an exact first position that is scored "
                "on prompts it was not fitted to"
            )

    @cached_property
    def exact_first_gain(self) -> xr.DataArray:
        """What leaving the first position out of the fit, and keeping its output, adds to recovery [replaced layer].

        Raises:
            NotApplicable: published figures know maps of all positions only.
        """
        self.require_unseen()
        return self.recovery - self.all_tokens_recovery

    @cached_property
    def low_rank_recovery(self) -> xr.DataArray:
        """Recovery of the residual map cut to a rank [replaced layer, rank]."""
        if self.has("recovery_low_rank"):
            return self.variable("recovery_low_rank")
        rise = self.mean("low_rank_loss") - self.mean("baseline_loss")
        return self._replaced(1 - rise / self.knockout_delta).transpose("layer", "rank")

    @cached_property
    def r2(self) -> xr.DataArray:
        """Share of the update's variance that the residual map explains [replaced layer], completion tokens.

        Published: over all tokens, the first position among them.
        """
        return self.all_tokens_r2 if self.has("r2_residual") else self._r2("residual")

    @cached_property
    def all_tokens_r2(self) -> xr.DataArray:
        """The same over all tokens for the map that was fitted to all [replaced layer]."""
        return self.variable("r2_residual") if self.has("r2_residual") else self._r2("all_tokens")

    def _r2(self, name: str) -> xr.DataArray:
        return self._replaced(1 - self.mean(f"{name}_error_squares") / self.mean(f"{name}_deviation_squares"))

    @cached_property
    def outlier_factor(self) -> xr.DataArray:
        """Mean squared deviation of the update over all tokens, over its squared mean norm on completions [layer]."""
        return self.variable("outlier_energy_factor")

    def of_replaced(self, quantity: xr.DataArray, layer: int) -> float:
        """The entry of a quantity over replaced layers.

        Raises:
            NotApplicable: the layer was not replaced, or its absence costs too little.
        """
        if layer not in quantity["layer"]:
            # The layer stays unnamed, so that pytest lists all of them in one line.
            raise NotApplicable(f"not replaced under this budget, or worth less than {LEAST_DAMAGE} nat per token")
        return float(quantity.sel(layer=layer))

    @staticmethod
    def of_enough(quantity: xr.DataArray) -> xr.DataArray:
        """A quantity over replaced layers, for claims that speak of all of them.

        Raises:
            NotApplicable: there are fewer than `LEAST_LAYERS`.
        """
        if len(quantity) < LEAST_LAYERS:
            raise NotApplicable(
                f"{len(quantity)} layers were replaced whose absence costs {LEAST_DAMAGE} nat per token or more; "
                f"{LEAST_LAYERS} are needed"
            )
        return quantity

    def at_replaced(self, quantity: xr.DataArray) -> xr.DataArray:
        """A quantity of all layers at the replaced ones."""
        return quantity.sel(layer=self.recovery["layer"])

    def correlation(self, quantity: xr.DataArray, recovery: xr.DataArray) -> float:
        """Spearman's correlation over the layers that both arrays hold.

        Raises:
            NotApplicable: too few layers, see `of_enough`.
        """
        both = np.intersect1d(quantity["layer"], self.of_enough(recovery)["layer"])
        return spearman(quantity.sel(layer=both), recovery.sel(layer=both))
