"""Adapters on tiny models: ranks, counts, budgets, how they begin, and what updates do to weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.adapters import lora
from lab.adapters.allocations import (
    ALLOCATIONS,
    EQUAL,
    MATRICES,
    PHASE_AWARE,
    Shape,
    allocation,
    bottleneck,
    last,
    layers_between,
    matched,
    parameters,
)
from lab.adapters.lora import Factors
from lab.adapters.merging import bfloat16, gaussian_merge, merge, schedule, total_rate
from lab.adapters.updates import WeightUnderStudy, leading, update_norm
from lab.errors import NotApplicable
from lab.statistics.correlations import spearman_by_order
from lab.statistics.spectra import Spectrum
from lab.subjects.anatomy import Decoder
from lab.subjects.products import WideLinear
from lab.subjects.tiny import tiny

pytestmark = pytest.mark.calibration

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")
QWEN3_4B = [(4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)]
SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def shape_of(shapes, layers, scale, seed=0):
    cost = np.tile([rows + columns for rows, columns in shapes], (layers, 1))
    return Shape(cost, np.random.default_rng(seed).uniform(0.1, 0.7, cost.shape), scale)


ORIGINAL, SMALL = shape_of(QWEN3_4B, 36, 1.0), shape_of(SMOLLM2, 30, 0.25)


def random_factors(rows, columns, rank, seed=0, size=1.0):
    generator = np.random.default_rng(seed)
    down, up = generator.standard_normal((rank, columns)), size * generator.standard_normal((rows, rank))
    return Factors(down.astype(np.float32), up.astype(np.float32))


# ---- allocations


@pytest.mark.parametrize(
    ("name", "count"), [("A", 33_030_144), ("B", 48_498_688), ("F", 23_855_104), ("H", 10_092_544)]
)
def test_published_counts_are_met_exactly(name, count):
    assert parameters(allocation(name, ORIGINAL), ORIGINAL.cost) == count


def test_ranges_of_layers_are_the_sources_at_its_own_depth():
    assert all(
        layers_between(first, stop, 36) == list(range(first, stop)) for first, stop in ((0, 17), (15, 25), (25, 36))
    )
    ranks = allocation("B", ORIGINAL)
    assert np.array_equal(ranks[16], PHASE_AWARE[:, 0])
    assert np.array_equal(ranks[17], PHASE_AWARE[:, 1])


@pytest.mark.parametrize(
    ("layers", "border", "skipped", "adapted"),
    [(30, 14, (12, 20), (21, 29)), (24, 11, (10, 16), (17, 23)), (18, 8, (7, 11), (12, 17))],
)
def test_ranges_of_layers_at_other_depths(layers, border, skipped, adapted):
    shape = shape_of(SMOLLM2, layers, 0.25)
    assert layers_between(17, 36, layers)[0] == border
    assert (bottleneck(shape)[0], bottleneck(shape)[-1]) == skipped
    assert (last(shape)[0], last(shape)[-1]) == adapted


@pytest.mark.parametrize("shape", [ORIGINAL, SMALL], ids=["qwen3-4b", "smollm2"])
def test_matched_budgets_are_equal(shape):
    count = {name: parameters(allocation(name, shape), shape.cost) for name in ALLOCATIONS}
    for name, reference in (("B_matched", "A"), ("spectral", "A"), ("inverse", "A"), ("A_matched", "B")):
        assert abs(count[name] / count[reference] - 1) <= EQUAL
    assert count["F"] == count["skip_early"] == count["skip_late"]
    assert count["H"] == count["early"] == count["middle"]


@pytest.mark.parametrize("name", ["early", "middle", "H", "skip_early", "skip_late", "F"])
def test_layers_are_adapted_wholly_or_not_at_all(name):
    ranks = allocation(name, SMALL)
    assert set(np.unique(ranks)) == {0, SMALL.rank}
    assert all(len(set(row)) == 1 for row in ranks.tolist())


def test_ranks_by_spectrum_follow_it_and_their_inverse_opposes_it():
    effective = SMALL.effective_rank_ratio.ravel()
    assert spearman_by_order(allocation("spectral", SMALL).ravel(), effective) > 0.9
    assert spearman_by_order(allocation("inverse", SMALL).ravel(), effective) < -0.9


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000), st.floats(1.5, 20))
def test_matching_meets_any_budget_and_stays_close(layers, seed, mean_rank):
    generator = np.random.default_rng(seed)
    cost = np.tile(generator.integers(50, 500, 7), (layers, 1))
    wanted = mean_rank * generator.uniform(0.5, 1.5, cost.shape)
    budget = float((wanted * cost).sum())
    if EQUAL * budget < cost.max() / 2:  # one unit of rank would overshoot
        return
    ranks = matched(wanted, cost, budget)
    assert abs(parameters(ranks, cost) / budget - 1) <= EQUAL
    assert ranks.min() >= 1
    assert np.abs(ranks - wanted).max() <= 2


# ---- on models


@pytest.fixture(params=ARCHITECTURES)
def decoder(request):
    return Decoder(tiny(request.param))


IDS = torch.arange(1, 25).reshape(2, 12)


def logits(decoder):
    with torch.no_grad():
        return decoder.model(input_ids=IDS, use_cache=False).logits


def test_every_matrix_gets_the_rank_that_was_asked_for(decoder):
    generator = np.random.default_rng(3)
    ranks = generator.integers(0, 5, (decoder.n_layers, len(MATRICES)))
    cost = lora.shape_of(decoder, 1.0).cost
    with lora.fresh_adapter(decoder, ranks, seed=0) as model:
        assert np.array_equal(lora.ranks_of(decoder), ranks)
        assert sum(parameter.numel() for parameter in lora.trainable_parameters(model)) == parameters(ranks, cost)
    assert not lora.ranks_of(decoder).any()


def test_layers_whose_numbers_begin_alike_are_told_apart():
    """Layer 1 must not get layer 11's rank."""
    decoder = Decoder(tiny("llama", num_hidden_layers=12))
    ranks = np.zeros((12, 7), dtype=int)
    ranks[1], ranks[11] = 2, 5
    with lora.fresh_adapter(decoder, ranks, seed=0):
        assert np.array_equal(lora.ranks_of(decoder), ranks)


