"""Known answers of layer shuffle recovery's features, and of the methods that need no text."""

import numpy as np
import pytest
import torch
from torch import nn

from lab.errors import NotApplicable
from lab.experiments.layers.layer_shuffle_recovery import ENSEMBLE
from lab.experiments.layers.measuring.layer_shuffle_recovery_features import (
    PROBE_SCALES,
    fingerprints,
    noise,
    pair_spreads,
    weight_features,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_methods import WITHOUT_TEXT, SlotFeatures, cosines
from lab.statistics import orders, seriation
from lab.subjects.calls import hidden_of
from lab.subjects.tiny import LAYERS, loaded, tiny

pytestmark = pytest.mark.calibration


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_text"])
def subject(request):
    return loaded(tiny(request.param))


def test_weight_features_are_those_of_concatenated_parameters(subject):
    found = weight_features(subject.decoder)
    flat = [torch.cat([p.flatten() for p in layer.parameters()]).double().numpy() for layer in subject.decoder.layers]
    statistics = [[np.linalg.norm(w), w.mean(), w.std(ddof=1), abs(w).max()] for w in flat]
    assert np.allclose(found.statistics, statistics, rtol=1e-9)
    assert np.allclose(found.products, np.array(flat) @ np.array(flat).T)
    gains = [
        torch.cat([p.flatten() for name, p in layer.named_parameters() if "norm" in name]).numpy()
        for layer in subject.decoder.layers
    ]
    assert np.array_equal(found.gains, gains)
    assert np.allclose(found.gain_energy, np.square(gains).sum(1))
    assert found.parameters == len(flat[0])
    layer = subject.decoder.layers[1]
    modules = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj)
    expected = [torch.linalg.svdvals(module.weight)[:32].numpy() for module in modules]
    assert np.allclose(found.spectrum[1], np.concatenate(expected), atol=1e-5)
    assert found.spectrum_of == ("q_proj", "k_proj", "v_proj", "gate_proj")
    assert found.query_values == slice(0, len(expected[0]))


def test_layers_of_several_kinds_are_refused():
    with pytest.raises(NotApplicable, match="different parameters"):
        weight_features(loaded(tiny("qwen3_next")).decoder)


@pytest.mark.parametrize("layer", [3, 4])  # of different kinds in Gemma 3
def test_fingerprints_are_means_and_deviations_of_updates(subject, layer):
    decoder = subject.decoder
    found = fingerprints(decoder, 7)
    assert found.shape == (LAYERS, len(PROBE_SCALES) * 2 * decoder.width)
    states = noise(decoder, PROBE_SCALES[1], 8)
    args, kwargs = decoder.capture(torch.zeros(2, 32, dtype=torch.int64)).call(layer, 1)
    with torch.no_grad():
        update = (hidden_of(decoder.layers[layer](states, *args, **kwargs)) - states).flatten(0, 1)
    own = found[layer].reshape(len(PROBE_SCALES), 2, -1)[1]
    assert np.allclose(own[0], update.mean(0), atol=1e-5)
    assert np.allclose(own[1], update.std(0), atol=1e-5)


def test_random_input_meets_a_causal_layer():
    """Attention is causal with no mask handed on: what comes later changes no earlier update."""
    decoder = loaded(tiny("llama")).decoder
    captured = decoder.capture(torch.zeros(2, 32, dtype=torch.int64))
    args, kwargs = captured.call(2, 1)
    states = noise(decoder, 1.0, 0)
    with torch.no_grad():
        before = decoder.layers[2](states, *args, **kwargs)
        states[:, 20:] = 0
        after = decoder.layers[2](states, *args, **kwargs)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_pair_spreads_are_those_of_two_layers_in_turn(subject):
    decoder = subject.decoder
    found = pair_spreads(decoder, 3)
    captured, states = decoder.capture(torch.zeros(2, 32, dtype=torch.int64)), noise(decoder, 0.1, 3)
    with torch.no_grad():
        for layer in (4, 1):
            args, kwargs = captured.call(layer, 1)
            states = hidden_of(decoder.layers[layer](states, *args, **kwargs))
    assert found[4, 1] == pytest.approx(float(states.std(correction=0)), rel=1e-4)
    assert np.isnan(found.diagonal()).all()


class Adding(nn.Module):
    """A layer that adds a vector, whatever comes in."""

    def __init__(self, vector):
        super().__init__()
        self.vector = nn.Parameter(vector)

    def forward(self, states):
        return states + self.vector


def test_layers_that_add_a_smoothly_turning_vector_are_put_in_order():
    """Fingerprints of layer k are g(k), on an arc: the chain is the arc, from either end."""
    angles = np.linspace(0, 2, 12)
    arc = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ np.random.default_rng(0).normal(size=(2, 20))
    shuffled = np.random.default_rng(1).permutation(12)
    layers = [Adding(torch.tensor(vector)) for vector in arc[shuffled]]
    states = torch.randn(2, 3, 20, dtype=torch.float64)
    answers = np.array([(layer(states) - states).mean((0, 1)).detach().numpy() for layer in layers])
    distances = np.linalg.norm(answers[:, None] - answers, axis=-1)
    assert abs(orders.kendall_tau(shuffled[seriation.chain(distances)])) == 1


def test_identical_layers_give_any_order():
    """No feature tells equal layers apart: over shuffles, tau is 0 on average within three standard errors."""
    n, generator = 12, np.random.default_rng(0)
    taus = []
    for _ in range(300):
        shuffle = generator.permutation(n)
        taus.append(float(orders.kendall_tau(shuffle[seriation.chain(np.zeros((n, n)))])))
    assert abs(np.mean(taus)) < 3 * orders.chance_deviation(n) / np.sqrt(len(taus))


# ---- methods do not see the shuffle


def features_of(n, generator):
    products = np.cov(generator.normal(size=(n, 40)))
    return SlotFeatures(
        norms=generator.uniform(1, 2, n),
        statistics=generator.normal(size=(n, 4)),
        gains=generator.normal(size=(n, 9)),
        spectrum=generator.normal(size=(n, 8)),
        fingerprints=generator.normal(size=(n, 30)),
        similarity=cosines(products),
        spreads=np.add.outer(np.zeros(n), generator.permutation(n)) + 0.01 * generator.uniform(size=(n, n)),
        query_values=slice(0, 2),
    )


def relabelled(features, slots):
    both = {"similarity": features.similarity, "spreads": features.spreads}
    one = {
        name: getattr(features, name)[slots] for name in ("norms", "statistics", "gains", "spectrum", "fingerprints")
    }
    return SlotFeatures(
        **one, **{name: matrix[np.ix_(slots, slots)] for name, matrix in both.items()}, query_values=slice(0, 2)
    )


@pytest.mark.parametrize("method", WITHOUT_TEXT)
def test_relabelling_slots_changes_no_order(method):
    """In ten random shuffles of random features. Mean ranks of the ensemble tie: there, ranks must rise."""
    generator = np.random.default_rng(5)
    features = features_of(11, generator)
    plain = WITHOUT_TEXT[method](features)
    for _ in range(10):
        slots = generator.permutation(11)
        found = [int(slots[slot]) for slot in WITHOUT_TEXT[method](relabelled(features, slots))]
        if method == "ensemble_rank":
            paths = [WITHOUT_TEXT[part](features) for part in ENSEMBLE]
            ranks = sum(np.argsort(path) for path in paths)
            assert (np.diff(ranks[found]) >= 0).all()
        else:
            assert found == plain
