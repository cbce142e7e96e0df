"""T-3 layer swap cost: how tightly is each decoder layer bound to its place?

Two layers exchange places, all others stay, and the rise of the completion loss is recorded,

    D_ij = loss(i and j exchanged) - loss(intact)    [nat/token],

for every pair: a matrix that reads as a functional distance between layers. Each layer keeps its own
rotary embedding and mask wherever it runs. D is symmetric by construction, for exchanging i and j is
one operation; whether direction matters is asked of *moves*: layer i is taken out and put in at slot
j, and those between shift by one.

Beyond ln V, the loss of a uniform guess, nats measure misplaced confidence rather than distance, and
such pairs rule arithmetic means: claims prefer ranks and medians.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from lab.experiments import Experiment, Tolerance
from lab.records import Record, variable
from lab.statistics.clustering import clusters, distance_only, separation

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.residual.programs import Program
    from lab.residual.sweeps import ProgramLosses, Sample
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

Variables = dict[str, xr.Variable]
Pair = tuple[int, int]


class LayerSwapCost(Record):
    """Losses with two layers exchanged, and what claims derive from them.

    Dimensions: `layer` and `layer_other` (the exchanged layers), `neighbour` (a layer exchanged with
    the next), `moved_layer` and `slot` (a layer and where it is put), `prompt`.
    """

    profiles: ClassVar = ("layer_cost", "mean_by_distance")

    @cached_property
    def baseline_loss(self) -> xr.DataArray:
        """Loss in original order [nat/token]."""
        return self.mean("baseline_loss")

    @cached_property
    def cost(self) -> xr.DataArray:
        """Rise of the loss D with the two layers exchanged [layer, layer_other], nat/token; symmetric, diagonal 0."""
        return self.mean("swap_loss_delta")

    @cached_property
    def relative_cost(self) -> xr.DataArray:
        """D over the intact loss [layer, layer_other]; 0.01 is a rise of 1 %."""
        return self.cost / self.baseline_loss

    @cached_property
    def log_cost(self) -> xr.DataArray:
        """ln of the loss ratio, ln(1 + D/B) [layer, layer_other]: few pairs rule its means."""
        return self.relative_cost.copy(data=np.log1p(self.relative_cost.values))

    @cached_property
    def context_cost(self) -> xr.DataArray:
        """Rise of the loss on template and prompt tokens, in the same passes [layer, layer_other], nat/token."""
        return self.mean("context_swap_loss_delta")

    @cached_property
    def context_relative_cost(self) -> xr.DataArray:
        """That rise over the intact loss on template and prompt tokens [layer, layer_other]."""
        return self.context_cost / self.mean("context_baseline_loss")

    @cached_property
    def neighbour_agreement(self) -> xr.DataArray:
        """Share of scored positions that keep their top token when a layer and the next exchange places [neighbour]."""
        return self.mean("neighbour_top1_agreement")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return int(self.data.sizes["layer"])

    @cached_property
    def depth(self) -> np.ndarray:
        """Relative depth of each layer [layer]: layer / number of layers."""
        return np.arange(self.n_layers) / self.n_layers

    @cached_property
    def middle(self) -> list[int]:
        """Layers at a depth in (0.2, 0.85]: without the first and the last ones, which are special."""
        return [layer for layer in range(self.n_layers) if 0.2 < self.depth[layer] <= 0.85]

    @property
    def ends(self) -> list[int]:
        """The first three layers and the last one."""
        return [0, 1, 2, self.n_layers - 1]

    # ---- layers

    @cached_property
    def layer_cost(self) -> xr.DataArray:
        """Position sensitivity c: mean D over the L-1 partners of a layer [layer], nat/token."""
        return self.cost.sum("layer_other") / (self.n_layers - 1)

    @cached_property
    def layer_median_cost(self) -> xr.DataArray:
        """Median D over the L-1 partners of a layer [layer], nat/token."""
        partners = self.cost.values[~np.eye(self.n_layers, dtype=bool)].reshape(self.n_layers, -1)
        return self.layer_cost.copy(data=np.median(partners, axis=1))

    @cached_property
    def layers_by_cost(self) -> list[int]:
        """Layers, the most position-sensitive first."""
        return [int(layer) for layer in np.argsort(-self.layer_cost.values, kind="stable")]

    # ---- pairs

    @cached_property
    def separation(self) -> np.ndarray:
        """How many layers apart two layers are, |i - j| [layer, layer_other]."""
        return separation(self.n_layers)

    @cached_property
    def pairs_by_cost(self) -> list[Pair]:
        """All pairs (i, j), i < j, the cheapest swap first."""
        pairs = all_pairs(self.n_layers)
        return [pairs[index] for index in np.argsort(self._of_pairs(self.cost), kind="stable")]

    @property
    def neighbours(self) -> list[Pair]:
        """The L-1 pairs of neighbouring layers, from the first on."""
        return neighbours(self.n_layers)

    @staticmethod
    def at(matrix: xr.DataArray, pairs: Sequence[Pair]) -> np.ndarray:
        """The entries of a matrix [layer, layer_other] that belong to these pairs [pair]."""
        first, second = zip(*pairs, strict=True)
        entries: np.ndarray = matrix.values[list(first), list(second)]
        return entries

    @cached_property
    def cheapest_ratio(self) -> float:
        """Smallest D/B of all pairs."""
        return float(self._of_pairs(self.relative_cost).min())

    def interchangeable(self, relative_cost: xr.DataArray, limit: float = 0.01) -> int:
        """Number of pairs whose swap raises the loss by less than `limit` times the intact loss.

        Args:
            relative_cost: `relative_cost` or `context_relative_cost` [layer, layer_other].
            limit: 0.01 is the source's meaning of interchangeable.
        """
        return int((self._of_pairs(relative_cost) < limit).sum())

    @cached_property
    def mean_by_distance(self) -> xr.DataArray:
        """Mean D over the L-k pairs that lie k apart [distance 1..L-1], nat/token."""
        return self._by_distance(np.mean)

    @cached_property
    def median_by_distance(self) -> xr.DataArray:
        """Median D over the L-k pairs that lie k apart [distance 1..L-1], nat/token."""
        return self._by_distance(np.median)

    def _by_distance(self, average: Any) -> xr.DataArray:
        distances = np.arange(1, self.n_layers)
        values = [average(np.diagonal(self.cost.values, k)) for k in distances]
        return xr.DataArray(values, dims="distance", coords={"distance": distances})

    @cached_property
    def beyond_distance(self) -> np.ndarray:
        """What D has beyond the mean of all pairs as far apart [layer, layer_other], nat/token."""
        rest: np.ndarray = self.cost.values - distance_only(self.cost)
        return rest

    @cached_property
    def log_beyond_distance(self) -> np.ndarray:
        """What ln(1 + D/B) has beyond the mean of all pairs as far apart [layer, layer_other]."""
        rest: np.ndarray = self.log_cost.values - distance_only(self.log_cost)
        return rest

    def _of_pairs(self, matrix: xr.DataArray) -> np.ndarray:
        entries: np.ndarray = matrix.values[np.triu_indices(self.n_layers, k=1)]
        return entries

    # ---- zones

    def zones(self, count: int, method: str = "ward") -> list[int]:
        """Cluster of each layer by D, numbered from the first layer on [layer]; see `clusters`."""
        return clusters(self.cost, count, method)

    @cached_property
    def context_zones(self) -> list[int]:
        """Three Ward clusters of the layers by the loss on template and prompt tokens [layer]."""
        return clusters(self.context_cost, 3)

    @cached_property
    def distance_only_zones(self) -> list[int]:
        """Three Ward clusters of a matrix in which every D is the mean of all pairs as far apart [layer]."""
        return clusters(distance_only(self.cost), 3)

    @cached_property
    def update_correlation(self) -> xr.DataArray:
        """Cosine of the token-averaged updates of two layers [layer, layer_other]."""
        return self.mean("update_correlation")

    # ---- moves and kinds of layers

    @cached_property
    def move_asymmetry(self) -> xr.DataArray:
        """M_ij - M_ji for i < j [pair], nat/token: below 0 if moves towards the start cost more."""
        forth, back = self.move_costs
        return forth - back

    @cached_property
    def move_costs(self) -> tuple[xr.DataArray, xr.DataArray]:
        """M_ij (towards the end) and M_ji (towards the start) for the measured i < j [pair], nat/token."""
        moves = self.mean("move_loss_delta").transpose("moved_layer", "slot").values
        first, second = np.triu_indices(len(moves), k=1)
        return xr.DataArray(moves[first, second], dims="pair"), xr.DataArray(moves[second, first], dims="pair")

    @cached_property
    def attention_kind(self) -> np.ndarray:
        """Kind of attention of each layer as a number [layer]; names are in the settings, `attention_kinds`."""
        return self.variable("attention_kind").values


def all_pairs(n_layers: int) -> list[Pair]:
    """Every pair of layers (i, j), i < j, row by row."""
    return list(combinations(range(n_layers), 2))


def neighbours(n_layers: int) -> list[Pair]:
    """The pairs (i, i + 1), from the first layer on."""
    return list(pairwise(range(n_layers)))


# ---- measuring


@dataclass(frozen=True)
class Budget:
    """How much text the sweep reads.

    Attributes:
        prompts: a balanced prefix of the corpus; None is all.
        tokens: completion tokens scored per prompt, from the start of the completion; None is all.
        context_stride: of template and prompt, every `context_stride`-th token is scored.
        move_layers: layers that are moved, and slots they are moved to, spread evenly; None is all.
        swap_groups: parts of the sweep over distant pairs; a killed run repeats one of them at most.
        head_dtype: precision of the vocabulary projection; log-softmax is float32 in either case.
        batch_tokens: padded tokens per batch.
        compiled: whether large layers are compiled on a CUDA device, see `lab.residual.compiled`.
    """

    prompts: int | None
    tokens: int | None
    context_stride: int
    move_layers: int | None
    swap_groups: int
    head_dtype: str = "bfloat16"
    batch_tokens: int = 1024
    compiled: bool = False


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Exchange every pair of layers, and move some layers to other slots.

    Completion tokens and tokens of template and prompt are scored in the same passes. The intact
    model runs as one of the programs, so that D is a difference of paired losses.
    """
    from lab.residual.compiled_losses import compiled_losses

    losses = compiled_losses(subject.decoder, budget, sweep)
    texts = with_context(corpus, budget)
    moved = spread(subject.decoder.n_layers, budget.move_layers)
    variables = _swap_variables(losses, texts, budget.swap_groups) | _move_variables(losses, texts, moved)
    variables["update_correlation"] = _update_correlation(subject, losses.executor, texts, budget.batch_tokens)
    kinds = attention_kinds(subject)
    names = sorted(set(kinds))
    described = "kind of attention, numbered as in the settings (attention_kinds)"
    variables["attention_kind"] = variable("layer", [names.index(kind) for kind in kinds], "1", described)
    layers = np.arange(subject.decoder.n_layers)
    coords = {"layer": layers, "layer_other": layers, "neighbour": layers[:-1], "moved_layer": moved, "slot": moved}
    prompts = {"prompt_id": ("prompt", list(texts.prompts))}
    settings = {"vocabulary": subject.facts.vocabulary, "attention_kinds": names}
    return xr.Dataset(variables, coords | prompts, {"settings": json.dumps(settings)})


