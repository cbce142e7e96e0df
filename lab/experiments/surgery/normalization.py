"""T-15 normalization: which part of a trained RMSNorm does the model depend on?

An RMSNorm, gain * x / sqrt(mean(x^2) + eps), rescales every token, does not centre, and has a learned scale. Other
modules take its place without training, and the loss tells what each part is worth:

    loss_delta = loss - baseline,    damage_fraction = loss_delta / (ln V - baseline),

where ln V is a uniform guess; above 1 further differences mean nothing. The source gives ratios of losses, which a
greedy model's tiny baseline inflates: its 1.40 is +0.034 nat. Losses that are not finite are kept as missing.

`identity` drops the scale of the input, the gain and the adaptation to the token together; `frozen_scale` divides by a
constant and so drops the adaptation alone. Statistics pooled over all elements of a text, as published, describe the
massive activation of its first token; figures per token leave that token out.

The quick budget scores 12 texts of up to 32 completion tokens (about 370 of them) and calibrates on 8 others: a small
paired difference is then known to 0.02 nat, so that a swap that costs 0.06 is clear of 0.10 in most resamples, not in
all. It leaves out single sites of single layers and a constant scale for the first token of single layers. Times of
kernels (T-15.27 to 29) are taken on CUDA devices only.

The recovery of a swap by training its scales (T-15.33) takes 100 steps, one text each, on all texts that are not
scored; the full budget goes on to 1000. The step size is one at which the control, the model's own norms trained alike,
gains on the scored texts: on SmolLM2 its 0.630 nat became 0.515 after 100 steps at 1e-4; at 1e-3, on a third of the
texts, 1.23. The full budget leaves a quarter of the texts to train on, and they are soon learned by heart: there the
control went from 0.621 to 0.555 after 100 steps, 1.15 after 500 and 1.40 after 1000, so that later steps say how much
worse a swap then generalizes, not what it cannot learn. Recovery is therefore read after the steps at which the control
is best, whatever the swaps do then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.normalization.observed import NormActivations
from lab.normalization.recovered import TrainedNorms
from lab.normalization.settings import Bench, Training

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

#: the loss has left what a uniform guess allows halfway
HALF = 0.5


class Normalization(TrainedNorms, NormActivations):
    """Losses with norms replaced, what norms see, and what claims derive from them.

    Dimensions: `variant` (whole models), `layer`, `site` (pre_attention, pre_mlp, and post_attention, post_mlp where
    the model has them), `condition` of query and key norms, `norm_type`, `hidden_size` and `sequence_length` of
    timings, `recovery_variant` and `step` of training. Losses are weighted by scored tokens, statistics by text.
    """

    sampling: ClassVar = {"prompt": "scored_tokens"}
    profiles: ClassVar = (
        "removed_damage",
        "frozen_damage",
        "layer_output_std",
        "layer_output_token_rms",
        "mean_to_std_vs_chance",
        "output_std",
    )

    # ---- whole models

    @cached_property
    def baseline_loss(self) -> float:
        """Loss of the intact model [nat/token]."""
        return float(self.mean("baseline_loss"))

    @cached_property
    def variants(self) -> list[str]:
        """Names of the whole-model replacements measured."""
        return [str(name) for name in self.data["variant"].values]

    @cached_property
    def replacement_loss(self) -> xr.DataArray:
        """Loss with norms replaced in the whole model [variant], nat/token; NaN where it is not finite."""
        return self.mean("replacement_loss")

    def loss_of(self, variant: str) -> float:
        """Loss of one replacement [nat/token].

        Raises:
            NotApplicable: it was not measured, or the model has no such norms.
        """
        if variant not in self.variants:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no model with {variant}")
        return float(self.replacement_loss.values[self.variants.index(variant)])

    def damage(self, variant: str) -> float:
        """Rise of the loss [nat/token]; infinite where the loss is not finite."""
        return _finite_or_more(self.loss_of(variant)) - self.baseline_loss

    def ratio(self, variant: str) -> float:
        """Loss over baseline, as published; infinite where the loss is not finite."""
        return _finite_or_more(self.loss_of(variant)) / self.baseline_loss

    def damage_fraction(self, variant: str) -> float:
        """Rise of the loss over that of a uniform guess; infinite where the loss is not finite."""
        return self.fraction(self.damage(variant))

    def fraction(self, damage: float) -> float:
        """A rise of the loss as a share of that of a uniform guess."""
        return damage / (self.uniform_loss - self.baseline_loss)

    @cached_property
    def layer_norm_damage(self) -> float:
        """Rise of the loss with layer norms of the model's own eps in the block and before the head [nat/token].

        The published swap takes query and key norms along and another eps; its record has no other.
        """
        return self.damage("layer_norm" if "layer_norm" in self.variants else "layer_norm_all")

    @cached_property
    def joint_groups(self) -> list[str]:
        """Joint group norms measured, by rising number of groups."""
        named = [name for name in self.variants if name.startswith("group_norm_") and not name.endswith("_token")]
        return sorted(named, key=lambda name: int(name.rpartition("_")[2]))

    @cached_property
    def batch_norms(self) -> list[str]:
        """Batch norms measured: with exact statistics, and with those of the published schedule."""
        return [name for name in ("batch_norm", "batch_norm_published") if name in self.variants]

    @cached_property
    def swapped_sites(self) -> list[str]:
        """Sites whose norms alone were swapped for layer norms, in all layers.

        Raises:
            NotApplicable: none were.
        """
        prefix = "layer_norm_at_"
        found = [name.removeprefix(prefix) for name in self.variants if name.startswith(prefix)]
        if not found:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no layer norms at single sites")
        return found

    def leak(self, variant: str) -> float:
        """Largest change of a logit when later tokens are exchanged for others; NaN where logits are not finite.

        Raises:
            NotApplicable: not measured.
        """
        leaks = self.variable("causality_leak")
        self.loss_of(variant)
        return float(leaks.values[self.variants.index(variant)])

    def token_twin(self, joint: str) -> str:
        """The replacement with a joint group norm's groups and the statistics of each token alone.

        One group per token is layer norm, which is measured under that name.
        """
        return "layer_norm" if joint == "group_norm_1" else f"{joint}_token"

    def share_of_a_guess(self, variant: str) -> float:
        """Rise of the loss as a share of a uniform guess's, at most 1: above it differences mean nothing."""
        return min(self.damage_fraction(variant), 1.0)

    # ---- query and key norms

    def require_head_norms(self) -> None:
        """Raise NotApplicable unless the model has query and key norms."""
        if not self.has("qk_norm_removed_loss"):
            raise NotApplicable(f"{self.subject} has no query and key norms")

    @cached_property
    def head_norm_damage(self) -> float:
        """Rise of the loss with query and key norms removed [nat/token]; infinite where the loss is not finite."""
        self.require_head_norms()
        return _finite_or_more(float(self.mean("qk_norm_removed_loss"))) - self.baseline_loss

    @cached_property
    def head_frozen_damage(self) -> float:
        """The same with a constant in the place of each head vector's root mean square."""
        self.require_head_norms()
        return _finite_or_more(float(self.mean("qk_frozen_scale_loss"))) - self.baseline_loss

    def amplification(self, which: str, without: str = "without_qk_norm") -> xr.DataArray:
        """Largest |element| of queries or keys with their norm, over that in another condition [layer].

        Args:
            which: `query` or `key`.
            without: `without_qk_norm`, the model with all such norms gone, as published; `raw_intact`, what the norm
                is given in the intact model.

        Raises:
            NotApplicable: the model has no such norms, or the condition was not read.
        """
        self.require_head_norms()
        extremes = self.extremes(which)
        if without not in extremes["condition"].values:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no {without}")
        return extremes.sel(condition="with_qk_norm", drop=True) / extremes.sel(condition=without, drop=True)

    def extremes(self, which: str) -> xr.DataArray:
        """Largest |element| of queries or keys over texts, heads, tokens and channels [condition, layer]."""
        if self.has(f"{which}_abs_max"):
            return self.variable(f"{which}_abs_max")
        return self.variable(f"{which}_abs_max_sample_mean").max("prompt")

    # ---- single layers

    @cached_property
    def removed_loss(self) -> xr.DataArray:
        """Loss with the norms that one layer reads the stream through replaced by identity [layer], nat/token.

        Infinite where it is not finite.
        """
        return self.mean("layer_norm_removed_loss").fillna(np.inf)

    @cached_property
    def removed_damage(self) -> xr.DataArray:
        """The same as a rise of the loss [layer], nat/token."""
        return self.removed_loss - self.baseline_loss

    @cached_property
    def removed_ratio(self) -> xr.DataArray:
        """The same over the baseline, as published [layer]."""
        return self.removed_loss / self.baseline_loss

    @cached_property
    def removed_fraction(self) -> xr.DataArray:
        """The same as a share of a uniform guess's rise [layer]."""
        return self.removed_damage / (self.uniform_loss - self.baseline_loss)

    @cached_property
    def frozen_damage(self) -> xr.DataArray:
        """Rise of the loss with a constant scale in one layer, the first token's own kept [layer], nat/token."""
        return self.mean("layer_frozen_scale_first_exact_loss").fillna(np.inf) - self.baseline_loss

    def least(self, count: int) -> set[int]:
        """The layers whose loss without norms is lowest."""
        return set(np.argsort(self.removed_loss.values)[:count].tolist())

    def most(self, count: int) -> set[int]:
        """The layers whose loss without norms is highest."""
        return set(np.argsort(-self.removed_loss.values)[:count].tolist())


