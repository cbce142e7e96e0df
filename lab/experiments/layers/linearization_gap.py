"""T-7 layer linearization gap: how far is each layer's update g(x) = layer(x) - x from a linear map?

Locally: moved by d, |d| = eps |x|, the update answers with D+ = g(x + d) - g(x); the gap is |D+ - J d| / |D+| with
the exact derivative J d. For a smooth g it falls in proportion to eps. Globally: one matrix takes the layer's place
for all inputs, fitted to some prompts and scored on others by the share of the knockout loss that it recovers.

Two settings of the gap. The sound one: float32, exact J d, the prompt as context (the layer's real call arguments).
The published one (variables `bfloat16_*`): central differences in the model's dtype on completion tokens without
their context. There g is the difference of two rounded states, and rounding, which does not shrink with eps, makes
half or more of the squared gap. Published figures have the second setting only; for claims about the first their
record holds an estimate, `perturbation_gap_denoised`, from a two-parameter fit of rounding and curvature to the
published gaps at five eps.

The quick budget reads 7 prompts of 20 tokens and 3 directions instead of 48 prompts, 1,558 tokens and 16 directions:
a gap's standard error is then about 2 %, and the share of prompts in its variance is poorly known. Singular values are
iterated at 3 tokens. It replaces every third layer, the second, the last and the one with the largest outliers, and
scores 10 prompts of 20 tokens: the interval of a recovery is then some 0.5 wide where a layer is worth 0.2 nat and
0.05 where it is worth 5, and correlations over layers rest on 9 to 13 of them. In Qwen2.5-0.5B only 3 are worth enough
(0.15 nat): claims about all layers need 8, and do not apply there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.statistics.linear_recovery import LinearRecovery

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

#: size of a move, relative to the token's norm, at which gaps are compared, and the one that tells curvature from noise
EPS, SMALL_EPS = 0.05, 0.005
#: leading principal directions among which some are moved along; the published rank counts no more
TOP = 20
#: the published plateau, layers 8 to 18 of 36, as relative depths
PLATEAU = (8 / 36, 18 / 36)
#: Depths within rounding of each other are one depth.
SAME_DEPTH = 1e-9


class LinearizationGap(LinearRecovery):
    """Gaps, gains and Jacobian products of every layer, and losses with layers replaced by matrices.

    Dimensions: `layer`, `eps` (relative size of the move), `rank` (of a cut map), `prompt` (moved and read),
    `iterated_prompt` (one Jacobian block each), `scored_prompt` (never fitted to). Layers that were not replaced or
    iterated hold NaN there. `rounded_*` properties are the published setting.
    """

    sampling: ClassVar = {"prompt": "analysed_tokens", "iterated_prompt": None, "scored_prompt": "scored_tokens"}
    profiles: ClassVar = ("ungated_gap", "rounded_gap", "replaced_recovery", "consistency_token")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return int(self.data.sizes["layer"])

    @cached_property
    def depth(self) -> np.ndarray:
        """Relative depth of each layer [layer]: layer / number of layers."""
        return np.arange(self.n_layers) / self.n_layers

    def within(self, low: float, high: float) -> list[int]:
        """Layers at depths low <= z <= high."""
        inside = (self.depth >= low - SAME_DEPTH) & (self.depth <= high + SAME_DEPTH)
        return [int(layer) for layer in np.flatnonzero(inside)]

    @cached_property
    def plateau(self) -> list[int]:
        """Layers at the depths of the published plateau (layers 8 to 18 of 36)."""
        return self.within(*PLATEAU)

    def require_depth(self, layer: int, low: float, high: float) -> None:
        """Raise NotApplicable unless the layer lies at depths low <= z <= high."""
        if layer not in self.within(low, high):
            raise NotApplicable(f"the claim speaks of layers at depths {low:.2f} to {high:.2f}")

    def mean_at(self, quantity: xr.DataArray, layers: Sequence[int]) -> float:
        """Mean of a quantity [layer] over some layers."""
        return float(quantity.values[list(layers)].mean())

    # ---- gaps

    @cached_property
    def gap_by_eps(self) -> xr.DataArray:
        """Gap in float32 with exact derivatives [layer, eps]."""
        return self.mean("perturbation_gap_by_eps")

    @cached_property
    def rounded_gap_by_eps(self) -> xr.DataArray:
        """Gap in the published setting [layer, eps]."""
        return self.mean("bfloat16_perturbation_gap_by_eps")

    @cached_property
    def noise_dominated(self) -> xr.DataArray:
        """Where a tenth of the move leaves more than 0.3 of the float32 gap [layer]: noise does not shrink with it."""
        return self.gap_by_eps.sel(eps=SMALL_EPS) > 0.3 * self.gap_by_eps.sel(eps=EPS)

    def require_smooth(self) -> None:
        """Raise NotApplicable if noise rules the float32 gap of any layer: claims about curvature then mean nothing."""
        if self.has("perturbation_gap_by_eps") and bool(self.noise_dominated.any()):
            layers = np.flatnonzero(self.noise_dominated.values).tolist()
            raise NotApplicable(f"rounding noise rules the float32 gap of layers {layers}, see T-7.4b")

    @cached_property
    def gap(self) -> xr.DataArray:
        """Gap at eps 0.05 without rounding [layer]: in float32; of published figures their de-noised estimate.

        Raises:
            NotApplicable: noise rules it, see `require_smooth`.
        """
        self.require_smooth()
        return self.ungated_gap

    @cached_property
    def ungated_gap(self) -> xr.DataArray:
        """The same, whether noise rules it or not [layer]."""
        if not self.has("perturbation_gap_by_eps"):
            return self.variable("perturbation_gap_denoised")
        return self.gap_by_eps.sel(eps=EPS, drop=True)

    @cached_property
    def rounded_gap(self) -> xr.DataArray:
        """Gap at eps 0.05 in the published setting [layer]."""
        return self._rounded("perturbation")

    @cached_property
    def rounded_branches(self) -> tuple[xr.DataArray, xr.DataArray]:
        """Gap of the attention and of the MLP branch in the published setting, each [layer]."""
        return self._rounded("attention"), self._rounded("mlp")

    @cached_property
    def branches(self) -> tuple[xr.DataArray, xr.DataArray]:
        """Gap of the attention and of the MLP branch in float32, each [layer]."""
        self.require_smooth()
        attention, mlp = (self.mean(f"{name}_gap_by_eps").sel(eps=EPS, drop=True) for name in ("attention", "mlp"))
        return attention, mlp

    def _rounded(self, name: str) -> xr.DataArray:
        published = f"bfloat16_{name}_gap"
        if self.has(published):
            return self.mean(published)
        return self.mean(f"{published}_by_eps").sel(eps=EPS, drop=True)

    @cached_property
    def gap_by_prompt(self) -> xr.DataArray:
        """Gap at eps 0.05 of single prompts [layer, prompt] in float32."""
        return self.variable("perturbation_gap_by_eps").sel(eps=EPS)

    @cached_property
    def rounded_gap_by_prompt(self) -> xr.DataArray:
        """Gap at eps 0.05 of single prompts [layer, prompt] in the published setting."""
        if self.has("bfloat16_perturbation_gap_per_prompt"):
            return self.variable("bfloat16_perturbation_gap_per_prompt")
        return self.variable("bfloat16_perturbation_gap_by_eps").sel(eps=EPS)

    @cached_property
    def rounded_variation(self) -> xr.DataArray:
        """Standard deviation of the published gap over prompts, over its mean [layer]."""
        if self.has("bfloat16_perturbation_gap_std"):
            return self.variable("bfloat16_perturbation_gap_std") / self.rounded_gap
        values = self.rounded_gap_by_prompt.values
        return self.rounded_gap.copy(data=values.std(1) / values.mean(1))

    @staticmethod
    def between_layers(by_prompt: xr.DataArray) -> float:
        """Share of the variance of a quantity [layer, prompt] that lies between the layers' means."""
        values = by_prompt.values
        return float(values.mean(1).var() / values.var())

    # ---- Jacobians

    @cached_property
    def update_ratio(self) -> xr.DataArray:
        """Mean norm of the update over mean norm of the input [layer]."""
        return self.mean("update_norm") / self.mean("input_norm")

    @cached_property
    def layer_gain(self) -> xr.DataArray:
        """Root mean square of |(I + J) u| over random unit u [layer]: what the whole layer makes of a perturbation.

        Published figures hold |J u| only, from which sqrt(1 + |J u|^2) would follow if J had no trace. It has one: past
        layer 0 the gains of SmolLM2 and Qwen2.5-0.5B lie below that in all layers but one, those of Gemma above it.
        """
        return self.mean("layer_gain_squared") ** 0.5

    @cached_property
    def consistency(self) -> xr.DataArray:
        """Cosine of token-averaged J u of two prompts, mean over pairs of prompts [layer]."""
        return self.mean("jacobian_consistency")

    @cached_property
    def consistency_token(self) -> xr.DataArray:
        """Cosine of J u at two tokens of different prompts, mean over pairs [layer]."""
        return self.mean("jacobian_consistency_token")

    @cached_property
    def consistency_within(self) -> xr.DataArray:
        """Cosine of J u at two tokens of one prompt, mean over pairs [layer]: the ceiling of `consistency_token`."""
        return self.mean("jacobian_consistency_within")

    @cached_property
    def rounded_manifold_ratio(self) -> xr.DataArray:
        """Published: gap along principal directions, shared by all tokens, over gap along random ones, not shared."""
        return self.variable("bfloat16_manifold_gap_ratio")

    @cached_property
    def manifold_ratio(self) -> xr.DataArray:
        """Gap along principal directions over gap along random ones that tokens share too [layer], float32."""
        self.require_smooth()
        return self.mean("on_manifold_gap") / self.mean("shared_direction_gap")


