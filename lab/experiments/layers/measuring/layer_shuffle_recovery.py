"""How layer shuffle recovery measures: its runs put together, and losses of what they found on held-out text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from lab.corpora.corpus import Corpus
from lab.experiments.layers.layer_shuffle_recovery import (
    CHAINS,
    CONTENDERS,
    FEWEST_IN_BLOCK,
    METHODS,
    VARIANTS,
    Budget,
    plateau,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_features import WeightFeatures, weight_features
from lab.experiments.layers.measuring.layer_shuffle_recovery_runs import (
    CANDIDATES,
    COSTS,
    FIRST_SEED,
    RANDOM_START,
    Run,
    calibration_text,
    contender_order,
    plain_text,
)
from lab.records import variable
from lab.residual.executor import Executor
from lab.residual.programs import identity, order, swap
from lab.residual.sweeps import ProgramLosses, Sample
from lab.statistics import orders
from lab.store import Arrays, Sweep
from lab.subjects.loading import LoadedSubject

Variables = dict[str, xr.Variable]

BATCH_TOKENS = 1024
SELECTIONS = ("blind", "oracle")


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.layers.layer_shuffle_recovery.measure`."""
    decoder = subject.decoder
    texts = [calibration_text(corpus, budget, seed) for seed in range(budget.seeds)]
    started = time.perf_counter()
    weights = weight_features(decoder)
    seconds = time.perf_counter() - started
    found = [Run(decoder, weights, text, budget, seed).arrays(sweep) for seed, text in enumerate(texts)]
    variables = _order_variables(weights, found) | _cost_variables(found, seconds) | _chain_variables(found)
    variables |= _loss_variables(found) | _heldout_variables(subject, corpus, budget, found, sweep)
    variables |= _weight_variables(subject, weights, found)
    coords = {
        "method": list(METHODS),
        "layer": np.arange(decoder.n_layers),
        "seed": np.arange(budget.seeds),
        "contender": list(CONTENDERS),
        "candidate": list(CANDIDATES),
        "direction": ["by_norm", "reversed"],
        "selection": list(SELECTIONS),
        "chain": list(CHAINS),
        "variant": list(VARIANTS),
        "bound": ["low", "high"],
        "feature": list(_feature_sizes(weights, found)),
        "extraction": ["weights", "fingerprints", "pairs"],
        "neighbour": np.arange(decoder.n_layers - 1),
    }
    prompts = {"prompt_id": ("prompt", [text.id for text in corpus.texts[: budget.heldout_texts]])}
    return xr.Dataset(variables, coords | prompts, {"settings": json.dumps(_settings(subject, weights, found))})


def _order_variables(weights: WeightFeatures, found: Sequence[Arrays]) -> Variables:
    """Where each method put each layer, and how good that is."""
    placed = np.array([[arrays[f"order {method}"] for arrays in found] for method in METHODS])
    positions = orders.positions_of(placed)
    far = orders.displacements(placed)
    flat = plateau(weights.norms)
    dims = ("method", "seed")
    return {
        "recovered_position": variable((*dims, "layer"), positions, "position", "where the method puts each layer"),
        "kendall_tau": variable(dims, orders.kendall_tau(placed), "1", "Kendall's tau of the recovered order"),
        "inversions": variable(dims, orders.inversions(placed), "pairs", "layer pairs in the wrong relative order"),
        "position_accuracy": variable(
            dims, orders.position_accuracy(placed), "1", "share of positions that hold the right layer"
        ),
        "mean_displacement": variable(dims, far.mean(-1), "positions", "mean |recovered layer - position|"),
        "max_displacement": variable(dims, far.max(-1), "positions", "largest |recovered layer - position|"),
        "kendall_tau_early": variable(
            dims, _tau_among(positions, flat), "1", "tau among the layers of the plateau of norms"
        ),
        "kendall_tau_late": variable(
            dims, _tau_among(positions, range(flat.stop, len(weights.norms))), "1", "tau among the layers after it"
        ),
    }


def _tau_among(positions: np.ndarray, layers: range) -> np.ndarray:
    """Tau of some layers among each other [method, seed]; NaN for too few."""
    if len(layers) < FEWEST_IN_BLOCK:
        return np.full(positions.shape[:2], np.nan)
    return orders.kendall_tau(positions[..., list(layers)])


