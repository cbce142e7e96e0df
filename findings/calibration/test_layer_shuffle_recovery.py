"""Known answers of layer shuffle recovery: whole measurements, the published figures, derived quantities."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from lab import published
from lab.errors import NotApplicable, UserError
from lab.experiments.layers.layer_shuffle_recovery import (
    CONTENDERS,
    ENSEMBLE,
    METHODS,
    PUBLISHED_METHODS,
    QUICK,
    WEIGHT_METHODS,
    LayerShuffleRecovery,
    measure,
    plateau,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_runs import calibration_text, plain_text
from lab.records import variable
from lab.residual.plain import layers_exchanged, plain_losses
from lab.statistics import orders
from lab.store import Sweep
from lab.subjects.tiny import LAYERS, loaded, random_corpus, tiny

pytestmark = pytest.mark.calibration

LENGTHS = [(7, 9), (5, 11)] * 5 + [(4, 6)]
BUDGET = replace(
    QUICK,
    seeds=2,
    stages=((1, 8), (2, 10)),
    small_stages=1,
    proposals=20,
    random_passes=2,
    heldout_texts=3,
    heldout_tokens=12,
    head_dtype="float32",
)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_text"])
def subject(request):
    return loaded(tiny(request.param))


@pytest.fixture(scope="module")
def corpus():
    return random_corpus(LENGTHS)


@pytest.fixture(scope="module")
def record(subject, corpus):
    data = measure(subject, corpus, BUDGET, Sweep())
    attributes = {"subject": "tiny", "source": "measured", "condition": "quick-float32"}
    return LayerShuffleRecovery(data.assign_attrs(attributes))


# ---- whole measurements


def test_a_record_is_consistent(record):
    placed = orders.positions_of(record.variable("recovered_position").values)
    assert np.allclose(record.variable("kendall_tau"), orders.kendall_tau(placed))
    assert (np.sort(placed, axis=-1) == np.arange(LAYERS)).all()
    assert (record.variable("heldout_loss").sel(contender="true_order") == record.variable("baseline_loss")).all()
    assert (record.runs("trial_orders", "greedy_perplexity") == LAYERS * (LAYERS + 1) / 2).all()
    for method in WEIGHT_METHODS:
        first, second = record.positions(method)
        assert (first == second).all() or method == "ensemble_rank"


def test_searches_end_no_higher_than_they_began(record):
    """On the text that decided a descent never rises, but for float32 sums in batches of other sizes."""
    for search in ("pairwise_bubble", "remove_reinsert", "block_descent"):
        assert (record.calibration_loss(search) <= record.calibration_loss("seed") + 1e-4).all()
    assert (record.data["annealing_end_loss"] <= record.data["annealing_start_loss"] + 1e-6).all()


def test_neighbours_are_exchanged_in_held_out_text(record, subject, corpus):
    if subject.decoder.config.model_type == "gemma3_text":
        pytest.skip("its own forward makes masks by slot, so that layers cannot be exchanged in the model itself")
    for neighbour, prompt in ((0, 0), (3, 2)):
        text = [plain_text(corpus.texts[prompt], BUDGET.heldout_tokens)]
        swapped = list(range(LAYERS))
        swapped[neighbour], swapped[neighbour + 1] = neighbour + 1, neighbour
        (intact,) = plain_losses(subject.model, text)
        with layers_exchanged(subject.model, swapped):
            (exchanged,) = plain_losses(subject.model, text)
        found = record.variable("neighbour_swap_delta").sel(neighbour=neighbour)[prompt]
        assert float(found) == pytest.approx(exchanged - intact, abs=1e-5)


def test_parts_of_the_text_add_up(record):
    asked, own, every = (record.data[name] for name in ("question_tokens", "own_tokens", "scored_tokens"))
    mixed = (record.data["question_loss"] * asked + record.data["own_loss"] * own) / every
    assert np.allclose(mixed, record.data["baseline_loss"], atol=1e-5)


def test_an_interrupted_measurement_goes_on(corpus, tmp_path):
    subject = loaded(tiny("llama"))
    first = measure(subject, corpus, BUDGET, Sweep(tmp_path))
    files = sorted(tmp_path.iterdir())
    for file in files[::2]:
        file.unlink()
    again = measure(subject, corpus, BUDGET, Sweep(tmp_path))
    for name in first.data_vars:
        if "time" not in name:
            assert first[name].equals(again[name]), name


def test_too_few_texts_are_refused():
    with pytest.raises(UserError, match="4 texts and 9 are needed"):
        measure(loaded(tiny("llama")), random_corpus([(4, 9)] * 4), BUDGET, Sweep())


def test_runs_share_no_text(corpus):
    budget = replace(BUDGET, seeds=2)
    batches = [batch for seed in range(2) for batch in calibration_text(corpus, budget, seed)]
    rows = [tuple(row.tolist()) for batch in batches for row in batch.ids]
    held_out = [plain_text(text, 8).ids for text in corpus.texts[: budget.heldout_texts]]
    assert len({row[:8] for row in rows} | set(held_out)) == len(rows) + len(held_out)


def test_snapshots_keep_a_usable_record(record):
    summary = record.summary()
    kept = LayerShuffleRecovery(summary.assign_attrs(record.data.attrs))
    for method in METHODS:
        assert sorted(kept.positions(method)[0]) == list(range(LAYERS))
        assert kept.of("kendall_tau", method) == pytest.approx(record.of("kendall_tau", method))


# ---- published figures and derived quantities


@pytest.fixture(scope="module")
def source():
    return LayerShuffleRecovery(published.dataset("layer_shuffle_recovery"))


def test_the_published_ensemble_is_the_mean_of_its_published_parts(source):
    """Exactly, but for four positions whose mean ranks tie."""
    parts = [source.orders(part)[0] for part in ENSEMBLE]
    ranks = sum(np.argsort(part) for part in parts)
    found = source.orders("ensemble_rank")[0]
    assert (np.diff(ranks[found]) >= 0).all()
    assert len(ranks) - len(set(ranks)) <= 4


def test_published_figures_are_those_of_the_published_orders(source):
    for name, function in (
        ("kendall_tau", orders.kendall_tau),
        ("inversions", orders.inversions),
        ("position_accuracy", orders.position_accuracy),
        ("max_displacement", lambda order: orders.displacements(order).max()),
    ):
        found = [float(function(source.orders(method)[0])) for method in PUBLISHED_METHODS]
        assert found == pytest.approx([source.of(name, method) for method in PUBLISHED_METHODS], abs=5e-6)
    for method in PUBLISHED_METHODS:
        positions = source.positions(method)[0]
        assert orders.kendall_tau(positions[:17]) == pytest.approx(source.within_plateau(method), abs=5e-6)
        assert orders.kendall_tau(positions[17:]) == pytest.approx(source.beyond_plateau(method), abs=5e-6)


def test_the_published_shuffle_is_torchs(source):
    generator = torch.Generator().manual_seed(42)
    assert torch.randperm(28, generator=generator).tolist() == source.variable("shuffle_permutation").values.tolist()


def test_the_plateau_is_the_longest_even_run():
    assert plateau(np.array([9.0, 1.0, 1.05, 1.09, 2.0, 2.1])) == range(1, 4)
    assert plateau(np.array([1.0, 1.2, 1.44])) == range(1)
    norms = np.concatenate([np.linspace(248, 265, 17), np.linspace(314, 1140, 11)])
    assert plateau(norms) == range(17)


def test_a_method_that_a_record_lacks_is_not_applicable(source):
    with pytest.raises(NotApplicable, match="holds no block_descent"):
        source.of("kendall_tau", "block_descent")


def two_runs(settings=None, **variables):
    """A made-up record of four layers; fingerprints run forwards and backwards with one error, swaps err in one run.

    Norm gains give (2, 0, 1, 3) in both runs, and what the loss chose has as many inversions.
    """
    placed = {
        "activation_flow": [[0, 2, 1, 3], [3, 1, 2, 0]],
        "layernorm_progression": [[2, 0, 1, 3], [2, 0, 1, 3]],
        "pairwise_bubble": [[0, 1, 2, 3], [2, 1, 0, 3]],
    }
    others = [method for method in METHODS if method not in placed]
    positions = np.array([*placed.values(), *([[0, 3, 2, 1]] * 2 for _ in others)])
    taus = orders.kendall_tau(positions)
    made = {
        "recovered_position": variable(("method", "seed", "layer"), positions, "position", "made up"),
        "kendall_tau": variable(("method", "seed"), taus, "1", "made up"),
        "seed_kendall_tau": variable(("seed", "selection"), [[1 / 3, 1 / 3]] * 2, "1", "made up"),
    }
    coords = {"method": [*placed, *others], "selection": ["blind", "oracle"]}
    attributes = {"subject": "made-up", "source": "measured", "condition": "quick"}
    provenance = {"provenance": json.dumps({"settings": settings or {}})}
    return LayerShuffleRecovery(xr.Dataset(made | variables, coords, attributes | provenance))


def test_errors_of_a_chain_are_counted_in_its_own_direction():
    """Forwards (0, 2, 1, 3) inverts the pair 1, 2 alone; backwards the same pair alone is not inverted."""
    record = two_runs()
    assert record.inverted("activation_flow").sum(axis=(1, 2)).tolist() == [1, 5]
    assert np.argwhere(record.against_its_direction("activation_flow")).tolist() == [[0, 1, 2], [1, 1, 2]]


def test_a_search_is_set_against_its_seed_pair_by_pair():
    """The seed has two pairs wrong; swaps have none in the first run and three in the second."""
    assert two_runs().extra_inversions("pairwise_bubble").tolist() == [-2, 1]


def test_the_best_candidate_may_run_backwards():
    """Fingerprints have one error in either run: |tau| 2 / 3, where norm gains have 1 / 3 forwards."""
    assert two_runs().best_candidate_tau == pytest.approx([2 / 3, 2 / 3])


def test_held_out_losses_of_every_run_are_weighted_by_tokens():
    dims = ("contender", "seed", "prompt")
    losses = np.arange(len(CONTENDERS) * 4.0).reshape(len(CONTENDERS), 2, 2)
    record = two_runs(
        heldout_loss=variable(dims, losses, "nat/token", "made up"),
        scored_tokens=variable("prompt", [30, 10], "token", "made up"),
    )
    expected = losses @ [0.75, 0.25]
    assert np.allclose(record.heldout_losses, expected)
    summary = LayerShuffleRecovery(record.summary().assign_attrs(record.data.attrs))
    assert np.allclose(summary.heldout_losses, expected.mean(1, keepdims=True))


def enough_tokens(record):
    """Guard of a claim that needs a thousand tokens."""
    record.require_calibration_tokens(1000)


@pytest.mark.parametrize(
    ("settings", "guard", "reason"),
    [
        ({"bubble_sweeps": 1, "reach": None}, LayerShuffleRecovery.require_whole_searches, "bubble_sweeps 1"),
        ({"bubble_sweeps": None, "reach": 2}, LayerShuffleRecovery.require_whole_searches, "reach 2"),
        ({"stages": [[1, 20], [1, 32]]}, enough_tokens, "52 tokens decide"),
        ({"random_passes": 2}, LayerShuffleRecovery.require_passes_from_anywhere, "2 adjacent passes"),
    ],
)
def test_bounds_of_a_budget_are_named(settings, guard, reason):
    record = two_runs(settings)
    with pytest.raises(NotApplicable, match=reason):
        guard(record)


def test_a_budget_without_bounds_is_judged(source):
    for settings in ({"random_passes": 3, "stages": [[8, 125]]}, {"random_passes": None}):
        record = two_runs({"bubble_sweeps": None, "reach": None} | settings)
        for one in (record, source):
            one.require_whole_searches()
            one.require_calibration_tokens(1000)
            one.require_passes_from_anywhere()


@pytest.mark.parametrize(("layers", "expected"), [(18, 0.68), (24, 0.56), (30, 0.48)])
def test_five_passes_over_neighbours_do_not_sort_a_random_order(layers, expected):
    """What LSR-10 says of its bound: mean tau of comparisons that are never wrong."""
    generator = np.random.default_rng(0)
    found = np.array([generator.permutation(layers) for _ in range(1000)])
    for _ in range(5):
        for at in range(layers - 1):
            found[:, at : at + 2] = np.sort(found[:, at : at + 2], axis=1)
    taus = orders.kendall_tau(found)
    assert taus.mean() == pytest.approx(expected, abs=0.02)
    assert (taus < 0.3).mean() <= 0.07


def test_neighbour_z_is_that_of_prompt_means():
    """With as many tokens in each prompt: mean over standard error of the prompts' means."""
    rises = np.random.default_rng(0).normal(1, 0.5, (4, 9))
    data = xr.Dataset(
        {
            "scored_tokens": variable("prompt", np.full(9, 20), "token", "tokens"),
            "neighbour_swap_delta": variable(("neighbour", "prompt"), rises, "nat/token", "rise"),
        },
        attrs={"subject": "toy", "source": "measured", "condition": "quick"},
    )
    expected = rises.mean(1) / (rises.std(1, ddof=1) / 3)
    assert np.allclose(LayerShuffleRecovery(data).neighbour_z, expected)
