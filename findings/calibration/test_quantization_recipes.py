"""Known answers of the recipes that give each layer its bits, and the published recipes from their rule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import published
from lab.experiments.systems.quantization import Quantization
from lab.quantization import recipes
from lab.quantization.rounding import Rounding, gaussian_error

pytestmark = pytest.mark.calibration

SEEDS = st.integers(0, 10_000)


def test_published_recipes_follow_from_the_rule():
    record = Quantization(published.dataset("quantization"))
    gap = record.variable("t7_perturbation_gap").values
    rank = record.variable("effective_rank_ratio").values.mean(1)
    two_bit = record.variable("layer_delta_perplexity_reported").sel(bits=2).values
    unit = [(values - values.min()) / (values.max() - values.min() + 1e-8) for values in (gap, rank)]
    expected = {
        "t9_spectral": recipes.published_rule(rank),
        "t7_linearity": recipes.published_rule(gap),
        "t7_t9_combined": recipes.published_rule(0.5 * unit[0] + 0.5 * unit[1]),
        "sensitivity_oracle": recipes.published_rule(two_bit),
        "first_last_protected": recipes.first_last_protected(36),
    }
    for name, bits in expected.items():
        assert record.recipe_bits(name).tolist() == bits.tolist(), name


def test_published_figures_are_consistent():
    record = Quantization(published.dataset("quantization"))
    rises = record.variable("layer_delta_perplexity_reported")
    np.testing.assert_allclose(record.layer_delta_perplexity, rises, rtol=1e-4, atol=1e-6)
    reported = record.variable("matrix_delta_perplexity_reported")
    np.testing.assert_allclose(record.matrix_delta_perplexity, reported, rtol=1e-4, atol=1e-6)
    for name, value in zip(record.recipes, record.variable("recipe_delta_perplexity_reported").values, strict=True):
        assert record.recipe_delta_perplexity(name) == pytest.approx(float(value), rel=1e-4)
    assert record.recipe_bits("first_last_protected")[[0, -1]].tolist() == [4, 5]
    law = record.variable("gaussian_relative_error").values
    own = [gaussian_error(Rounding(bits, 128), 8192, torch.bfloat16) for bits in (8, 6, 4, 3, 2)]
    assert law == pytest.approx(own, rel=1e-3)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=40))
@settings(max_examples=50, deadline=None)
def test_recipes_keep_their_budget(score):
    score = np.array(score)
    assert abs(recipes.published_rule(score).mean() - 4) <= max(0.05, 1 / len(score))
    assert recipes.thirds(score).mean() == 4


def test_thirds_protect_the_highest_scores():
    assert recipes.thirds(np.array([9, 1, 5, 8, 2, 4])).tolist() == [5, 3, 4, 5, 3, 4]


def test_the_published_trim_takes_protection_back():
    """The bug is the source's and is reproduced: no layer keeps the 8 bits that it was given."""
    assert recipes.first_last_protected(36).max() == 5
    assert recipes.ends(36, first=8, last=8)[[0, -1]].tolist() == [8, 8]


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_greedy_oracle_is_optimal_where_losses_are_convex(seed):
    """Against all allocations of four layers of one size, with convex losses."""
    generator = np.random.default_rng(seed)
    drops = np.sort(generator.exponential(size=(4, 2)), axis=1)
    table = np.stack([drops.sum(1), drops[:, 0], np.zeros(4)], 1)
    chosen = recipes.greedy_oracle(table, (3, 4, 5), np.ones(4), target=4)
    best = min(
        sum(table[layer, width] for layer, width in enumerate(widths))
        for widths in np.ndindex(3, 3, 3, 3)
        if sum(widths) <= 4
    )
    assert sum(table[layer, width - 3] for layer, width in enumerate(chosen)) == pytest.approx(best)
    assert recipes.mean_bits(chosen, np.ones(4)) <= 4


def test_mean_bits_weighs_by_parameters():
    assert recipes.mean_bits(np.array([3, 5]), np.array([1, 3])) == 4.5
