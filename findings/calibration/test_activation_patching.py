"""Known answers of activation patching: a model that moves the answer in one known layer, and identities of any."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from lab.corpora.minimal_pairs import TokenPair
from lab.errors import NotApplicable
from lab.experiments.layers.activation_patching import EXPERIMENT, ActivationPatching
from lab.experiments.layers.measuring import activation_patching
from lab.experiments.layers.measuring.activation_patching import POSITIONS, patched
from lab.store import Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import LAYERS, VOCABULARY, tiny

pytestmark = pytest.mark.calibration

SPAN, LENGTH = 2, 7
CLEAN, CORRUPTED, RIGHT, WRONG = 10, 11, 20, 21


def record_of(model, pairs):
    """The record of one batch of pairs, whether or not the model solves them."""
    found = patched(Decoder(model), pairs)
    dims = {"residual": ("position", "layer", "minimal_pair"), "clean": "minimal_pair", "corrupted": "minimal_pair"}
    names = {
        "clean": "clean_preference",
        "corrupted": "corrupted_preference",
        "residual": "residual_patched_preference",
        "update": "update_patched_preference",
        "damage": "update_corrupted_preference",
    }
    variables = {names[name]: (dims.get(name, ("layer", "minimal_pair")), values) for name, values in found.items()}
    coords = {"position": list(POSITIONS), "layer": np.arange(len(found["update"]))}
    return ActivationPatching(xr.Dataset(variables, coords, {"subject": "tiny", "source": "measured"}))


def random_pairs(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for index in range(count):
        clean = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        other = clean.clone()
        other[SPAN] = (clean[SPAN] + 1 + index) % VOCABULARY
        ids = tuple(clean.tolist()), tuple(other.tolist())
        pairs.append(TokenPair(f"p{index}", "factual", *ids, (SPAN, SPAN + 1), RIGHT + index, WRONG + index))
    return pairs


def mover(layer):
    """A GPT-2 in which one layer moves the changed token's feature to the last position; all others write nothing.

    Feature 0 tells the clean token from the corrupted one, feature 1 the right answer from the wrong
    one. The last position (feature 3) attends to the changed one (feature 2) and writes what it finds
    in feature 0 to feature 1.
    """
    model = tiny("gpt2", n_head=4)
    for parameter in model.transformer.parameters():
        parameter.data.zero_()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.weight.data.fill_(1)
    width = model.config.hidden_size
    tokens, positions = model.transformer.wte.weight.data, model.transformer.wpe.weight.data
    tokens[CLEAN, 0], tokens[CORRUPTED, 0], tokens[RIGHT, 1], tokens[WRONG, 1] = 1, -1, 1, -1
    positions[SPAN, 2], positions[LENGTH - 1, 3] = 5, 5
    attention = model.transformer.h[layer].attn
    attention.c_attn.weight.data[3, 0] = 10  # query of the last position
    attention.c_attn.weight.data[2, width] = 10  # key of the changed position
    attention.c_attn.weight.data[0, 2 * width] = 1  # value: which token it is
    attention.c_proj.weight.data[0, 1] = 10
    return model


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_moving_layer_is_the_bottleneck_and_the_handover(layer):
    rest = [5] * (LENGTH - SPAN - 1)
    ids = tuple((5, 5, token, *rest) for token in (CLEAN, CORRUPTED))
    record = record_of(mover(layer), [TokenPair("moved", "factual", *ids, (SPAN, SPAN + 1), RIGHT, WRONG)])
    before, after = np.arange(LAYERS) < layer, np.arange(LAYERS) >= layer
    assert np.allclose(record.residual_recovery.sel(position="span"), before, atol=1e-3)
    assert np.allclose(record.residual_recovery.sel(position="last"), after, atol=1e-3)
    assert np.allclose(record.residual_recovery.sel(position="between"), 0, atol=1e-3)
    assert np.allclose(record.update_recovery, np.arange(LAYERS) == layer, atol=1e-3)
    assert np.allclose(record.update_damage, np.arange(LAYERS) == layer, atol=1e-3)
    assert record.causal_bottleneck_layer == layer
    assert record.handover_layer == layer
    assert record.handover_depth == layer / LAYERS


def test_bottleneck_and_handover_of_known_recoveries():
    """Layer 0 restores most and layer 2 most of the rest; the last position leads after layer 1, and from 3 on."""
    last, span = [0.1, 0.6, 0.2, 0.9], [0.9, 0.5, 0.5, 0.1]
    data = {
        "clean_preference": ((), 1.0),
        "corrupted_preference": ((), 0.0),
        "update_patched_preference": ("layer", [1.0, 0.2, 0.6, 0.5]),
        "residual_patched_preference": (("position", "layer"), [span, last]),
    }
    coords = {"position": ["span", "last"], "layer": np.arange(4)}
    record = ActivationPatching(xr.Dataset(data, coords, {"subject": "tiny", "source": "measured"}))
    assert (record.causal_bottleneck_layer, record.later_bottleneck_layer) == (0, 2)
    assert (record.handover_layer, record.handover_depth) == (1, 0.25)
    never = ActivationPatching(record.data.assign(residual_patched_preference=(("position", "layer"), [span, [0] * 4])))
    assert np.isnan(never.handover_layer)
    assert np.isnan(never.handover_depth)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2", "falcon_h1"])
def test_after_the_last_layer_only_the_last_position_is_read(architecture):
    recovery = record_of(tiny(architecture), random_pairs()).residual_recovery.isel(layer=-1)
    assert float(recovery.sel(position="last")) == pytest.approx(1, abs=1e-4)
    assert float(recovery.sel(position="span")) == pytest.approx(0, abs=1e-4)


def test_an_idle_layer_recovers_and_damages_nothing():
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[3].self_attn.o_proj.weight.data.zero_()
    model.model.layers[3].mlp.down_proj.weight.data.zero_()
    record = record_of(model, random_pairs())
    assert float(record.update_recovery.sel(layer=3)) == pytest.approx(0, abs=1e-5)
    assert float(record.update_damage.sel(layer=3)) == pytest.approx(0, abs=1e-5)


def test_preferences_are_the_models_own_logit_differences():
    model, pairs = tiny("qwen2"), random_pairs()
    record = record_of(model, pairs)
    for name, side in (("clean_preference", "clean_ids"), ("corrupted_preference", "corrupted_ids")):
        ids = torch.tensor([getattr(pair, side) for pair in pairs])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1]
        expected = [float(logits[row, p.answer] - logits[row, p.corrupted_answer]) for row, p in enumerate(pairs)]
        assert np.allclose(record.variable(name), expected, atol=1e-4)


def test_single_layer_patches_equal_hooks_on_the_model():
    """The executor's patch of layer 2 against a hook that replaces the layer's output by hand."""
    model, pairs = tiny("llama"), random_pairs()
    clean, corrupted = (
        torch.tensor([getattr(pair, side) for pair in pairs]) for side in ("clean_ids", "corrupted_ids")
    )
    with torch.no_grad():
        states = model(clean, use_cache=False, output_hidden_states=True).hidden_states
    update = states[3] - states[2]
    hook = model.model.layers[2].register_forward_hook(lambda module, args, output: args[0] + update)
    with torch.no_grad():
        logits = model(corrupted, use_cache=False).logits[:, -1]
    hook.remove()
    expected = [float(logits[row, p.answer] - logits[row, p.corrupted_answer]) for row, p in enumerate(pairs)]
    found = record_of(model, pairs).variable("update_patched_preference").sel(layer=2)
    assert np.allclose(found, expected, atol=1e-4)


def test_a_model_that_solves_no_pair_cannot_be_patched(monkeypatch):
    """One without embeddings prefers neither answer: ties are not solved."""
    monkeypatch.setattr(activation_patching, "tokenised", lambda pairs, tokenizer: (random_pairs(), []))
    model = tiny("gpt2")
    model.transformer.wte.weight.data.zero_()
    subject = SimpleNamespace(facts=SimpleNamespace(name="blank"), tokenizer=None, decoder=Decoder(model))
    with pytest.raises(NotApplicable, match="blank solves none of the 4 minimal pairs; nothing can be patched"):
        activation_patching.measure(subject, EXPERIMENT.budgets["quick"], Sweep())
