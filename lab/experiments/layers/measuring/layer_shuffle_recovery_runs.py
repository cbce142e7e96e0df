"""One run of layer shuffle recovery: a shuffle, calibration text, and what every method makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.corpora.corpus import Corpus, Text
from lab.errors import UserError
from lab.experiments.layers.layer_shuffle_recovery import (
    CHAINS,
    CONTENDERS,
    LOSS_METHODS,
    PROBE_METHODS,
    WEIGHT_METHODS,
    Budget,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_features import (
    WeightFeatures,
    fingerprints,
    pair_spreads,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_methods import (
    WITHOUT_TEXT,
    SlotFeatures,
    alternatives,
    cosines,
    variants,
)
from lab.residual.order_losses import LayerOrderLosses
from lab.residual.sweeps import HEAD_DTYPES
from lab.statistics import order_search, orders, seriation
from lab.statistics.order_search import Order
from lab.store import Arrays, Sweep
from lab.subjects.anatomy import Decoder

FIRST_SEED = 42
PROBE_STRIDE = 100  #: between the generators of two runs' random input; a run takes five
#: chains that the choice of a beginning has its pick from, in both directions
CANDIDATES = (*WEIGHT_METHODS, *PROBE_METHODS)
SEARCHES = (*LOSS_METHODS, "block_descent")
RANDOM_START = "random_start"
#: searches that read little text: the first two did so in the source
ON_SMALL_TEXT = ("greedy_perplexity", "simulated_annealing", RANDOM_START)
COSTS = ("trial_orders", "layer_passes", "head_passes", "wall_time")


def calibration_text(corpus: Corpus, budget: Budget, seed: int) -> list[TokenBatch]:
    """The stages of a run's text, one batch each; no run reads what another or the held-out sample does.

    The longest texts come first, so that little is padded.

    Raises:
        UserError: the corpus has too few texts.
    """
    needed = budget.heldout_texts + budget.seeds * sum(texts for texts, _ in budget.stages)
    if len(corpus.texts) < needed:
        raise UserError(
            f"the corpus of {corpus.subject} has {len(corpus.texts)} texts and {needed} are needed; "
            "measure on more with --corpus FILE"
        )
    longest = sorted(corpus.texts[budget.heldout_texts :], key=lambda text: -len(plain_text(text).ids))
    own = iter(longest[seed :: budget.seeds])
    stages = [[plain_text(next(own), tokens) for _ in range(texts)] for texts, tokens in budget.stages]
    return [one_batch(texts) for texts in stages]


def plain_text(text: Text, tokens: int | None = None) -> TokenText:
    """The user's words and the completion without template, cut to some tokens; every token but the first is scored."""
    start, stop = text.user_span
    ids = (text.prompt_ids[:1] if start > 0 else ()) + text.prompt_ids[start:stop] + text.completion_ids
    return TokenText(ids[:tokens], tuple(range(1, len(ids[:tokens]))))


def one_batch(texts: Sequence[TokenText]) -> TokenBatch:
    """All of these texts as one batch."""
    (batch,) = token_batches(texts, len(texts) * max(len(text.ids) for text in texts))
    return batch