def test_an_adapter_that_has_not_learned_changes_no_logit(decoder):
    before = logits(decoder)
    with lora.fresh_adapter(decoder, np.full((decoder.n_layers, 7), 2), seed=0):
        assert torch.equal(logits(decoder), before)
    assert torch.equal(logits(decoder), before)


def learned(decoder, folder, seed=0, size=0.05):
    """A saved adapter with random factors in both places."""
    ranks = np.full((decoder.n_layers, 7), 3)
    with lora.fresh_adapter(decoder, ranks, seed) as model:
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora.trainable_parameters(model):
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
        lora.save_adapter(model, folder, "tiny")
        return logits(decoder)


def test_a_saved_adapter_reads_as_it_was(decoder, tmp_path):
    before, with_it = logits(decoder), learned(decoder, tmp_path)
    assert not torch.allclose(before, with_it, atol=1e-2)
    with lora.attached(decoder, tmp_path):
        torch.testing.assert_close(logits(decoder), with_it, atol=5e-3, rtol=0)  # float16 factors
    assert torch.equal(logits(decoder), before)


def test_read_factors_are_what_peft_computes(decoder, tmp_path):
    learned(decoder, tmp_path)
    factors = lora.read_factors(decoder, tmp_path)
    assert set(factors) == set(lora.adapted_maps(decoder))
    maps = lora.adapted_maps(decoder)
    before = {place: linear.weight.detach().clone() for place, linear in maps.items()}
    with lora.attached(decoder, tmp_path):
        attached = logits(decoder)
    for place, linear in maps.items():
        linear.weight.data.add_(torch.from_numpy(factors[place].update))
    torch.testing.assert_close(logits(decoder), attached, atol=1e-4, rtol=1e-4)
    for place, linear in maps.items():
        linear.weight.data.copy_(before[place])


