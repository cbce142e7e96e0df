"""T-4 residual geometry: how many directions does the residual stream use, and how do layers move the states?

The states of the completion tokens at one site (-1 the embedding, l the output of layer l, the last one before the
final norm) form a cloud. Its effective dimension is the participation ratio of the covariance's eigenvalues,

    PR = (sum e_i)^2 / sum e_i^2.

Second moments of the states as they are measure massive activations: one token of 60 times the usual norm makes any
cloud one-dimensional. Every layer reads the stream through a norm, so the robust variants scale the states to norm 1
(`unit`), leave out tokens of outlying norm (`trimmed`) or the leading direction (`without_top1`); angles between
tokens need no such choice. Means over pairs of tokens are exact, not sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.records import Record
from lab.statistics.geometry_figures import FIGURES, Draw, Kept

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

EMBEDDING = -1
#: not figures of their own: intermediate sums
_INTERNAL = ("direction_scatters",)


class ResidualGeometry(Record):
    """Clouds of token states and updates over depth, and what claims derive from them.

    Dimensions: `site` (-1 the embedding, l after layer l), `layer`, `layer_other`, `gap`, `rank`. A measured record
    holds sums per prompt and per pair of prompts, from which the figures follow; see `lab.statistics.geometry_figures`.
    """

    profiles: ClassVar = (
        "participation_ratio",
        "robust_participation_ratio",
        "cosine_raw_mean",
        "norm_mean",
        "cosine_to_final",
        "update_ratio",
        "category_gap",
    )

    def __init__(self, data: xr.Dataset, draw: Draw | None = None):
        """Wrap a record.

        Args:
            data: sums per prompt, or figures.
            draw: the prompts of a bootstrap resample; None is each once.
        """
        super().__init__(data)
        self._given = draw
        self._found: dict[str, xr.DataArray] = {}

    @cached_property
    def _draw(self) -> Draw:
        return self._given or Draw(Kept(self.data), np.ones(self.data.sizes["prompt"]))

    def has(self, name: str) -> bool:
        """Whether the record holds this figure."""
        return name in self._names

    @cached_property
    def _names(self) -> set[str]:
        if "prompt" not in self.data.dims:
            return {str(name) for name in self.data.data_vars}
        unsampled = {str(name) for name, array in self.data.data_vars.items() if "prompt" not in array.dims}
        return unsampled | set(FIGURES)

    def variable(self, name: str) -> xr.DataArray:
        """A figure, over all tokens.

        Raises:
            NotApplicable: the record does not hold it.
        """
        if name not in self._found:
            if not self.has(name):
                raise NotApplicable(f"the {self.source} record of {self.subject} holds no {name}")
            sampled = "prompt" in self.data.dims and name in FIGURES
            self._found[name] = self._draw.labelled(name) if sampled else self.data[name]
        return self._found[name]

    def mean(self, name: str) -> xr.DataArray:
        """A figure, over all tokens: figures have no sampling dimension left."""
        return self.variable(name)

    def summary(self) -> xr.Dataset:
        """All figures: the numbers that a snapshot holds."""
        return xr.Dataset({name: self.variable(name) for name in sorted(self._names) if name not in _INTERNAL})

    def _resampled(self, generators: Mapping[str, np.random.Generator]) -> Self:
        size = self.data.sizes["prompt"]
        drawn = generators["prompt"].integers(size, size=size)
        # What was measured is shared; a resample is a count per prompt.
        counts = np.bincount(drawn, minlength=size).astype(float)
        return type(self)(self.data, Draw(self._draw.kept, counts))

    # ---- depth

    @cached_property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return int(self.data.sizes["layer"])

    @property
    def last(self) -> int:
        """The last layer, L - 1."""
        return self.n_layers - 1

    @property
    def width(self) -> int:
        """Width of the residual stream d."""
        return int(self.provenance["settings"]["hidden_size"])

    def depth(self, layer: int) -> float:
        """Relative depth x of a site: l / (L - 1)."""
        return layer / (self.n_layers - 1)

    def between(self, quantity: xr.DataArray, first: float, last: float) -> xr.DataArray:
        """The layers of a profile [site or layer] at relative depths first <= x <= last, without the embedding."""
        depths = np.asarray(quantity[quantity.dims[0]].values) / (self.n_layers - 1)
        return quantity[(depths >= max(first, 0) - 1e-9) & (depths <= last + 1e-9)]

    def after(self, quantity: xr.DataArray, layers: xr.DataArray) -> xr.DataArray:
        """A profile [site] as a profile [layer] after these layers, to be set beside another experiment's."""
        return xr.DataArray(quantity.sel(site=layers.values).values, {"layer": layers.values}, ("layer",))

    def interior(self, quantity: xr.DataArray) -> xr.DataArray:
        """A profile [site] without the embedding and the last layer."""
        return quantity.sel(site=slice(0, self.last - 1))

    def inner_layers(self, quantity: xr.DataArray) -> xr.DataArray:
        """A profile [layer] without the first and the last layer."""
        return quantity.sel(layer=slice(1, self.last - 1))

    def require_layers(self, layer: int, first: int, last: int) -> None:
        """Raise NotApplicable unless first <= layer <= last."""
        if not first <= layer <= last:
            # The layer stays unnamed, so that pytest lists all layers outside in one line.
            raise NotApplicable(f"the claim speaks of layers {first} to {last}")

    # ---- dimension

    @property
    def participation_ratio(self) -> xr.DataArray:
        """Participation ratio of the centred states [site]."""
        return self.variable("participation_ratio")

    @property
    def robust_participation_ratio(self) -> xr.DataArray:
        """Participation ratio that no token's norm can rule [site].

        Of unit-normalised states; published figures allow only for the leading direction to be left out.
        """
        unit = self.has("participation_ratio_unit")
        return self.variable("participation_ratio_unit" if unit else "participation_ratio_without_top1")

    def relative_to_median(self, quantity: xr.DataArray) -> xr.DataArray:
        """A profile [site] over its median over the interior sites."""
        return quantity / float(np.median(self.interior(quantity).values))

    @property
    def directional_dimension(self) -> xr.DataArray:
        """1 / mean squared cosine of two centred states [site]: a dimension without norms."""
        return self.variable("directional_dimension")

    @property
    def single_token_share(self) -> xr.DataArray:
        """Squared leading singular value over squared largest norm [site]; about 1 if one token makes it."""
        return self.variable("top1_as_single_token")

    def variance_top(self, count: int) -> xr.DataArray:
        """Share of the variance in the leading directions [site]; 1, 5, 10, 50 or 100 of them."""
        return self.variable(f"variance_top{count}")

    @property
    def spectral_flatness(self) -> xr.DataArray:
        """Geometric over arithmetic mean of all eigenvalues [site]; ruled by the smallest of them."""
        return self.variable("spectral_flatness")

    # ---- angles between tokens

    @property
    def cosine_raw_mean(self) -> xr.DataArray:
        """Mean cosine of two tokens' states [site]."""
        return self.variable("cosine_raw_mean")

    @property
    def cosine_centered_mean(self) -> xr.DataArray:
        """Mean cosine of two tokens' centred states [site]; near zero almost by construction."""
        return self.variable("cosine_centered_mean")

    @cached_property
    def isotropy_ratio(self) -> xr.DataArray:
        """Spread of the centred cosines over that of isotropic directions, std * sqrt(d) [site]; 1 is isotropic."""
        spread = self.variable("cosine_centered_std")
        return spread.copy(data=spread.values * np.sqrt(self.width))

    @cached_property
    def category_gap(self) -> xr.DataArray:
        """Mean cosine within minus between categories [site]; of different prompts, where they were told apart."""
        if self.has("category_gap"):
            return self.variable("category_gap")
        return self.variable("intra_category_cosine") - self.variable("inter_category_cosine")

    # ---- norms and updates

    @property
    def norm_mean(self) -> xr.DataArray:
        """Mean norm of the states [site]."""
        return self.variable("norm_mean")

    @property
    def norm_growth(self) -> tuple[float, float]:
        """Mean growth of the mean norm per layer in the first half (l < L/2) and in the second (without the last)."""
        steps, half = self._step(self.norm_mean).values[1:], self.n_layers // 2
        return float(steps[: half - 1].mean()), float(steps[half - 1 : -1].mean())

    @property
    def update_norm(self) -> xr.DataArray:
        """Mean norm of each layer's update [layer]."""
        return self.variable("update_norm_mean")

    @cached_property
    def update_to_input(self) -> xr.DataArray:
        """Mean norm of the update over mean norm of its input [layer]."""
        return self.update_norm / self.norm_mean.values[:-1]

    @property
    def cosine_input_output(self) -> xr.DataArray:
        """Mean cosine of a layer's input and output [layer]."""
        return self.variable("cosine_input_output")

    @property
    def update_ratio(self) -> xr.DataArray:
        """Mean norm of the update over the norm of the layer's output [layer]."""
        return self.variable("update_ratio")

    @property
    def update_alignment(self) -> xr.DataArray:
        """Mean cosine of the update with the layer's input [layer]; below 0 the update cancels."""
        return self.variable("update_alignment")

    @property
    def update_correlation(self) -> xr.DataArray:
        """Cosine of the token-averaged updates of two layers [layer, layer_other]; blind to what differs by token."""
        return self.variable("update_correlation")

    # ---- towards the final state

    @property
    def cosine_to_embedding(self) -> xr.DataArray:
        """Mean cosine of the state with the token's embedding [site]."""
        return self.variable("cosine_to_embedding")

    @property
    def cosine_to_final(self) -> xr.DataArray:
        """Mean cosine of the state with the token's final state [site]."""
        return self.variable("cosine_to_final")

    @cached_property
    def approach(self) -> xr.DataArray:
        """What each layer adds to the cosine with the final state [layer]."""
        return self._step(self.cosine_to_final)

    @property
    def update_cosine_to_final(self) -> xr.DataArray:
        """Mean cosine of the update with the final state [layer]."""
        return self.variable("update_cosine_to_final")

    @property
    def update_projection_fraction(self) -> xr.DataArray:
        """Mean size of the cosine of the update with the final state [layer]."""
        return self.variable("update_projection_fraction")

    def final_share(self, first: int, last: int) -> float:
        """Share of the final norm that layers first to last contribute along the final state."""
        return float(self.variable("final_norm_fraction").sel(site=slice(first, last)).sum())

    def _step(self, profile: xr.DataArray) -> xr.DataArray:
        values = np.diff(profile.values)
        return xr.DataArray(values, dims="layer", coords={"layer": np.arange(len(values))})

    # ---- blocks of layers

    def mean_correlation(self, layers: list[int], others: list[int] | None = None) -> float:
        """Mean update correlation over the pairs within some layers, or between them and others."""
        matrix = self.update_correlation.values
        if others is not None:
            return float(matrix[np.ix_(layers, others)].mean())
        block = matrix[np.ix_(layers, layers)]
        return float(block[np.triu_indices(len(layers), k=1)].mean())

    def block_contrast(self, layers: list[int]) -> float:
        """Mean update correlation within some layers minus that between them and all others."""
        others = [layer for layer in range(self.n_layers) if layer not in layers]
        return self.mean_correlation(layers) - self.mean_correlation(layers, others)


