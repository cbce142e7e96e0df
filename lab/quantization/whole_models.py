"""What a record holds of whole models under quantization: methods, recipes, memory, and the kind of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
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
#: heavy tails move the error of rounding by up to 30 % from its Gaussian value (published: 0.739 to 0.149 / 0.117)
ERROR_LAW = 0.4


class WholeModels(Record):
    """Losses of whole models, and what claims derive from them.

    Dimensions: `method`, `recipe`, `recipe_layerwise`, `permutation`, `memory_method`; sampled over `method_prompt`.
    """

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
        if method not in self.methods:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no {method}")
        return float(self.mean(variable)[self.methods.index(method)])

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
        if method not in self.methods:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no {method}")
        return float(self.method_damages[self.methods.index(method)])

    def method_half_width(self, method: str) -> float | None:
        """Half the width of the paired 95 % interval of a method's damage [nat/token]; None where nothing was sampled.

        1.96 sqrt(n / (n - 1) sum_r w_r^2 (d_r - d)^2) / sum_r w_r over texts r of w_r tokens: the delta method's
        error of a ratio (Cochran 1977, eq. 6.13), with texts as units, since tokens of a text are correlated.
        """
        if "method_prompt" not in self.sampling_sizes:
            return None
        losses = self.variable("method_loss").isel(method=self.methods.index(method))
        rises = (losses - self.variable("method_baseline_loss")).values
        tokens = self.variable("method_scored_tokens").values
        around = tokens * (rises - rises @ tokens / tokens.sum())
        return float(1.96 * np.sqrt(len(rises) / (len(rises) - 1) * (around @ around)) / tokens.sum())

    def require_resolved(self, limit: float, *methods: str) -> None:
        """Raise NotApplicable if a damage of `limit` [nat/token] cannot be told from none on as many texts."""
        for method in methods:
            half_width = self.method_half_width(method)
            if half_width is not None and half_width > limit:
                raise NotApplicable(
                    f"the loss under {method} is known within {half_width:.2g} nat on {self.subject}, "
                    f"which does not resolve {limit:.2g}; measure more texts (--budget full)"
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

    def noise_damage(self, bits: int) -> float:
        """Damage of unbiased weight noise as large as the rounding error at a width [nat/token]."""
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

    def weighted_bits(self, recipe: str) -> float:
        """Mean width of a recipe, weighted by parameters [bit]."""
        self.recipe_damage(recipe)  # refuses what the record does not hold
        return float(self.variable("recipe_weighted_bits")[self.recipes.index(recipe)])

    @cached_property
    def permuted_damage(self) -> np.ndarray:
        """Damage of the one-third histogram (3, 4, 5 bits) dealt out at random [permutation], nat/token."""
        return np.asarray(self.mean("permuted_recipe_loss") - self._method_baseline)

    def share_beaten(self, recipe: str) -> float:
        """Share of random deals of the same histogram that do at least as much damage as the recipe."""
        return float((self.permuted_damage >= self.recipe_damage(recipe)).mean())

    # ---- memory

    def memory(self, method: str) -> float:
        """Memory of a model under a method with nothing else resident [GB]: its tensors, as stored.

        Published: device memory allocated, less the bfloat16 model that was still resident.
        """
        names = [str(name) for name in self.variable(self._memory_variable)["memory_method"].values]
        if method not in names:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no memory of {method}")
        return float(self.variable(self._memory_variable)[names.index(method)])

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