@dataclass(frozen=True)
class Budget:
    """How much is moved, differentiated and replaced.

    Attributes:
        local_prompts: prompts whose tokens are moved, a balanced prefix of the corpus; None is all.
        local_tokens: completion tokens of each; None is all.
        directions: random directions per token, and as many that all tokens share.
        eps: sizes of the move relative to the token's norm.
        rounded_directions: random directions in the published setting.
        principal: directions among the 20 leading principal ones, evenly spaced in rank.
        iterated_prompts: prompts whose tokens' gains and last token's spectral norm are iterated, replaced layers only.
        power_steps, spectral_steps: iterations of the published form, and of Lanczos bidiagonalization.
        layer_stride: every so manieth layer is replaced; see `replaced_layers`.
        scored_tokens: completion tokens scored per held-out prompt; None is all.
        ranks: to which the residual map is cut.
        head_dtype: precision of the vocabulary projection.
        batch_tokens: padded tokens per batch.
    """

    local_prompts: int | None
    local_tokens: int | None
    directions: int
    eps: tuple[float, ...]
    rounded_directions: int
    principal: int
    iterated_prompts: int
    layer_stride: int
    scored_tokens: int | None
    ranks: tuple[int, ...]
    power_steps: int = 5
    spectral_steps: int = 10
    head_dtype: str = "bfloat16"
    batch_tokens: int = 2048


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Read every layer's derivative on a few prompts, and replace layers by matrices fitted to the corpus.

    States come from one pass in the model's own dtype. Local readings cast one layer and its input to float32.
    Maps are fitted to three fifths of the prompts, choose their penalty on a fifth and are scored on the last one.
    """
    from lab.experiments.layers.measuring import linearization_gap

    return linearization_gap.measure(subject, corpus, budget, sweep)


_GAP = Tolerance(0.05, 0.002, "states of other kernels differ by a few bfloat16 roundings, which move gaps by 2 %")
_ROUNDED = Tolerance(0.15, 0.02, "half of these gaps is rounding, which other kernels draw anew")
_LOSS = Tolerance(0.02, 0.01, "other kernels moved losses by 1 % (AVX2 for AVX-512) and 0.5 % (another batch shape)")
_MAPPED = Tolerance(0.05, 0.05, "a map is fitted to states that other kernels round otherwise")
_COSINE = Tolerance(0.02, 0.02, "an average over few prompts whose states are rounded otherwise")
TOLERANCES = {
    "": _GAP,
    "scale_response": Tolerance(0.1, 0.02, "a ratio of small updates"),
    "homogeneity_gap": Tolerance(0.1, 0.02, "a ratio of small updates"),
    "nonlinearity_order": Tolerance(0, 0.05, "an exponent near 2"),
    "nonlinearity_order_r2": Tolerance(0, 0.01, "near 1 where the fit is good"),
    "jacobian_consistency": _COSINE,
    "jacobian_consistency_token": _COSINE,
    "jacobian_consistency_within": _COSINE,
    "baseline_loss": _LOSS,
    "knockout_loss": _LOSS,
    "residual_loss": _MAPPED,
    "normalized_loss": _MAPPED,
    "all_tokens_loss": _MAPPED,
    "low_rank_loss": _MAPPED,
    "ridge_penalty": Tolerance(3, 0, "a choice on a grid, often between near ties"),
    "rank95": Tolerance(0.02, 2, "a count of directions"),
    "participation_ratio": Tolerance(0.05, 0.5, "massive activations are rounded coarsely"),
    f"effective_rank_top{TOP}": Tolerance(0, 1, "a count of directions"),
    "on_manifold_gap": Tolerance(0.1, 0.005, "principal directions of near ties in variance turn"),
    "outlier_energy_factor": Tolerance(0.05, 0.05, "massive activations are rounded coarsely"),
}
TOLERANCES |= {
    f"bfloat16_{name}": _ROUNDED for name in ("perturbation_gap_by_eps", "attention_gap_by_eps", "mlp_gap_by_eps")
}
TOLERANCES |= {
    "bfloat16_nonlinearity_order": Tolerance(0, 0.15, "a slope through rounding noise"),
    "bfloat16_nonlinearity_order_r2": Tolerance(0, 0.1, "a slope through rounding noise"),
}
EXPERIMENT = Experiment(
    id="T-7",
    title="Layer linearization gap",
    question="How far is each layer's update from a linear map, around each input and for all inputs?",
    record=LinearizationGap,
    measure=measure,
    budgets={
        "quick": Budget(
            local_prompts=7,
            local_tokens=20,
            directions=3,
            eps=(0.005, 0.02, 0.05),
            rounded_directions=2,
            principal=3,
            iterated_prompts=3,
            layer_stride=3,
            scored_tokens=20,
            ranks=(32, 128),
            spectral_steps=8,
        ),
        "full": Budget(
            local_prompts=None,
            local_tokens=64,
            directions=16,
            eps=(0.005, 0.01, 0.02, 0.05, 0.1),
            rounded_directions=16,
            principal=20,
            iterated_prompts=8,
            layer_stride=1,
            scored_tokens=None,
            ranks=(16, 32, 64, 128, 256, 512),
            spectral_steps=20,
            batch_tokens=8192,
        ),
    },
    tolerances=TOLERANCES,
)