def _cost_variables(found: Sequence[Arrays], seconds: float) -> Variables:
    costs = np.array([[arrays[f"cost {method}"] for arrays in found] for method in METHODS])
    choice = np.array([arrays["cost seed"] for arrays in found])
    about = {
        "trial_orders": ("orders", "orders whose loss the method asked for"),
        "layer_passes": ("passes", "layer work, in passes of all layers over all calibration text"),
        "head_passes": ("passes", "projections to the vocabulary, in passes over all scored calibration tokens"),
        "wall_time": ("s", "seconds of the method alone, without features and without the choice of a beginning"),
    }
    variables = {
        name: variable(("method", "seed"), costs[..., column], *about[name]) for column, name in enumerate(COSTS)
    }
    variables |= {
        f"choice_{name}": variable("seed", choice[:, column], about[name][0], f"{name} of the choice of a beginning")
        for column, name in enumerate(COSTS)
    }
    taken = [[seconds, *arrays["probe seconds"]] for arrays in found]
    variables["extraction_time"] = variable(("seed", "extraction"), taken, "s", "seconds that features took")
    return variables


def _chain_variables(found: Sequence[Arrays]) -> Variables:
    figures = np.array([[arrays[f"chain {name}"] for arrays in found] for name in CHAINS])
    dims = ("chain", "seed")
    return {
        "tour_ratio": variable(
            dims, figures[..., 0], "1", "length of the true order over that of the chain; above 1 the distance errs"
        ),
        "best_tour_ratio": variable(
            dims, figures[..., 1], "1", "length of the true order over that of the stronger solver's path"
        ),
        "best_tour_tau": variable(dims, figures[..., 2], "1", "|tau| of the stronger solver's path"),
        "near_optimal_tau": variable(
            (*dims, "bound"), figures[..., 3:], "1", "least and largest |tau| of paths within 1 % of the shortest"
        ),
        "variant_kendall_tau": variable(
            ("seed", "variant"), [arrays["variant taus"] for arrays in found], "1", "tau of chains on other features"
        ),
        "greedy_length_ratio": variable(
            "seed",
            [arrays["greedy length ratio"] for arrays in found],
            "1",
            "length of the greedy path over that of the chain, by the same cosine distances",
        ),
        "direction_agreement": variable(
            "seed",
            [arrays["direction agreement"] for arrays in found],
            "1",
            "share of layer pairs that spread random input less in their true order",
        ),
    }


def _loss_variables(found: Sequence[Arrays]) -> Variables:
    """Losses on the text that decided, and what the choice of a beginning saw and took."""
    ends = np.array([arrays["annealing losses"] for arrays in found])
    return {
        "calibration_loss": variable(
            ("seed", "contender"),
            [arrays["calibration loss"] for arrays in found],
            "nat/token",
            "loss on the calibration text",
        ),
        "annealing_start_loss": variable(
            "seed", ends[:, 0], "nat/token", "loss of the beginning on the text of annealing"
        ),
        "annealing_end_loss": variable(
            "seed", ends[:, 1], "nat/token", "loss of annealing's result on the text of annealing"
        ),
        "candidate_loss": variable(
            ("seed", "candidate", "direction"),
            [arrays["candidate loss"] for arrays in found],
            "nat/token",
            "loss of each chain as its norms rise, and reversed",
        ),
        "seed_kendall_tau": variable(
            ("seed", "selection"),
            [arrays["chosen taus"] for arrays in found],
            "1",
            "tau of the beginning chosen by loss, and of the one chosen by the truth",
        ),
    } | _random_variables(found)


def _random_variables(found: Sequence[Arrays]) -> Variables:
    """Where searches from a random order ended; nothing under budgets that start none."""
    if f"order {RANDOM_START}" not in found[0]:
        return {}
    taus = [float(orders.kendall_tau(arrays[f"order {RANDOM_START}"])) for arrays in found]
    return {"random_start_tau": variable("seed", taus, "1", "tau of adjacent swaps by loss from a random order")}


