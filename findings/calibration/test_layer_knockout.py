"""Known answers of the knockout sweep, on tiny decoders with planted layers."""

import copy
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lab.experiments.layers.layer_knockout import Budget, LayerKnockout, all_pairs, measure
from lab.store import Sweep
from lab.subjects.tiny import LAYERS, loaded, random_corpus, tiny

pytestmark = pytest.mark.calibration

BUDGET = Budget(None, None, None, None, None, head_dtype="float32", batch_tokens=64)
#: eight layers, so that a quarter of them is more than one
DEEP = 8


def record_of(model, corpus=None, budget=BUDGET):
    data = measure(loaded(model), corpus or random_corpus(), budget, Sweep())
    return LayerKnockout(data.assign_attrs(subject="tiny", source="measured", condition="full-float32"))


def without_output(model, *layers):
    """A copy of the model with layers that write nothing: their output projections are zero."""
    planted = copy.deepcopy(model)
    for layer in layers:
        block = planted.model.layers[layer]
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    return planted


@torch.no_grad()
def own_loss(model, corpus):
    """Mean over all completion tokens of the model's own cross-entropy."""
    total, tokens = 0.0, 0
    for text in corpus.texts:
        ids = torch.tensor([text.prompt_ids + text.completion_ids])
        start = len(text.prompt_ids)
        logits = model(ids, use_cache=False).logits[0, start - 1 : -1]
        total += float(functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
        tokens += ids.shape[1] - start
    return total / tokens


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=DEEP)


@pytest.fixture(scope="module")
def record(model):
    return record_of(model)


@pytest.fixture(scope="module")
def idle(model):
    """The record of the model whose layer 3 writes nothing."""
    return record_of(without_output(model, 3))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_skipping_equals_zeroed_output_projections(architecture):
    model, corpus = tiny(architecture), random_corpus()
    record = record_of(model)
    assert float(record.baseline_loss) == pytest.approx(own_loss(model, corpus), abs=1e-5)
    for layer in range(LAYERS):
        expected = own_loss(without_output(model, layer), corpus)
        assert float(record.knockout_loss.sel(layer=layer)) == pytest.approx(expected, abs=1e-5)


def test_pairs_equal_two_zeroed_layers(model, record):
    for i, j in [(0, 1), (2, 5), (6, 7)]:
        expected = own_loss(without_output(model, i, j), random_corpus())
        assert record.of_pair(record.mean("pair_knockout_loss"), j, i) == pytest.approx(expected, abs=1e-5)


def test_an_idle_layer_costs_nothing_and_couples_with_none(idle):
    assert float(idle.loss_delta.sel(layer=3)) == pytest.approx(0, abs=1e-6)
    assert float(idle.loss_ratio.sel(layer=3)) == pytest.approx(1, abs=1e-6)
    assert float(idle.kl.sel(layer=3)) == pytest.approx(0, abs=1e-6)
    assert float(idle.top1_agreement.sel(layer=3)) == 1
    assert np.abs(idle.synergy[idle.partners_of(3)]).max() < 1e-5
    assert float(idle.update_ratio.sel(layer=3)) == 0


def test_an_idle_layer_is_pruned_as_soon_as_no_other_layer_is_worth_less_than_nothing(idle):
    best = float(idle.mean("pair_single_loss").min())
    first = float(idle.pruning_loss.sel(step=1))
    assert first == pytest.approx(best, abs=1e-6)
    assert first <= float(idle.baseline_loss) + 1e-6


def write_constant(model, layer, vector):
    """Make a layer add a constant vector to the stream, whatever it reads."""
    planted = without_output(model, layer)
    block = planted.model.layers[layer]
    block.mlp.down_proj.bias = torch.nn.Parameter(vector, requires_grad=False)
    return planted


def test_two_layers_that_cancel_have_the_synergy_of_their_damages(model):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    record = record_of(write_constant(write_constant(model, 3, vector), 4, -vector))
    singles = record.pair_parts.sum("part")
    assert (record.loss_delta.sel(layer=[3, 4]).values != 0).all()
    assert record.of_pair(record.pair_delta, 3, 4) == pytest.approx(0, abs=1e-5)
    assert record.of_pair(record.synergy, 3, 4) == pytest.approx(-record.of_pair(singles, 3, 4), abs=1e-5)


def test_greedy_pruning_starts_at_the_cheapest_layer_and_is_bounded_by_exhaustive_search(record):
    assert record.pruning_order[0] == int(np.argmin(record.mean("pair_single_loss").values))
    assert float(record.pruning_loss.sel(step=0)) == pytest.approx(float(record.baseline_loss), abs=1e-6)
    exhaustive = float(record.mean("pair_knockout_loss").min())
    assert exhaustive <= float(record.pruning_loss.sel(step=2)) + 1e-6
    chosen = record.of_pair(record.mean("pair_knockout_loss"), *record.pruning_order)
    assert float(record.pruning_loss.sel(step=2)) == pytest.approx(chosen, abs=1e-6)


def test_naive_pruning_follows_the_single_knockouts(record):
    chosen = record.of_pair(record.mean("pair_knockout_loss"), *record.naive_pruning_order[:2])
    assert float(record.naive_pruning_loss.sel(step=2)) == pytest.approx(chosen, abs=1e-6)