# ---- measuring


@dataclass(frozen=True)
class Budget:
    """How many tokens are read.

    Attributes:
        prompts: a balanced prefix of the corpus; None is all.
        tokens: completion tokens per prompt, from the start of the completion; None is all.
        positions: whose states: of the completion's tokens, as published, of all tokens, or of all but the first,
            which is where attention sinks lie.
        score_repeated: whether tokens of repeated 8-grams count, as in the published run.
        outlier_factor: a token is an outlier if its norm exceeds this many times the site's median norm.
        batch_tokens: padded tokens per batch.
    """

    prompts: int | None
    tokens: int | None
    positions: Literal["completion", "all", "all_but_first"] = "completion"
    score_repeated: bool = False
    outlier_factor: float = 5.0
    batch_tokens: int = 1024


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Read the states of the chosen tokens at every depth, and keep what their geometry needs."""
    from lab.experiments.layers.measuring import residual_geometry

    return residual_geometry.measure(subject, corpus, budget, sweep)


# Every prompt, for prompts are what is drawn anew; 64 tokens of each, which costs accuracy of the participation ratio
# (1/PR is too large by 1/N: 4 % at PR 90 of N = 2400) and spreads tokens evenly over prompts.
QUICK = Budget(prompts=None, tokens=64)
FULL = Budget(prompts=None, tokens=None, batch_tokens=4096)
_ROUNDING = (
    "all bfloat16 rounding together (against float32) moved {} on 336 tokens of SmolLM2, other batches 0.1 % of it"
)
_FEW_TOKENS = Tolerance(0.05, 0.01, _ROUNDING.format("it by 2 %") + "; a few tokens of massive norm rule it")
_ANGLE = Tolerance(0.02, 0.02, _ROUNDING.format("it by 0.007") + "; deeper models round more often")
TOLERANCES = {
    "": Tolerance(0.02, 0.005, _ROUNDING.format("figures by up to 2 %, or 0.004")),
    "participation_ratio": _FEW_TOKENS,
    "participation_ratio_trimmed": Tolerance(
        0.15, 0.01, "a token whose norm lies at the limit is in or out: one less moved it by 8 % (AMX against AVX2)"
    ),
    "top1_as_single_token": _FEW_TOKENS,
    "final_projection_signed": Tolerance(0.03, 0.02, _ROUNDING.format("it by 2 %")),
    "update_alignment": _ANGLE,
    "update_alignment_std": _ANGLE,
    "update_correlation": _ANGLE,
    "cosine_to_final": _ANGLE,
    "outlier_tokens": Tolerance(0.02, 2, "a token whose norm lies at the limit"),
    "num_nonzero_singular_values": Tolerance(0.0, 2, "directions at the limit of rounding"),
    "category_gap_p_value": Tolerance(0.1, 0.005, "a few of 999 permutations"),
}
EXPERIMENT = Experiment(
    id="T-4",
    title="Residual geometry",
    question="How many directions does the residual stream use at each depth, and how do layers move the states?",
    record=ResidualGeometry,
    measure=measure,
    budgets={"quick": QUICK, "full": FULL},
    tolerances=TOLERANCES,
)
