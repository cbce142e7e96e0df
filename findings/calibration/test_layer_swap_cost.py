"""Known answers of the layer swap sweep, and the published figures against each other."""

from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch
from torch import nn
from torch.nn import functional

from lab import published
from lab.corpora.batches import TokenText
from lab.experiments.layers.layer_swap_cost import Budget, LayerSwapCost, attention_kinds, measure, move, spread
from lab.residual.plain import layers_exchanged, plain_losses
from lab.residual.programs import order, swap
from lab.statistics.clustering import clusters, condensed
from lab.store import Sweep
from lab.subjects.tiny import LAYERS, loaded, random_corpus, tiny

pytestmark = pytest.mark.calibration

WIDTH = 32
BUDGET = Budget(prompts=None, tokens=None, context_stride=2, move_layers=None, swap_groups=3, head_dtype="float32")


def record_of(model, corpus=None, budget=BUDGET, sweep=None):
    data = measure(loaded(model), corpus or random_corpus(), budget, sweep or Sweep())
    return LayerSwapCost(data.assign_attrs(subject="tiny", source="measured", condition="full-float32"))


def naive_losses(model, corpus, layers, part):
    """Loss of each text, run alone through the model's own forward with its layers in this order."""
    losses = []
    with layers_exchanged(model, layers):
        for text in corpus.texts:
            ids = text.prompt_ids + text.completion_ids
            start, stop = (len(text.prompt_ids), len(ids)) if part == "completion" else (1, len(text.prompt_ids))
            targets = range(start, stop, 1 if part == "completion" else BUDGET.context_stride)
            losses += plain_losses(model, [TokenText(ids, tuple(targets))])
    return np.array(losses)


def exchanged(layers, i, j):
    return [step.layer for step in swap(layers, i, j)]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def record(model):
    return record_of(model)


# ---- the sweep against the plain loop


def test_swaps_equal_the_plain_loop(model, record):
    corpus = random_corpus()
    for part, prefix in (("completion", ""), ("context", "context_")):
        intact = naive_losses(model, corpus, range(LAYERS), part)
        assert np.allclose(record.data[f"{prefix}baseline_loss"], intact, atol=1e-5)
        for i in range(LAYERS):
            for j in range(i + 1, LAYERS):
                expected = naive_losses(model, corpus, exchanged(LAYERS, i, j), part) - intact
                assert np.allclose(
                    record.data[f"{prefix}swap_loss_delta"].sel(layer=i, layer_other=j), expected, atol=1e-5
                )


def test_moves_equal_the_plain_loop(model, record):
    corpus = random_corpus()
    intact = naive_losses(model, corpus, range(LAYERS), "completion")
    for layer, slot, layers in ((0, 3, [1, 2, 3, 0, 4]), (4, 1, [0, 4, 1, 2, 3]), (2, 4, [0, 1, 3, 4, 2])):
        assert move(LAYERS, layer, slot) == order(layers)
        expected = naive_losses(model, corpus, layers, "completion") - intact
        assert np.allclose(record.data["move_loss_delta"].sel(moved_layer=layer, slot=slot), expected, atol=1e-5)


def test_moving_a_neighbour_is_exchanging_it(record):
    for i in range(LAYERS - 1):
        cost = record.cost.sel(layer=i, layer_other=i + 1)
        moves = record.mean("move_loss_delta")
        assert moves.sel(moved_layer=i, slot=i + 1) == pytest.approx(float(cost), abs=1e-6)
        assert moves.sel(moved_layer=i + 1, slot=i) == pytest.approx(float(cost), abs=1e-6)


def test_exchanging_or_moving_a_layer_to_its_own_place_costs_exactly_nothing(record):
    assert (np.diagonal(record.cost) == 0).all()
    assert (np.diagonal(record.mean("move_loss_delta")) == 0).all()


def test_two_layers_can_only_be_reversed():
    model = tiny("llama", num_hidden_layers=2)
    corpus = random_corpus()
    rise = naive_losses(model, corpus, [1, 0], "completion") - naive_losses(model, corpus, [0, 1], "completion")
    assert np.allclose(record_of(model).data["swap_loss_delta"].sel(layer=0, layer_other=1), rise, atol=1e-5)