@dataclass
class Run:
    """One shuffle, and what every method makes of it.

    Attributes:
        decoder: the model under study.
        weights: features of its layers.
        stages: calibration text.
        budget: how far searches go.
        seed: number of the run.
    """

    decoder: Decoder
    weights: WeightFeatures
    stages: Sequence[TokenBatch]
    budget: Budget
    seed: int

    @cached_property
    def layer_of_slot(self) -> tuple[int, ...]:
        """The shuffle: slot s holds this layer."""
        generator = torch.Generator().manual_seed(FIRST_SEED + self.seed)
        return tuple(torch.randperm(self.decoder.n_layers, generator=generator).tolist())

    def arrays(self, sweep: Sweep) -> Arrays:
        """Orders of layers and figures of all methods; parts of a run that was killed are read back.

        `order NAME` [position], `cost NAME` [COSTS], and what `_without_text`, `_choice` and `_losses_of` say.
        """
        found: Arrays = {}
        parts: dict[str, Callable[[], Arrays]] = {
            "methods without text": self._without_text,
            "choice of a beginning": lambda: self._choice(found),
            **{name: partial(self._searched, name, found) for name in self._searches},
            "losses": lambda: self._losses_of(found),
        }
        for done, (name, compute) in enumerate(parts.items(), start=1):
            what = f"run {self.seed}: {name}"
            found |= sweep.shard(what, compute)
            sweep.progress(self.seed * len(parts) + done, self.budget.seeds * len(parts), what)
        return found

    @property
    def _searches(self) -> tuple[str, ...]:
        return SEARCHES if self.budget.random_passes is None else (*SEARCHES, RANDOM_START)

    # ---- without text

    def _without_text(self) -> Arrays:
        features, found = self._features()
        for name, method in WITHOUT_TEXT.items():
            started = time.perf_counter()
            path = method(features)
            found[f"order {name}"] = self._layers(path)
            found[f"cost {name}"] = np.array([0, 0, 0, time.perf_counter() - started])
        true = self._slots(np.arange(self.decoder.n_layers))
        for name in CHAINS:
            found[f"chain {name}"] = self._chain_figures(features, name, true, found[f"order {name}"])
        found["variant taus"] = np.array([self._tau(path) for path in variants(features).values()])
        cosine = features.distances["tsp_full_weights"]
        lengths = [seriation.path_length(cosine, self._slots(found[f"order {name}"])) for name in _SAME_DISTANCES]
        found["greedy length ratio"] = np.array(lengths[0] / lengths[1])
        return found

    def _features(self) -> tuple[SlotFeatures, Arrays]:
        """What the slots hold, with the seconds that it took and how far the directed test is right."""
        slots, first = list(self.layer_of_slot), FIRST_SEED + PROBE_STRIDE * self.seed
        started = time.perf_counter()
        answers = fingerprints(self.decoder, first)
        between = time.perf_counter()
        spreads = pair_spreads(self.decoder, first)
        seconds = [between - started, time.perf_counter() - between]
        upper = np.triu_indices(len(slots), k=1)
        weights = self.weights
        features = SlotFeatures(
            norms=weights.norms[slots],
            statistics=weights.statistics[slots],
            gains=weights.gains[slots],
            spectrum=weights.spectrum[slots],
            fingerprints=answers[slots],
            similarity=cosines(weights.products)[np.ix_(slots, slots)],
            spreads=spreads[np.ix_(slots, slots)],
            query_values=weights.query_values,
        )
        return features, {
            "probe seconds": np.array(seconds),
            "fingerprint size": np.array(answers.shape[1]),
            "direction agreement": np.array((spreads[upper] <= spreads.T[upper]).mean()),
        }

    def _chain_figures(self, features: SlotFeatures, name: str, true: Order, found: np.ndarray) -> np.ndarray:
        """True length over the found one; the same of the stronger solver; its |tau|; least and most |tau| near it."""
        distances = features.distances[name]
        lengths = [seriation.path_length(distances, path) for path in (true, self._slots(found))]
        near = alternatives(distances, FIRST_SEED + self.seed)
        taus = [abs(self._tau(path)) for _, path in near]
        ratios = [lengths[0] / length if length > 0 else 1.0 for length in (lengths[1], near[0][0])]
        return np.array([*ratios, taus[0], min(taus), max(taus)])

    # ---- with text

    def _choice(self, found: Mapping[str, np.ndarray]) -> Arrays:
        """The chain and direction of lowest loss, beside the chain nearest to the truth; all on the small text."""
        losses, started = self._losses(self.budget.small_stages, z=float("inf")), time.perf_counter()
        paths = [self._slots(found[f"order {name}"]) for name in CANDIDATES]
        trials = [way for path in paths for way in (path, path[::-1])]
        best, values = losses.lowest(trials)
        taus = [self._tau(path) for path in paths]
        chosen = {"blind": best, "oracle": 2 * int(np.argmax(taus))}
        return {
            "order seed": self._layers(trials[chosen[self.budget.seed_selection]]),
            "cost seed": self._cost(losses, started),
            "candidate loss": values.reshape(-1, 2),
            "chosen": np.array([chosen["blind"], chosen["oracle"]]),
            "chosen taus": np.array([self._tau(trials[index]) for index in chosen.values()]),
        }

    def _searched(self, name: str, found: Mapping[str, np.ndarray]) -> Arrays:
        budget, slots, started = self.budget, range(self.decoder.n_layers), time.perf_counter()
        small = budget.small_stages if name in ON_SMALL_TEXT else None
        losses = self._losses(small)
        start = self._slots(found["order seed"])
        if name == "greedy_perplexity":
            path = order_search.greedy_construction(losses, slots)
        elif name == "pairwise_bubble":
            path = order_search.bubble(losses, start, sweeps=budget.bubble_sweeps, reach=budget.reach)
        elif name == "simulated_annealing":
            path = order_search.annealing(losses, start, proposals=budget.proposals, seed=FIRST_SEED + self.seed)
        elif name == "remove_reinsert":
            path = order_search.reinsertion(losses, start, passes=budget.reinsertion_passes, reach=budget.reach)
        elif name == "block_descent":
            path = order_search.block_descent(losses, start, largest_block=budget.largest_block)
        else:
            # Slots are in random order already.
            path = order_search.bubble(losses, tuple(slots), passes=budget.random_passes or 0, sweeps=0)
        return {f"order {name}": self._layers(path), f"cost {name}": self._cost(losses, started)}

    def _losses_of(self, found: Mapping[str, np.ndarray]) -> Arrays:
        """Losses of the contenders on all calibration text, and of annealing's two ends on its own text."""
        whole, small = self._losses(), self._losses(self.budget.small_stages)
        slots = {name: self._slots(contender_order(found, name)) for name in CONTENDERS}
        ends = [small.loss(slots[name]) for name in ("seed", "simulated_annealing")]
        return {
            "calibration loss": np.array([whole.loss(slots[name]) for name in CONTENDERS]),
            "annealing losses": np.array(ends),
        }

    def _losses(self, stages: int | None = None, *, z: float | None = None) -> LayerOrderLosses:
        dtype = HEAD_DTYPES[self.budget.head_dtype]
        own = self.budget.z if z is None else z
        return LayerOrderLosses(
            self.decoder,
            self.stages[:stages],
            self.layer_of_slot,
            z=own,
            head_dtype=dtype,
        )

    def _cost(self, losses: LayerOrderLosses, started: float) -> np.ndarray:
        """Trials, layer and head work in passes over all calibration text, seconds; see COSTS."""
        tokens = sum(batch.ids.numel() for batch in self.stages)
        scored = sum(len(batch.scored) for batch in self.stages)
        passes = losses.layer_tokens / (self.decoder.n_layers * tokens), losses.head_tokens / scored
        return np.array([losses.trials, *passes, time.perf_counter() - started])

    # ---- names of layers and slots

    def _layers(self, slots: Sequence[int]) -> np.ndarray:
        return np.array(self.layer_of_slot)[list(slots)]

    def _slots(self, layers: np.ndarray) -> Order:
        return tuple(np.argsort(self.layer_of_slot)[layers].tolist())

    def _tau(self, slots: Sequence[int]) -> float:
        return float(orders.kendall_tau(self._layers(slots)))


#: greedy path and chain over the same distances
_SAME_DISTANCES = ("greedy_cosine", "tsp_full_weights")


def contender_order(found: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The order of layers of a contender [position]."""
    return np.arange(len(found["order seed"])) if name == "true_order" else found[f"order {name}"]