def _finite_or_more(loss: float) -> float:
    return loss if np.isfinite(loss) else float("inf")


@dataclass(frozen=True)
class Budget:
    """How much is read and replaced.

    Attributes:
        prompts: texts scored, of three fourths of the corpus; None is all of those.
        tokens: completion tokens of each text; None is all.
        calibration_prompts: texts of the other fourth, on which constants are collected and norms trained; None is all.
        groups: of group norms; those that do not divide the width are left out.
        removals: what single layers' norms are replaced by: `identity`, `frozen_scale`, `frozen_scale_first_exact`.
        sites_separately: whether each site of each layer is replaced alone, too.
        leak_tokens: tokens of the text on which causality is tried.
        batch_norm_passes, batch_norm_momentum: published schedule of batch norm's statistics.
        training: how norms are trained to make up for a swap; None trains nothing.
        bench: how kernels are timed, on a CUDA device.
        head_dtype: precision of the vocabulary projection.
        batch_tokens: padded tokens per batch.
    """

    prompts: int | None
    tokens: int | None
    calibration_prompts: int | None
    groups: tuple[int, ...]
    removals: tuple[str, ...]
    sites_separately: bool
    leak_tokens: int = 32
    batch_norm_passes: int = 5
    batch_norm_momentum: float = 0.1
    training: Training | None = None
    bench: Bench = field(default_factory=Bench)
    head_dtype: str = "bfloat16"
    batch_tokens: int = 2048


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Replace norms of the whole model, of single layers and of attention heads; watch what they see.

    Raises:
        NotApplicable: the model's norms are no RMSNorms around attention and MLP.
        UserError: the corpus is too small.
    """
    from lab.experiments.surgery.measuring import normalization

    return normalization.measure(subject, corpus, budget, sweep)


_LOSS = Tolerance(0.02, 0.02, "other kernels moved losses by 1 % (AVX2 for AVX-512) and 0.5 % (another batch shape)")
_BROKEN = Tolerance(0.05, 0.1, "a broken model is far from its training: roundings grow from layer to layer")
_POOLED = Tolerance(0.05, 1e-4, "one massive activation rules it, which is rounded coarsely")
_EXACT = Tolerance(1e-3, 1e-5, "weights are the same numbers anywhere; sums of them are not")
_TOKEN = Tolerance(0.02, 1e-3, "states of other kernels differ by a few bfloat16 roundings; a median hardly moves")
_MEAN = Tolerance(0.05, 1e-3, "a small mean of many rounded channels")
_TIME = Tolerance(0, float("inf"), "time on whichever device; a benchmark, not a finding")
TOLERANCES = {
    "": _TOKEN,
    "baseline_loss": _LOSS,
    "restored_loss": _LOSS,
    "replacement_loss": _BROKEN,
    "causality_leak": Tolerance(0, float("inf"), "the largest of thousands of logits; claims ask whether it is zero"),
    "residual_std_under_replacement": Tolerance(
        0.015,
        0.2,
        "one text in broken models, ruled by single elements, that grows by a factor per layer: of 1e32 AVX-512 made "
        "2e32, from AVX2, 0.9 % of its logarithm",
        logarithmic=True,
    ),
    "layer_norm_removed_loss": _BROKEN,
    "site_norm_removed_loss": _BROKEN,
    "layer_frozen_scale_loss": _BROKEN,
    "layer_frozen_scale_first_exact_loss": _BROKEN,
    "site_frozen_scale_first_exact_loss": _BROKEN,
    "qk_norm_removed_loss": _BROKEN,
    "qk_frozen_scale_loss": _BROKEN,
    "recovery_loss": _BROKEN,
    "query_abs_max_sample_mean": Tolerance(0.1, 0.05, "one element of one token; in the broken model more so"),
    "key_abs_max_sample_mean": Tolerance(0.1, 0.05, "one element of one token; in the broken model more so"),
    "query_rms_median": Tolerance(0.1, 0.01, "in the broken model roundings grow"),
    "key_rms_median": Tolerance(0.1, 0.01, "in the broken model roundings grow"),
    "forward_latency": _TIME,
    "backward_latency": _TIME,
    "total_latency": _TIME,
}
TOLERANCES |= dict.fromkeys(
    (
        "layer_output_std",
        "layer_output_first_token_rms",
        "first_token_rms",
        "norm_input_std",
        "norm_input_excess_kurtosis",
        "norm_input_skewness",
        "norm_output_std",
        "norm_output_excess_kurtosis",
        "norm_output_skewness",
        "top_element_power_share",
    ),
    _POOLED,
)
TOLERANCES |= dict.fromkeys(
    (
        "norm_input_mean",
        "norm_output_mean",
        "norm_input_near_zero_fraction",
        "norm_output_near_zero_fraction",
        "norm_input_token_excess_kurtosis",
        "token_mean",
        "token_abs_mean",
        "mean_to_std",
        "layer_norm_output_change",
        "final_layer_norm_output_change",
    ),
    _MEAN,
)
TOLERANCES |= {
    f"{place}_{name}": _EXACT
    for place, names in {
        "scale": ("mean", "std", "min", "max", "abs_deviation_from_one", "near_one_fraction", "global_mean"),
        "scale_global": ("std",),
        "scale_within": ("10pct_fraction", "50pct_fraction"),
        "final_scale": ("mean", "std"),
    }.items()
    for name in names
}
EXPERIMENT = Experiment(
    id="T-15",
    title="Normalization",
    question="Which part of a trained RMSNorm does a model depend on, and what can take its place?",
    record=Normalization,
    measure=measure,
    budgets={
        "quick": Budget(
            prompts=12,
            tokens=32,
            calibration_prompts=8,
            groups=(1, 8, 32, 64),
            removals=("identity", "frozen_scale_first_exact"),
            sites_separately=False,
            training=Training(steps=(100,), learning_rate=1e-4),
        ),
        "full": Budget(
            prompts=None,
            tokens=None,
            calibration_prompts=None,
            groups=(1, 8, 32, 64),
            removals=("identity", "frozen_scale", "frozen_scale_first_exact"),
            sites_separately=True,
            training=Training(steps=(100, 500, 1000), learning_rate=1e-4),
            batch_tokens=16384,
        ),
    },
    tolerances=TOLERANCES,
)