def test_kinds_of_attention_are_the_configurations():
    subject = loaded(tiny("gemma3_text"))
    assert attention_kinds(subject) == list(subject.model.config.layer_types)
    measured = measure(subject, random_corpus(), BUDGET, Sweep())
    assert measured["attention_kind"].values.tolist() == [1, 0, 1, 1, 0]
    assert '"attention_kinds": ["full_attention", "sliding_attention"]' in measured.attrs["settings"]


# ---- models whose costs are known


def test_layers_with_the_same_weights_can_be_exchanged():
    model = tiny("llama")
    model.model.layers[3].load_state_dict(model.model.layers[1].state_dict())
    cost = record_of(model).cost.values
    assert abs(cost[1, 3]) < 1e-6
    for k in (0, 2, 4):  # exchanging k with either copy differs, but only by which copy is left where
        relabelled = exchanged(LAYERS, 1, 3)
        assert cost[k, 1] == pytest.approx(cost[relabelled][:, relabelled][k, 3], abs=1e-6)


def test_an_idle_layer_costs_what_the_others_are_shifted():
    model = tiny("llama")
    idle = model.model.layers[2]
    nn.init.zeros_(idle.self_attn.o_proj.weight)
    nn.init.zeros_(idle.mlp.down_proj.weight)
    found = record_of(model)
    moves = found.mean("move_loss_delta").values
    assert np.abs(moves[2]).max() < 1e-6
    assert (found.update_correlation.values[2] == 0).all()
    assert abs(found.cost.values[2, [1, 3]]).max() < 1e-6
    assert (found.neighbour_agreement.values[[1, 2]] == 1).all()
    assert abs(found.mean("neighbour_kl").values[[1, 2]]).max() < 1e-6
    assert found.cost.values[2, 0] == pytest.approx(moves[0, 2], abs=1e-6)
    assert found.cost.values[2, 4] == pytest.approx(moves[4, 2], abs=1e-6)
    assert abs(moves[0, 2]) > 1e-3


class Linear(nn.Module):
    """A layer that reads some coordinates of the residual stream and writes others, linearly."""

    def __init__(self, reads, writes):
        super().__init__()
        weight = torch.zeros(WIDTH, WIDTH)
        weight[np.ix_(reads, writes)] = torch.randn(len(reads), len(writes))
        self.weight = nn.Parameter(weight)

    def forward(self, hidden, *args, **kwargs):
        return hidden + hidden @ self.weight