def test_adapters_stand_beside_products_that_are_widened(tmp_path):
    """As subjects are loaded on processors without bfloat16 instructions: the products' module is a subclass."""
    decoder = Decoder(tiny("llama"))
    learned(decoder, tmp_path, size=0.1)
    factors = lora.read_factors(decoder, tmp_path)
    decoder.model.bfloat16()
    for linear in lora.adapted_maps(decoder).values():
        linear.__class__ = WideLinear
    before = logits(decoder)
    with lora.attached(decoder, tmp_path):
        beside = logits(decoder)
    with lora.merged(decoder, factors):
        within = logits(decoder)
    assert torch.equal(logits(decoder), before)
    assert float((beside - before).abs().max()) > 10 * float((beside - within).abs().max())


def test_merging_is_undone_and_lands_on_the_grid(decoder, tmp_path):
    learned(decoder, tmp_path)
    factors = lora.read_factors(decoder, tmp_path)
    before = logits(decoder)
    with lora.merged(decoder, factors):
        for linear in lora.adapted_maps(decoder).values():
            assert torch.equal(linear.weight, linear.weight.bfloat16().float())
        assert not torch.equal(logits(decoder), before)
    assert torch.equal(logits(decoder), before)


def test_the_seed_alone_decides_how_an_adapter_begins(decoder):
    def start(seed):
        with lora.fresh_adapter(decoder, np.full((decoder.n_layers, 7), 2), seed) as model:
            return [parameter.detach().clone() for parameter in lora.trainable_parameters(model)]

    state = torch.random.get_rng_state()
    first, again, other = start(0), start(0), start(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    downs = [parameter for parameter in first if len(parameter) == 2]
    assert all(float(down.abs().max()) <= down.shape[1] ** -0.5 for down in downs)


def test_other_layers_cannot_be_adapted():
    with pytest.raises(NotApplicable, match="seven matrices"):
        lora.adapted_maps(Decoder(tiny("gpt2")))


# ---- updates


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 4), st.integers(0, 1000))
def test_changes_from_factors_are_those_of_the_dense_matrix(rows, columns, rank, seed):
    weight = bfloat16(np.random.default_rng(seed).standard_normal((rows, columns)))
    factors = random_factors(rows, columns, rank, seed + 1, 0.1)
    study = WeightUnderStudy(weight)
    found = study.changed_by(factors)
    dense = factors.scale * factors.up.astype(np.float64) @ factors.down.astype(np.float64)
    np.testing.assert_allclose(update_norm(factors), np.linalg.norm(dense), rtol=1e-9)
    np.testing.assert_allclose(found["update_relative_norm"], np.linalg.norm(dense) / np.linalg.norm(weight), rtol=1e-6)
    ratios = [
        Spectrum(np.linalg.svd(matrix, compute_uv=False), rows, columns).effective_rank / min(rows, columns)
        for matrix in (weight.astype(np.float64), weight.astype(np.float64) + dense)
    ]
    np.testing.assert_allclose(study.effective_rank_ratio, ratios[0], rtol=1e-6)
    np.testing.assert_allclose(found["effective_rank_ratio_change"], ratios[1] - ratios[0], rtol=1e-6, atol=1e-9)
    u, _, vt = np.linalg.svd(weight.astype(np.float64))
    k = leading(weight.shape)
    total = np.linalg.norm(dense) ** 2
    np.testing.assert_allclose(
        found["subspace_overlap_left"], np.linalg.norm(u[:, :k].T @ dense) ** 2 / total, atol=1e-6
    )
    np.testing.assert_allclose(
        found["subspace_overlap_right"], np.linalg.norm(dense @ vt[:k].T) ** 2 / total, atol=1e-6
    )


