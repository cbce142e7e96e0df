"""What a record holds of whole models under quantization: methods, recipes, memory, and the kind of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import combinations
from typing import Self

import numpy as np
import scipy
import xarray as xr

from lab.errors import NotApplicable
from lab.records import Record

#: Distinct values among 32 consecutive weights: about 31 in trained bfloat16 weights, 29 if they were stored in 8 bits,
#: 27 in 6, 18 in 5, 13 in 4. At or below this limit a matrix counts as stored in 5 bits or fewer.
DISTINCT_LIMIT = 24
#: libraries whose methods are compared with those of this project, and how names of their methods begin; the first
#: that fits
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes_",),
    "torchao": ("torchao_",),
    "neural-compressor-pt": ("gptq_",),
    "xllamacpp": ("gguf_q4_k", "gguf_q6_k"),
    "gguf": ("gguf_",),
}
#: heavy tails move the error of rounding by up to 33 % from its Gaussian value (published: 0.0353 / 0.0265 at 6 bits)
ERROR_LAW = 0.4


class WholeModels(Record):
    """Losses of whole models, and what claims derive from them.

    Dimensions: `method`, `recipe`, `recipe_layerwise`, `permutation`, `memory_method`; sampled over `method_prompt`.
    """

    #: the record that a resample was drawn from: what texts resolve is asked of them, not of a draw
    _drawn_from: Self | None = None

    def _resampled(self, generators: Mapping[str, np.random.Generator]) -> Self:
        drawn = super()._resampled(generators)
        drawn._drawn_from = self
        return drawn

    @cached_property
    def baseline_loss(self) -> xr.DataArray:
        """Loss of the intact model on the text of the layer sweep [nat/token]."""
        return self.mean("baseline_loss")

    @cached_property
    def baseline_perplexity(self) -> float:
        """exp of the intact loss."""
        return float(np.exp(self.baseline_loss))

    # ---- what kind of weights these are

    @cached_property
    def stored_in_few_bits(self) -> float:
        """Share of the weights in matrices that were stored in 5 bits or fewer before; 0 if it was not measured."""
        if not self.has("distinct_values"):
            return 0.0
        coarse = self.variable("distinct_values") <= DISTINCT_LIMIT
        weights = self.variable("matrix_weights")
        return float((coarse * weights).sum() / weights.sum())

    def require_full_precision(self) -> None:
        """Raise NotApplicable where weights were stored in few bits before: part of the damage is in the baseline."""
        if self.stored_in_few_bits >= 0.01:
            raise NotApplicable(
                f"{self.stored_in_few_bits:.0%} of the weights of {self.subject} were stored in 5 bits or fewer before"
                "; what they lost then is part of the baseline"
            )

    def require_free_weights(self, *methods: str) -> None:
        """Raise NotApplicable if a method's weight error is not that of free weights: its levels fall on a grid."""
        for method in methods if self.has("method_weight_error") else ():
            found = self._of_method("method_weight_error", method)
            law = self._of_method("method_gaussian_error", method)
            if abs(found / law - 1) > ERROR_LAW:
                raise NotApplicable(
                    f"{method} changes the weights of {self.subject} by {found:.2g} instead of {law:.2g}: "
                    "they were stored on a grid that it shares"
                )

    # ---- whole models

    def _of_method(self, variable: str, method: str) -> float:
        return float(self.mean(variable)[self._index_of(method)])

    def _index_of(self, method: str) -> int:
        if method not in self.methods:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no {method}")
        return self.methods.index(method)

    @cached_property
    def methods(self) -> list[str]:
        """Names of the whole-model methods."""
        return [str(name) for name in self.data["method"].values]

    @cached_property
    def _method_baseline(self) -> xr.DataArray:
        """Intact loss on the texts of methods and recipes; the published run has one text for all."""
        return self.mean("method_baseline_loss") if self.has("method_baseline_loss") else self.baseline_loss

    @cached_property
    def method_damages(self) -> xr.DataArray:
        """Rise of the loss with the whole model under each method [method], nat/token."""
        return self.mean("method_loss") - self._method_baseline

    def method_damage(self, method: str) -> float:
        """Rise of the loss with the whole model under a method [nat/token].

        Raises:
            NotApplicable: the record does not hold the method.
        """
        return float(self.method_damages[self._index_of(method)])

    def method_half_width(self, method: str, other: str | None = None) -> float | None:
        """Half the width of the paired 95 % interval of a method's damage [nat/token]; None where nothing was sampled.

        With another method named, of the difference of the two, which read the same texts.

        t sqrt(n / (n - 1) sum_r w_r^2 (d_r - d)^2) / sum_r w_r over n texts r of w_r tokens: the delta method's
        error of a ratio (Cochran 1977, eq. 6.13), with texts as units, since tokens of a text are correlated, and
        Student's t of n - 1 degrees of freedom. With the normal 1.96, intervals of 8 texts cover 90 %.
        """
        if "method_prompt" not in self.sampling_sizes:
            return None
        losses = self.variable("method_loss")
        before = self.variable("method_baseline_loss") if other is None else losses.isel(method=self._index_of(other))
        rises = (losses.isel(method=self._index_of(method)) - before).values
        tokens = self.variable("method_scored_tokens").values
        if len(rises) < 2:
            raise NotApplicable(f"methods were scored on one text of {self.subject}, which has no interval")
        around = tokens * (rises - rises @ tokens / tokens.sum())
        quantile = scipy.stats.t.ppf(0.975, len(rises) - 1)
        return float(quantile * np.sqrt(len(rises) / (len(rises) - 1) * (around @ around)) / tokens.sum())

    def damage_interval(self, method: str, other: str | None = None) -> tuple[float, float] | None:
        """The 95 % interval of a method's damage, or of its difference from another's; None where nothing was sampled.

        Raises:
            NotApplicable: the record does not hold a method.
        """
        half_width = self.method_half_width(method, other)
        if half_width is None:
            return None
        rise = self.method_damage(method) - (self.method_damage(other) if other else 0.0)
        return rise - half_width, rise + half_width

    def require_resolved(self, limit: float, *methods: str) -> None:
        """Raise NotApplicable where texts do not tell whether all methods lose at most `limit` [nat/token].

        The largest damage is at least the largest lower end of their intervals, and at most the largest upper end.
        Published figures have no texts, and so no interval: they are judged as they are.
        """
        intervals = [(self._drawn_from or self).damage_interval(method) for method in methods]
        known = [interval for interval in intervals if interval is not None]
        if known:
            words = f"the {'largest ' * (len(methods) > 1)}rise of the loss under {', '.join(methods)}"
            low, high = np.max(known, axis=0).tolist()
            self._require_outside(words, (low, high), limit)

    def require_resolved_difference(self, limit: float, method: str, other: str) -> None:
        """Raise NotApplicable where texts do not tell whether two methods' damages are within `limit` [nat/token].

        They read the same texts: what is common to both cancels in the interval of the difference, which has a sign.
        """
        interval = (self._drawn_from or self).damage_interval(method, other)
        if interval is not None:
            self._require_outside(f"the loss under {method} less that under {other}", interval, limit, -limit)

    def _require_outside(self, words: str, interval: tuple[float, float], *limits: float) -> None:
        low, high = interval
        for limit in limits:
            if low <= limit <= high:
                raise NotApplicable(
                    f"{words} lies between {low:.2g} and {high:.2g} nat on {self.subject}, which does not tell it "
                    f"from {limit:.2g}; measure more texts (--budget full)"
                )

    def method_delta_perplexity(self, method: str) -> float:
        """The same as a rise of the perplexity."""
        return float(np.exp(self._method_baseline) * np.expm1(self.method_damage(method)))

    def weight_error_of(self, method: str) -> float:
        """||W - W_hat|| / ||W|| under a weight-only method, mean over the matrices of the middle layer."""
        return self._of_method("method_weight_error", method)

    def tokens_per_second(self, method: str) -> float:
        """Published decoding speed [token/s]."""
        return float(self.variable("method_tokens_per_second").sel(timed_method=method))

    def methods_of(self, bits: int) -> list[str]:
        """Methods of a nominal width that the record holds."""
        widths = self.variable("method_nominal_bits").values
        return [name for name, width in zip(self.methods, widths, strict=True) if width == bits]

    def stored_bits(self, method: str) -> float:
        """Bits that a method stores per weight of the layers' linear maps, scales included."""
        return self._of_method("method_stored_bits", method)

    def require_every_library(self) -> None:
        """Raise NotApplicable where a quantization library was not installed: its methods are not among those held."""
        installed = self.provenance.get("settings", {}).get("quantization_libraries", {})
        missing = [name for name in LIBRARIES if name not in installed]
        if self.source == "measured" and missing:
            raise NotApplicable(
                f"the measured record of {self.subject} lacks the methods of {', '.join(missing)}; "
                "install the libraries and measure with --fresh"
            )

    def require_own_format(self, method: str, bits: float) -> None:
        """Raise NotApplicable where a method stores more than `bits` per weight, which its own format does not take."""
        stored = self.stored_bits(method)
        if stored > bits:
            raise NotApplicable(
                f"{method} stores {stored:.2f} bits per weight of {self.subject}, more than {bits}: "
                "its rows do not fit into blocks, and most weights are in another format"
            )

    def noise_damage(self, bits: int) -> float:
        """Damage of unbiased weight noise as large as the rounding error of Gaussian weights at a width [nat/token]."""
        return self.method_damage(f"noise_{bits}")

    # ---- recipes

    @cached_property
    def recipe_damages(self) -> xr.DataArray:
        """Rise of the loss under each recipe [recipe], nat/token."""
        return self.mean("recipe_loss") - self._method_baseline

    @cached_property
    def recipes(self) -> list[str]:
        """Names of the mixed-precision recipes."""
        return [str(name) for name in self.data["recipe"].values]

    def recipe_damage(self, recipe: str) -> float:
        """Rise of the loss under a recipe [nat/token].

        Raises:
            NotApplicable: the record does not hold the recipe.
        """
        if recipe not in self.recipes:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no recipe {recipe}")
        return float(self.recipe_damages[self.recipes.index(recipe)])

    def recipe_delta_perplexity(self, recipe: str) -> float:
        """The same as a rise of the perplexity."""
        return float(np.exp(self._method_baseline) * np.expm1(self.recipe_damage(recipe)))

    def recipe_bits(self, recipe: str) -> np.ndarray:
        """Width of each layer under a recipe [layer].

        Raises:
            NotApplicable: the record does not hold the recipe, or it does not go by layers.
        """
        names = [str(name) for name in self.data["recipe_layerwise"].values]
        if recipe not in names:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no widths of {recipe}")
        return np.asarray(self.variable("recipe_bits")[names.index(recipe)])

    def require_different_widths(self, *recipes: str) -> None:
        """Raise NotApplicable if two of these recipes are one and the same on this model: there is nothing to compare.

        A trim that is blind to protection, and sensitivities that differ, may end in the same widths.
        """
        for one, other in combinations(recipes, 2):
            if np.array_equal(self.recipe_bits(one), self.recipe_bits(other)):
                raise NotApplicable(f"{one} and {other} give the layers of {self.subject} the same widths")

    @cached_property
    def different_recipes(self) -> list[str]:
        """Layerwise recipes, of those that give the same widths the first only."""
        names = [str(name) for name in self.data["recipe_layerwise"].values]
        first: dict[tuple[float, ...], str] = {}
        for name in names:
            first.setdefault(tuple(self.recipe_bits(name).tolist()), name)
        return list(first.values())

    def weighted_bits(self, recipe: str) -> float:
        """Mean width of a recipe, weighted by parameters [bit]."""
        self.recipe_damage(recipe)  # refuses what the record does not hold
        return float(self.variable("recipe_weighted_bits")[self.recipes.index(recipe)])

    @cached_property
    def permuted_damage(self) -> np.ndarray:
        """Damage of the one-third histogram (3, 4, 5 bits) dealt out at random [permutation], nat/token."""
        return np.asarray(self.mean("permuted_recipe_loss") - self._method_baseline)

    def deal_p_value(self, recipe: str) -> float:
        """How often chance alone does as well: share of random deals of the histogram that lose no more than a recipe.

        The recipe counts as one of the deals, so the value is never 0 (Phipson and Smyth 2010).
        """
        as_good = int((self.permuted_damage <= self.recipe_damage(recipe)).sum())
        return (1 + as_good) / (1 + len(self.permuted_damage))

    # ---- memory

    def memory(self, method: str) -> float:
        """Memory of a model under a method with nothing else resident [GB]: its tensors, as stored.

        Published: device memory allocated, less the bfloat16 model that was still resident.
        """
        if method not in self.memory_methods:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no memory of {method}")
        return float(self.variable(self._memory_variable)[self.memory_methods.index(method)])

    @cached_property
    def memory_methods(self) -> list[str]:
        """Methods whose memory the record holds, `bfloat16` among them."""
        return [str(name) for name in self.variable(self._memory_variable)["memory_method"].values]

    @property
    def _memory_variable(self) -> str:
        return "stored_memory" if self.has("stored_memory") else "net_memory"

    def expected_memory(self, method: str) -> float:
        """What parameter arithmetic expects [GB]."""
        return float(self.variable("expected_memory").sel(memory_method=method))

    # ---- weights

    @cached_property
    def weight_error_ratio(self) -> xr.DataArray:
        """Relative weight error over that of Gaussian weights [layer, error_bits, matrix]."""
        return self.variable("weight_relative_error") / self.variable("gaussian_relative_error")

    def mean_weight_error(self, bits: int) -> xr.DataArray:
        """Relative weight error at a width, mean over matrices [layer]."""
        return self._mean_weight_error.sel(error_bits=bits, drop=True)

    @cached_property
    def _mean_weight_error(self) -> xr.DataArray:
        return self.variable("weight_relative_error").mean("matrix")