def test_blocks_of_two_are_pairs_of_neighbours(record):
    sizes, firsts = record.variable("block_size").values, record.variable("block_first_layer").values
    losses = record.mean("block_loss").values
    for size, first, loss in zip(sizes, firsts, losses, strict=True):
        if size == 2:
            pair = record.of_pair(record.mean("pair_knockout_loss"), first, first + 1)
            assert loss == pytest.approx(pair, abs=1e-6)
    assert float(record.best_block_loss.sel(block_size=1)) == pytest.approx(float(record.knockout_loss.min()), abs=1e-6)


def test_all_pairs_are_there_once(record):
    record.require_all_pairs()
    assert record.pairs == list(combinations(range(DEEP), 2)) == all_pairs(DEEP)
    assert np.allclose(record.synergy_matrix, record.synergy_matrix.T, equal_nan=True)


def test_divergence_and_agreement_are_in_range(record):
    assert (record.kl >= -1e-9).all()
    assert ((record.top1_agreement >= 0) & (record.top1_agreement <= 1)).all()
    assert 0 < record.mean("target_probability") < 1


def test_text_loss_scores_the_users_words(model, record):
    corpus = random_corpus()
    total, tokens = 0.0, 0
    for text in corpus.texts:
        ids = torch.tensor([text.prompt_ids])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, 1:-1]
        total += float(functional.cross_entropy(logits, ids[0, 2:], reduction="sum"))
        tokens += ids.shape[1] - 2
    assert float(record.mean("text_baseline_loss")) == pytest.approx(total / tokens, abs=1e-5)


def test_norms_and_largest_entries_are_those_of_the_models_own_hidden_states(model, record):
    corpus = random_corpus()
    largest = np.zeros(DEEP - 1)
    for text in corpus.texts:
        with torch.no_grad():
            ids = torch.tensor([text.prompt_ids + text.completion_ids])
            states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        # the model norms its last hidden state, so the last layer is left out
        largest = np.maximum(largest, [float(state.abs().max()) for state in states[1:DEEP]])
    assert np.allclose(record.variable("residual_abs_max").values[:-1], largest, atol=1e-5)
    first = model.model.embed_tokens(torch.tensor(corpus.texts[0].prompt_ids + corpus.texts[0].completion_ids))
    start, stop = len(corpus.texts[0].prompt_ids) - 1, -1
    expected = float(first[start:stop].norm(dim=-1).mean())
    assert float(record.variable("input_norm").sel(layer=0, prompt=0)) == pytest.approx(expected, rel=1e-5)


MEASURED = {"subject": "tiny", "source": "measured", "condition": "full-float32"}


def test_no_prompt_stands_in_both_halves_of_a_resample():
    """Only prompt i suffers without layer i, so the profile of a half tells which prompts are in it."""
    prompts = 12
    data = {
        "scored_tokens": ("prompt", np.ones(prompts)),
        "baseline_loss": ("prompt", np.zeros(prompts)),
        "knockout_loss": (("layer", "prompt"), np.eye(prompts)),
    }
    record = LayerKnockout(xr.Dataset(data, {"layer": np.arange(prompts)}, MEASURED))
    even = np.arange(prompts) % 2 == 0
    for drawn in [record, *record.resamples[:100]]:
        first, second = (profile.values > 0 for profile in drawn.half_profiles)
        assert not (first & second).any()
        assert not first[~even].any()
        assert not second[even].any()
        assert ((first | second) == (drawn.knockout_loss.values > 0)).all()


def test_removable_layers_are_counted_along_the_path():
    """Losses of 1, 1.5, 2 and 4 on completions: two layers within twice the intact loss; three on the user's words."""
    data = {
        "pair_scored_tokens": ("pair_prompt", [1.0]),
        "pair_text_tokens": ("pair_prompt", [1.0]),
        "pruning_loss": (("step", "pair_prompt"), [[1.0], [1.5], [2.0], [4.0]]),
        "text_pruning_loss": (("step", "pair_prompt"), [[3.0], [3.0], [5.0], [6.0]], {"weights": "pair_text_tokens"}),
    }
    record = LayerKnockout(xr.Dataset(data, {"step": np.arange(4)}, MEASURED))
    assert record.removals == 3
    assert record.max_removable(ratio=2) == 2
    assert record.max_removable(ratio=1.99) == 1
    assert record.max_removable(ratio=2, text=True) == 3
    assert record.max_removable(ratio=1, text=True) == 1


def test_near_the_ends_the_contrast_is_to_fewer_neighbours():
    """Damages 1, 2, 4, 8, 16: the last layer's over the median of 4 and 8, the second's over that of 1, 4 and 8."""
    data = {"baseline_loss": ((), 0.0), "knockout_loss": ("layer", [1.0, 2.0, 4.0, 8.0, 16.0])}
    contrast = LayerKnockout(xr.Dataset(data, {"layer": np.arange(5)}, MEASURED)).neighbour_contrast
    np.testing.assert_allclose(contrast, [np.nan, 2 / 4, 4 / 5, 8 / 4, 16 / 6])


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), batch_tokens=st.sampled_from([16, 32, 1000]))
def test_neither_the_order_of_prompts_nor_the_batches_matter(model, record, order, batch_tokens):
    corpus = random_corpus()
    shuffled = replace(corpus, texts=tuple(corpus.texts[index] for index in order))
    budget = Budget(None, None, None, None, (1,), head_dtype="float32", batch_tokens=batch_tokens)
    again = record_of(model, shuffled, budget)
    assert np.allclose(again.knockout_loss, record.knockout_loss, atol=1e-5)
    assert np.allclose(again.synergy, record.synergy, atol=1e-4)