def linear_model(reads, writes):
    """Layers that read and write blocks of 4 coordinates, given by number."""
    model = tiny("llama", num_hidden_layers=len(reads))
    block = [list(range(4 * index, 4 * index + 4)) for index in range(WIDTH // 4)]
    for index, (source, target) in enumerate(zip(reads, writes, strict=True)):
        model.model.layers[index] = Linear(block[source], block[target])
    return model


def test_layers_that_share_no_coordinates_commute():
    found = record_of(linear_model(reads=[0, 2, 4, 6], writes=[1, 3, 5, 7]))
    assert np.abs(found.cost).max() < 1e-5
    assert np.abs(found.mean("move_loss_delta")).max() < 1e-5


def test_only_a_broken_read_after_write_costs():
    """Layer 1 reads what layer 0 writes, layer 3 what 2 writes: of all pairs only (1, 2) can be exchanged."""
    cost = record_of(linear_model(reads=[0, 1, 3, 4], writes=[1, 2, 4, 5])).cost.values
    free = {(1, 2)}
    for i in range(4):
        for j in range(i + 1, 4):
            assert (abs(cost[i, j]) < 1e-5) == ((i, j) in free)


# ---- identities


def test_identities_hold_in_the_record_and_in_every_resample(record):
    rows, columns = np.triu_indices(LAYERS, k=1)
    for one in (record, *record.resamples[:20]):
        cost = one.cost.values
        assert np.array_equal(cost, cost.T)
        assert (cost >= -float(one.baseline_loss)).all()
        assert np.allclose(one.layer_cost * (LAYERS - 1), cost.sum(axis=1))
        pairs_apart = LAYERS - one.mean_by_distance.distance
        assert float((pairs_apart * one.mean_by_distance).sum()) == pytest.approx(cost[rows, columns].sum())
        assert np.allclose(one.at(one.cost, one.pairs_by_cost), np.sort(cost[rows, columns]))


def test_the_order_of_prompts_does_not_matter(model, record):
    corpus = random_corpus()
    reversed_record = record_of(model, replace(corpus, texts=corpus.texts[::-1]))
    assert np.allclose(reversed_record.cost, record.cost, atol=1e-6)
    assert np.allclose(reversed_record.context_cost, record.context_cost, atol=1e-6)


def test_parts_of_the_corpus_average_by_token_counts(model, record):
    corpus = random_corpus()
    parts = [record_of(model, replace(corpus, texts=texts)) for texts in (corpus.texts[:1], corpus.texts[1:])]
    tokens = np.array([int(part.data["scored_tokens"].sum()) for part in parts])
    average = sum(part.cost * count for part, count in zip(parts, tokens, strict=True)) / tokens.sum()
    assert np.allclose(average, record.cost, atol=1e-6)


def test_updates_correlate_as_their_token_means_do(model, record):
    corpus = random_corpus()
    updates = []
    for text in corpus.texts:
        with torch.no_grad():
            ids = torch.tensor([text.prompt_ids + text.completion_ids])
            states = torch.stack(model.model(ids, output_hidden_states=True).hidden_states[:LAYERS])[:, 0]
        scored = slice(len(text.prompt_ids) - 1, ids.shape[1] - 1)
        updates.append((states[1:] - states[:-1])[:, scored])
    means = torch.cat(updates, dim=1).mean(1)
    expected = functional.cosine_similarity(means[:, None], means[None], dim=-1)
    inner = slice(LAYERS - 1)  # Transformers hands out the last layer's state after the final norm only
    assert np.allclose(record.update_correlation[inner, inner], expected, atol=1e-5)


def test_an_interrupted_sweep_resumes_to_the_same_record(model, record, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(done, total, what):
        if what.startswith("moves"):
            raise Interrupted

    with pytest.raises(Interrupted):
        record_of(model, sweep=Sweep(tmp_path, interrupt))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(kept) >= BUDGET.swap_groups
    resumed = record_of(model, sweep=Sweep(tmp_path))
    assert resumed.data.identical(record.data)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_moved_layers_spread_from_first_to_last():
    assert spread(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert spread(6, None) == spread(6, 9) == list(range(6))


# ---- published figures


@pytest.fixture(scope="module")
def original():
    return LayerSwapCost(published.dataset("layer_swap_cost"))


def test_published_averages_follow_from_the_published_matrix(original):
    assert np.array_equal(original.cost, original.cost.T)
    assert np.allclose(original.layer_cost, original.data["layer_mean_swap_cost"], rtol=2e-4)
    assert np.allclose(original.mean_by_distance, original.data["distance_mean_swap_cost"], rtol=2e-4)
    assert np.allclose(original.median_by_distance, original.data["distance_median_swap_cost"], rtol=2e-4)
    assert original.interchangeable(original.relative_cost) == int(original.data["interchangeable_pair_count"])


def test_published_clusters_follow_from_the_published_matrix(original):
    for count in (3, 4, 5, 6):
        recorded = original.data["ward_cluster_label"].sel(num_clusters=count).values.tolist()
        assert clusters(original.cost, count) == recorded
    tree = scipy.cluster.hierarchy.linkage(condensed(original.cost), "ward")
    assert np.allclose(tree[:, 2], original.data["ward_linkage"].sel(field="height"), rtol=2e-4)
    assert np.array_equal(tree[:, 3], original.data["ward_linkage"].sel(field="size"))