def _heldout_variables(
    subject: LoadedSubject, corpus: Corpus, budget: Budget, found: Sequence[Arrays], sweep: Sweep
) -> Variables:
    """Losses of the true order, of its neighbours exchanged, and of all contenders on text that no search has read."""
    n, chosen = subject.decoder.n_layers, corpus.texts[: budget.heldout_texts]
    texts = tuple(plain_text(text, budget.heldout_tokens) for text in chosen)
    question = [
        range(1, min(len(plain.ids), len(plain_text(text).ids) - len(text.completion_ids)))
        for plain, text in zip(texts, chosen, strict=True)
    ]
    sample = Sample(tuple(text.id for text in chosen), texts, tuple(map(tuple, question)))
    losses = ProgramLosses(Executor(subject.decoder), sweep, BATCH_TOKENS, budget.head_dtype)
    intact = losses("true order", sample, {"the true order": identity(n)}, user_words=True)
    programs = {f"layers {i} and {j} exchanged": swap(n, i, j) for i, j in pairwise(range(n))}
    programs |= {
        f"{name} of run {run}": order(contender_order(arrays, name).tolist())
        for name in CONTENDERS
        for run, arrays in enumerate(found)
    }
    values = losses("held-out text", sample, programs)["loss"]
    baseline = values[n - 1]  # the first contender is the true order, in the very same batches
    return {
        "scored_tokens": variable("prompt", sample.scored_tokens, "token", "scored tokens of the held-out texts"),
        "baseline_loss": variable("prompt", baseline, "nat/token", "loss of the true order"),
        "neighbour_swap_delta": variable(
            ("neighbour", "prompt"),
            values[: n - 1] - baseline,
            "nat/token",
            "rise with the layer and the next exchanged",
        ),
        "heldout_loss": variable(
            ("contender", "seed", "prompt"),
            values[n - 1 :].reshape(len(CONTENDERS), len(found), -1),
            "nat/token",
            "loss on held-out text",
        ),
        **_parts(sample, intact),
    }


def _parts(sample: Sample, intact: dict[str, np.ndarray]) -> Variables:
    """Losses of the true order on the question's and on the model's own tokens, which the published loss mixes."""
    asked, every = sample.user_tokens, sample.scored_tokens
    own = every - asked
    total = intact["loss"][0] * every - intact["user_loss"][0] * asked
    own_loss = np.divide(total, own, out=np.zeros(len(own)), where=own > 0)
    return {
        "question_tokens": variable("prompt", asked, "token", "scored tokens of the question"),
        "own_tokens": variable("prompt", own, "token", "scored tokens of the model's own text"),
        "question_loss": variable(
            "prompt", intact["user_loss"][0], "nat/token", "loss on the question", weights="question_tokens"
        ),
        "own_loss": variable(
            "prompt",
            own_loss,
            "nat/token",
            "loss on the model's own text, 0 where none is scored",
            weights="own_tokens",
        ),
        "own_token_share": variable("prompt", own / every, "1", "share of scored tokens that the model wrote"),
    }


def _weight_variables(subject: LoadedSubject, weights: WeightFeatures, found: Sequence[Arrays]) -> Variables:
    gains = np.sqrt(weights.gain_energy)
    return {
        "layer_norm": variable("layer", weights.norms, "1", "Euclidean norm of all parameters of the layer"),
        "matrix_norm": variable("layer", np.sqrt(weights.matrix_energy), "1", "Euclidean norm of its matrices"),
        "norm_gain_energy_share": variable(
            "layer", (gains / weights.norms) ** 2, "1", "share of the layer's squared norm that is gains of norms"
        ),
        "feature_size": variable("feature", list(_feature_sizes(weights, found).values()), "1", "numbers per layer"),
        "parameters_per_layer": variable((), weights.parameters, "parameters", "parameters of one layer"),
        "parameters_total": variable((), subject.facts.parameters, "parameters", "parameters of the model"),
    }


def _feature_sizes(weights: WeightFeatures, found: Sequence[Arrays]) -> dict[str, int]:
    return {
        "parameter_statistics": weights.statistics.shape[1],
        "singular_spectrum": weights.spectrum.shape[1],
        "norm_gain_vector": weights.gains.shape[1],
        "activation_fingerprint": int(found[0]["fingerprint size"]),
    }


def _settings(subject: LoadedSubject, weights: WeightFeatures, found: Sequence[Arrays]) -> dict[str, Any]:
    facts, kinds = subject.facts, getattr(subject.decoder.config, "layer_types", None)
    ways = [f"{name}{way}" for name in CANDIDATES for way in ("", ", reversed")]
    return {
        "num_layers": facts.layers,
        "hidden_size": facts.width,
        "intermediate_size": facts.mlp_width,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocabulary,
        "attention_kinds": sorted(set(kinds or ["full_attention"])),
        "shuffle": f"torch.randperm({facts.layers}) from CPU generators seeded with {FIRST_SEED} and on",
        "spectrum_of": list(dict.fromkeys(weights.spectrum_of)),
        "beginnings": {
            name: [ways[int(arrays["chosen"][index])] for arrays in found] for index, name in enumerate(SELECTIONS)
        },
    }
