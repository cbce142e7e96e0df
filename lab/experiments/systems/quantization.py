"""T-11 quantization: which layers, matrices and whole models break when weights are rounded to few bits?

Damage is the rise of the mean next-token loss on running text,

    dL = sum_r sum_t [L_quantized(r, t) - L_intact(r, t)] / sum_r n_r    [nat/token],

a paired difference on the same tokens: what is common to both runs cancels, and the bootstrap draws whole texts
(blocks of up to 48 correlated tokens; 128 in a full budget), all variants together. A quick budget reads some 450
tokens per sweep: it resolves about 0.01 nat at 4 bits, 0.02 at 3 and 0.05 at 2; support says which claims it carries.
The source gives rises of the perplexity, P exp(dL) - P, which no two models share a scale for; they are derived where
a published sentence speaks of them.

The offline subjects were stored in 4 to 8 bits before they came here. Their weights lie on a grid, which does two
things. What they lost on the way is in their baseline: claims about how much *full-precision* weights lose at 4 bits
do not apply (`require_full_precision`). And a format that puts its levels where theirs lie loses nothing: methods whose
measured weight error is far from that of Gaussian weights are not compared (`require_free_weights`). Rounding to 3 bits
and fewer is coarser than the grid. Both conditions are read off the weights, not off a name.
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
from lab.quantization.whole_models import WholeModels

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MATRIX_BITS = 2  #: single matrices at 3 bits (as published) lie below what a quick budget resolves
TYPE_BITS = 3
WIDTHS_OF_ORACLE = (3, 4, 5)
FIRST = 0.12  #: share of the depth that the published catastrophic block takes: layers 0 to 3 of 36


class Quantization(WholeModels):
    """Losses with weights rounded, and what claims derive from them.

    Dimensions: `layer` (L), `bits` (widths of the layer sweep), `error_bits`, `matrix` (types of linear maps),
    `method` (whole models), `recipe`, `permutation`, `memory_method`. The layer sweep is sampled over `prompt`;
    methods, types and recipes over `method_prompt` (other texts), single matrices over `matrix_prompt`; each has its
    own intact loss.
    """

    sampling: ClassVar = {
        "prompt": "scored_tokens",
        "method_prompt": "method_scored_tokens",
        "matrix_prompt": "matrix_scored_tokens",
    }
    profiles: ClassVar = (
        "two_bit_damage",
        "three_bit_damage",
        "true_two_bit_damage",
        "type_damage",
        "method_damages",
        "recipe_damages",
    )

    # ---- losses

    @cached_property
    def _layer_damage(self) -> xr.DataArray:
        return self.mean("layer_loss") - self.baseline_loss

    def damage(self, bits: int) -> xr.DataArray:
        """Rise of the loss with one layer at a width [layer], nat/token.

        Raises:
            NotApplicable: that width was not measured.
        """
        self._require_width(bits)
        return self._damage_at.setdefault(bits, self._layer_damage.sel(bits=bits, drop=True))

    @cached_property
    def _damage_at(self) -> dict[int, xr.DataArray]:
        return {}

    def _require_width(self, bits: int) -> None:
        if bits not in self.widths:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no layers at {bits} bits")

    @cached_property
    def widths(self) -> set[int]:
        """Widths at which single layers were measured."""
        return {int(width) for width in self.data["bits"].values}

    @property
    def two_bit_damage(self) -> xr.DataArray:
        """Rise of the loss with one layer at 2 bits (ternary, as published) [layer], nat/token."""
        return self.damage(2)

    @property
    def three_bit_damage(self) -> xr.DataArray:
        """Rise of the loss with one layer at 3 bits [layer], nat/token."""
        return self.damage(3)

    @cached_property
    def true_two_bit_damage(self) -> xr.DataArray:
        """Rise of the loss with one layer at 2 bits with four MSE-optimal levels [layer], nat/token."""
        return self.mean("true_two_bit_loss") - self.baseline_loss

    @cached_property
    def knockout_damage(self) -> xr.DataArray:
        """Rise of the loss without the layer, on the same text [layer], nat/token."""
        return self.mean("knockout_loss") - self.baseline_loss

    def whole_damage(self, bits: int) -> float:
        """Rise of the loss with all layers at a width, on the text of the layer sweep [nat/token]."""
        if not self.has("whole_loss"):  # the published run has one text for all
            return self.method_damage(f"rtn_{bits}")
        self._require_width(bits)
        return float(self.mean("whole_loss").sel(bits=bits) - self.baseline_loss)

    def super_additivity(self, bits: int) -> float:
        """Damage of all layers at once over the sum of single damages."""
        return self.whole_damage(bits) / float(self.damage(bits).sum())

    def perplexity_rise(self, loss_rise: xr.DataArray) -> xr.DataArray:
        """Rise of the perplexity that a rise of the loss means: P (exp(dL) - 1)."""
        rise: xr.DataArray = self.baseline_perplexity * xr.apply_ufunc(np.expm1, loss_rise)
        return rise

    @cached_property
    def layer_delta_perplexity(self) -> xr.DataArray:
        """Rise of the perplexity with one layer at a width [layer, bits], as published."""
        return self.perplexity_rise(self._layer_damage)

    def perplexity_rise_at(self, bits: int) -> xr.DataArray:
        """`layer_delta_perplexity` at one width [layer]."""
        self._require_width(bits)
        return self.layer_delta_perplexity.sel(bits=bits, drop=True)

    # ---- depth

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.data.sizes["layer"])

    @cached_property
    def depth(self) -> np.ndarray:
        """Relative depth [layer]: layer / number of layers."""
        depth: np.ndarray = np.arange(self.n_layers) / self.n_layers
        return depth

    def first_layers(self, share: float) -> np.ndarray:
        """Whether a layer ends within the first `share` of the depth [layer]: (layer + 1) / L <= share."""
        within: np.ndarray = (np.arange(self.n_layers) + 1) / self.n_layers <= share
        return within

    @cached_property
    def ends(self) -> set[int]:
        """The layers in the first 12 % of the depth (four of the original's 36), and the last layer."""
        return {*np.flatnonzero(self.first_layers(FIRST)).tolist(), self.n_layers - 1}

    def between(self, profile: xr.DataArray, start: float, stop: float) -> np.ndarray:
        """Entries of a profile [layer] at relative depths in [start, stop], half a layer of slack at either end."""
        slack = 0.5 / self.n_layers
        return np.asarray(profile)[(self.depth >= start - slack) & (self.depth <= stop + slack)]

    def ranked(self, profile: xr.DataArray) -> list[int]:
        """Layers by falling values of a profile [layer]."""
        return [int(layer) for layer in np.argsort(-np.asarray(profile), kind="stable")]

    # ---- matrices

    @cached_property
    def matrix_damage(self) -> xr.DataArray:
        """Rise of the loss with a single matrix rounded [layer, matrix], nat/token; 3 bits as published, else 2.

        A quick budget has every third layer.
        """
        if not self.has("matrix_baseline_loss"):
            return self.mean("matrix_loss") - self.baseline_loss
        rise = self.mean("matrix_loss") - self.mean("matrix_baseline_loss")
        return rise.rename(matrix_layer="layer")

    @cached_property
    def matrix_delta_perplexity(self) -> xr.DataArray:
        """The same as a rise of the perplexity [layer, matrix]."""
        return self.perplexity_rise(self.matrix_damage)

    @cached_property
    def type_damage(self) -> xr.DataArray:
        """Damage of a matrix type at 3 bits [matrix], nat/token.

        Measured with the type rounded in all layers at once, where effects exceed the noise; from published figures the
        mean over layers of single matrices.
        """
        if self.has("type_loss"):
            return self.mean("type_loss") - self._method_baseline
        return self.matrix_damage.mean("layer")

    def require_seven_matrices(self) -> None:
        """Raise NotApplicable unless layers consist of the seven usual matrices."""
        missing = [name for name in (*ATTENTION, *MLP) if name not in self.data["matrix"].values]
        if missing:
            raise NotApplicable(f"the layers of {self.subject} have no {missing[0]}")

    def types(self, names: Sequence[str]) -> xr.DataArray:
        """Damage of some matrix types [matrix], nat/token."""
        self.require_seven_matrices()
        return self.type_damage.sel(matrix=list(names))

    # ---- plans

    def predicted_damage(self, recipe: str) -> float:
        """Sum of the single-layer losses at the widths of a recipe [nat/token].

        A width that was not measured between two that were takes the mean of their losses, weighted geometrically by
        the squared error, 4^-bits.
        """
        return float(sum(self._at(layer, int(width)) for layer, width in enumerate(self.recipe_bits(recipe))))

    def _at(self, layer: int, width: int) -> float:
        if width in self.widths:
            return float(self._layer_damage.sel(layer=layer, bits=width))
        narrower = max((have for have in self.widths if have < width), default=None)
        wider = min((have for have in self.widths if have > width), default=None)
        if narrower is None or wider is None:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no layers around {width} bits")
        share = (4.0**-width - 4.0**-wider) / (4.0**-narrower - 4.0**-wider)
        low, high = (float(self._layer_damage.sel(layer=layer, bits=have)) for have in (narrower, wider))
        return share * low + (1 - share) * high


@dataclass(frozen=True)
class Budget:
    """How much is read and rounded.

    Attributes:
        layer_tokens: tokens of the layer sweep; None is half of the corpus.
        method_tokens: tokens of methods, types and recipes; None is the other half.
        matrix_tokens: tokens of the single matrices, out of those of the layer sweep; None is all of them.
        matrix_stride: single matrices of every so manieth layer, from the first on.
        block_tokens: longest text: the unit of the bootstrap.
        layer_bits: widths of single layers; must contain 3 and 2.
        permutations: random deals of the recipe histogram.
        group_sizes: weights per scale; the largest that divides every row is taken.
        footprints: whether memory is measured, a process per method.
        head_dtype: precision of the vocabulary projection; log-softmax is float32 in either case.
        batch_tokens: padded tokens per batch.
    """

    layer_tokens: int | None
    method_tokens: int | None
    matrix_tokens: int | None
    matrix_stride: int
    block_tokens: int | None
    layer_bits: tuple[int, ...]
    permutations: int
    group_sizes: tuple[int, ...] = (128, 64)
    footprints: bool = True
    head_dtype: str = "bfloat16"
    batch_tokens: int = 2048


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Round single layers, matrices, matrix types and whole models, by many rules, and read the loss."""
    from lab.experiments.systems.measuring import quantization

    return quantization.measure(subject, corpus, budget, sweep)


LOSS = Tolerance(
    0.02, 0.02, "other kernels moved losses of quantized layers by 1 %; perplexities of 5 amplify roundings"
)
BROKEN = Tolerance(0.05, 0.05, "a model at 2 or 3 bits is far from its training: small roundings grow")
RECIPES = Tolerance(0.05, 0.05, "recipes follow from measured losses: near ties between layers may be dealt otherwise")
WEIGHTS = Tolerance(0.01, 0.0, "weights and rounding are the same numbers anywhere; sums of squares are not")
EXPERIMENT = Experiment(
    id="T-11",
    title="Quantization",
    question="Which layers, matrices and whole models break when weights are rounded to few bits?",
    record=Quantization,
    measure=measure,
    budgets={
        "quick": Budget(
            layer_tokens=448,
            method_tokens=512,
            matrix_tokens=224,
            matrix_stride=3,
            block_tokens=48,
            layer_bits=(3, 2),
            permutations=20,
        ),
        "full": Budget(
            layer_tokens=None,
            method_tokens=None,
            matrix_tokens=None,
            matrix_stride=1,
            block_tokens=128,
            layer_bits=(8, 6, 4, 3, 2),
            permutations=100,
            batch_tokens=16384,
        ),
    },
    tolerances={
        "": LOSS,
        "layer_loss": BROKEN,
        "true_two_bit_loss": BROKEN,
        "whole_loss": BROKEN,
        "matrix_loss": BROKEN,
        "type_loss": BROKEN,
        "method_loss": BROKEN,
        "recipe_loss": RECIPES,
        "permuted_recipe_loss": BROKEN,
        "recipe_bits": Tolerance(0, float("inf"), "a choice between near ties; the losses that follow are held"),
        "recipe_weighted_bits": Tolerance(0, 0.1, "as for recipe_bits: what one layer's bit weighs"),
        "weight_relative_error": WEIGHTS,
        "gaussian_relative_error": WEIGHTS,
        "method_gaussian_error": WEIGHTS,
        "distinct_values": WEIGHTS,
        "effective_rank_ratio": WEIGHTS,
        "method_weight_error": WEIGHTS,
        "matrix_weights": Tolerance(0, 0, "a count"),
        "linear_weights": Tolerance(0, 0, "a count"),
        "parameters": Tolerance(0, 0, "a count"),
        "method_nominal_bits": Tolerance(0, 0, "a label"),
        "method_stored_bits": Tolerance(1e-9, 0, "arithmetic"),
        "stored_memory": Tolerance(0.001, 0, "bytes of tensors, but for small buffers that versions add"),
        "expected_memory": Tolerance(0, 0, "arithmetic"),
        "resident_memory": Tolerance(0.05, 0.01, "allocators keep what they like: 1 % between two runs"),
        "load_seconds": Tolerance(0, float("inf"), "time on whichever machine; a benchmark, not a finding"),
    },
    libraries=("torchao", "bitsandbytes", "neural-compressor-pt", "xllamacpp"),
)