def with_context(corpus: Corpus, budget: Budget) -> Sample:
    """The sample whose second kind of target is not the user's words but every n-th token of template and prompt."""
    from lab.residual.sweeps import sample

    texts = sample(corpus, budget.prompts, budget.tokens)
    prompt_lengths = {text.id: len(text.prompt_ids) for text in corpus.texts}
    context = tuple(tuple(range(1, prompt_lengths[prompt], budget.context_stride)) for prompt in texts.prompts)
    return replace(texts, user_targets=context)


def spread(n_layers: int, count: int | None) -> list[int]:
    """`count` layers spread evenly from the first to the last; all of them for None or too many."""
    if count is None or count >= n_layers:
        return list(range(n_layers))
    return [round(position) for position in np.linspace(0, n_layers - 1, count)]


def move(n_layers: int, layer: int, slot: int) -> Program:
    """The program in which `layer` is taken out and put in at `slot`; those between shift by one."""
    from lab.residual.programs import order

    layers = [other for other in range(n_layers) if other != layer]
    return order([*layers[:slot], layer, *layers[slot:]])


def attention_kinds(subject: LoadedSubject) -> list[str]:
    """Each layer's kind of attention as the model's configuration names it [layer]."""
    configured = getattr(subject.model.config.get_text_config(), "layer_types", None)
    return list(configured) if configured else ["full_attention"] * subject.decoder.n_layers