def test_effective_rank_of_known_matrices():
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0]
    assert WeightUnderStudy(orthogonal).effective_rank_ratio == pytest.approx(1, abs=1e-4)  # on the bfloat16 grid
    one = np.outer(2.0 ** np.arange(-4, 4), 2.0 ** np.arange(-8, 8))  # rank one, and exact in bfloat16
    assert WeightUnderStudy(one).effective_rank_ratio == pytest.approx(1 / 8)


@pytest.mark.parametrize("shape", [(48, 30), (30, 48)])
def test_an_update_along_the_leading_directions_overlaps_wholly(shape):
    weight = bfloat16(np.random.default_rng(0).standard_normal(shape))
    u, _, vt = np.linalg.svd(weight.astype(np.float64))
    k = leading(shape)
    found = WeightUnderStudy(weight).changed_by(Factors(vt[:k].astype(np.float32), u[:, :k].astype(np.float32)))
    assert found["subspace_overlap_left"] == pytest.approx(1, abs=1e-5)
    assert found["subspace_overlap_right"] == pytest.approx(1, abs=1e-5)


def test_a_random_update_overlaps_by_chance():
    rows, columns = 80, 60
    study = WeightUnderStudy(np.random.default_rng(0).standard_normal((rows, columns)))
    k = leading((rows, columns))
    found = [study.changed_by(random_factors(rows, columns, 4, seed)) for seed in range(60)]
    for name, side in (("subspace_overlap_left", rows), ("subspace_overlap_right", columns)):
        values = np.array([one[name] for one in found])
        assert abs(values.mean() - k / side) <= 3 * values.std(ddof=1) / len(values) ** 0.5


def test_an_update_of_nothing_changes_nothing():
    factors = random_factors(20, 30, 2, size=0.0)
    found = WeightUnderStudy(np.random.default_rng(0).standard_normal((20, 30))).changed_by(factors)
    assert found["update_relative_norm"] == found["effective_rank_ratio_change"] == 0
    assert found["merge_unchanged_fraction"] == 1


# ---- merging


@settings(max_examples=50, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, allow_nan=False, width=32))
def test_rounding_is_pytorchs(value):
    assert bfloat16(np.array([value], np.float32))[0] == float(torch.tensor(value, dtype=torch.float32).bfloat16())


def test_ties_go_to_the_even_neighbour():
    """Halfway between neighbours, 2^-7 apart from 1 on: down from an even one, up to the next from an odd one."""
    ties = np.array([1 + (2 * index + 1) * 2.0**-8 for index in range(8)], np.float32)
    assert bfloat16(ties).tolist() == torch.from_numpy(ties).bfloat16().tolist()
    assert bfloat16(ties)[:2].tolist() == [1.0, 1 + 2 * 2.0**-7]


def test_merging_loses_small_updates_wholly_and_large_ones_not():
    weight = np.sign(np.random.default_rng(0).standard_normal((50, 50))) * np.float32(1.5)
    ones = np.ones_like(weight)
    # numbers from 1 to 2 lie 2^-7 apart: less than half a step is lost, and exactly so
    assert merge(weight, 0.49 * 2.0**-7 * ones).loss == pytest.approx(1)
    assert merge(weight, 0.49 * 2.0**-7 * ones).unchanged == 1
    assert merge(weight, 1e4 * ones).loss < 5e-3
    assert merge(weight, 2.0**-7 * ones).unchanged == 0


def test_merging_gaussian_updates_loses_less_the_larger_they_are():
    losses = [gaussian_merge(0.02, 0.02 * ratio).loss for ratio in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.8
    assert losses[-1] < 0.03


def test_the_schedule_rises_and_falls_as_it_says():
    rates = [schedule(step, 2.0, 100, 10) for step in range(100)]
    assert rates[0] == 0
    assert rates[5] == 1
    assert rates[10] == 2 == max(rates)
    assert rates[55] == pytest.approx(1)
    assert np.all(np.diff(rates[10:]) < 0)
    assert total_rate(5e-6, 126, 50) == pytest.approx(3.15e-4, rel=0.01)