def _swap_variables(losses: ProgramLosses, texts: Sample, groups: int) -> Variables:
    n = losses.executor.decoder.n_layers
    # Neighbours alone are compared with the intact model token by token: that costs as much as the head itself.
    near = _exchanged(losses, texts, neighbours(n), compare=True)
    apart = [pair for pair in all_pairs(n) if pair[1] - pair[0] > 1]
    size = max(1, -(-len(apart) // groups))
    parts = [apart[start : start + size] for start in range(0, len(apart), size)]
    found = [(neighbours(n), near), *((part, _exchanged(losses, texts, part)) for part in parts)]
    rise, context_rise = (_rise(n, found, name) for name in ("loss", "user_loss"))
    intact, intact_context = near["loss"][0], near["user_loss"][0]
    dims, context, beside = ("layer", "layer_other", "prompt"), {"weights": "context_tokens"}, ("neighbour", "prompt")
    return {
        "scored_tokens": variable("prompt", texts.scored_tokens, "token", "scored completion tokens"),
        "context_tokens": variable("prompt", texts.user_tokens, "token", "scored tokens of template and prompt"),
        "baseline_loss": variable("prompt", intact, "nat/token", "loss of the intact model"),
        "context_baseline_loss": variable(
            "prompt", intact_context, "nat/token", "intact loss on template and prompt", **context
        ),
        "swap_loss_delta": variable(dims, rise, "nat/token", "loss with the two layers exchanged minus intact"),
        "context_swap_loss_delta": variable(
            dims, context_rise, "nat/token", "the same on template and prompt tokens", **context
        ),
        "neighbour_kl": variable(beside, near["kl"][1:], "nat", "KL(intact || layer and next exchanged)"),
        "neighbour_top1_agreement": variable(
            beside, near["agreement"][1:], "1", "share of positions that keep their top token, layer and next exchanged"
        ),
    }


def _exchanged(
    losses: ProgramLosses, texts: Sample, pairs: Sequence[Pair], *, compare: bool = False
) -> dict[str, np.ndarray]:
    """Losses of the intact model, then with each of these pairs exchanged [1 + pair, prompt]."""
    from lab.residual.programs import identity, swap

    n = losses.executor.decoder.n_layers
    programs = {"the intact model": identity(n)}
    programs |= {f"layers {i} and {j} exchanged": swap(n, i, j) for i, j in pairs}
    return losses(f"swaps {pairs[0]} to {pairs[-1]}", texts, programs, compare=compare, user_words=True)


def _rise(n: int, found: Sequence[tuple[Sequence[Pair], Mapping[str, np.ndarray]]], name: str) -> np.ndarray:
    """Losses of `_exchanged` minus intact as a symmetric matrix [layer, layer_other, prompt]."""
    matrix = np.zeros((n, n, found[0][1][name].shape[1]))
    for pairs, losses in found:
        first, second = (list(layers) for layers in zip(*pairs, strict=True))
        matrix[first, second] = matrix[second, first] = losses[name][1:] - losses[name][0]
    return matrix


def _move_variables(losses: ProgramLosses, texts: Sample, layers: Sequence[int]) -> Variables:
    n = losses.executor.decoder.n_layers
    programs = {f"layer {layer} at slot {slot}": move(n, layer, slot) for layer in layers for slot in layers}
    loss = losses("moves", texts, programs)["loss"].reshape(len(layers), len(layers), -1)
    described = "loss with the layer put in at the slot minus intact; the layers between shift by one"
    return {"move_loss_delta": variable(("moved_layer", "slot", "prompt"), loss - loss[0, 0], "nat/token", described)}


def _update_correlation(subject: LoadedSubject, executor: Any, texts: Sample, batch_tokens: int) -> xr.Variable:
    """Cosine between the updates of two layers, averaged over the scored positions beforehand; 0 with an idle layer."""
    from lab.corpora.batches import token_batches

    sums = np.zeros((subject.decoder.n_layers, subject.decoder.width))
    for batch in token_batches(texts.texts, batch_tokens):
        batch = batch.to(subject.device)
        before = None
        for depth, states in executor.trace(batch):
            scored = states[batch.scored.row, batch.scored.position].float()
            if before is not None:
                sums[depth - 1] += (scored - before).double().sum(0).cpu().numpy()
            before = scored
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    directions = np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 0)
    described = "cosine between token-averaged updates of two layers"
    return variable(("layer", "layer_other"), directions @ directions.T, "cosine", described)


# About 110 tokens of 7 prompts: enough for ranks, the ends and the zones (support 1), not for the cheapest pairs and
# the steps of a curve (support 0.6 to 0.7 on SmolLM2). All passes together read 157 thousand tokens at full depth.
QUICK = Budget(prompts=7, tokens=16, context_stride=6, move_layers=6, swap_groups=4, batch_tokens=256)
FULL = Budget(
    prompts=None, tokens=None, context_stride=1, move_layers=None, swap_groups=12, batch_tokens=512, compiled=True
)
LOSS = Tolerance(
    0.02,
    0.05,
    "other kernels moved T-2's losses by 1 % (AVX2 for AVX-512); a delta is a difference of two, and an H200 moved it "
    "by up to 0.005 nat against AVX2",
)
TOLERANCES = {
    "": LOSS,
    "context_swap_loss_delta": Tolerance(
        0.15, 0.05, "twice what AVX2 kernels moved it by, against AVX-512: up to 9 %; every sixth token of 7 prompts"
    ),
    "neighbour_kl": Tolerance(0.05, 0.02, "other kernels moved T-2's divergences by 2 %"),
    "neighbour_top1_agreement": Tolerance(0.05, 0.04, "other kernels moved T-2's agreement by 0.025 on 157 tokens"),
}
EXPERIMENT = Experiment(
    id="T-3",
    title="Layer swap cost",
    question="How tightly is each decoder layer bound to its place?",
    record=LayerSwapCost,
    measure=measure,
    budgets={"quick": QUICK, "full": FULL},
    tolerances=TOLERANCES,
)
