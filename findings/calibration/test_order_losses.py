"""Known answers of raced losses of layer orders, on tiny models whose layers are exchanged in the model itself."""

import numpy as np
import pytest
import torch

from lab.corpora.batches import TokenText, token_batches
from lab.errors import UserError
from lab.residual.order_losses import LayerOrderLosses, _Race
from lab.residual.plain import layers_exchanged, token_losses
from lab.subjects.tiny import LAYERS, VOCABULARY, loaded, tiny

pytestmark = pytest.mark.calibration

#: tokens of each text, one list per stage
STAGES = ([8], [10, 7])


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_text"])
def subject(request):
    return loaded(tiny(request.param))


@pytest.fixture
def losses(subject):
    return raced(subject)


def texts():
    """The text of each stage; every token but the first is scored."""
    generator = np.random.default_rng(0)
    ids = [[tuple(generator.integers(3, VOCABULARY, length).tolist()) for length in stage] for stage in STAGES]
    return [[TokenText(own, tuple(range(1, len(own)))) for own in stage] for stage in ids]


def raced(subject, *, z=float("inf"), shuffle=range(LAYERS), stages=None):
    batches = [token_batches(stage, 100) for stage in texts()[:stages]]
    return LayerOrderLosses(subject.decoder, [batch for (batch,) in batches], shuffle, z=z, head_dtype=torch.float32)


def own_loss(subject, layers):
    """Mean loss of all scored tokens through the model's own forward, with its layers in this order."""
    with layers_exchanged(subject.model, layers):
        return float(torch.cat([token_losses(subject.model, text) for stage in texts() for text in stage]).mean())


def test_the_true_order_has_the_models_own_loss(subject, losses):
    true = tuple(range(LAYERS))
    assert losses.loss(true) == pytest.approx(own_loss(subject, true), abs=1e-5)


def test_exchanged_layers_take_their_kind_of_attention_along():
    """Gemma 3's kinds, window or all tokens, stand in the configuration; layers and kinds are put back."""
    model = tiny("gemma3_text")
    layers, kinds = list(model.model.layers), list(model.config.layer_types)
    order = [1, 0, *range(2, LAYERS)]
    assert kinds[0] != kinds[1]
    with layers_exchanged(model, order):
        assert list(model.model.layers) == [layers[layer] for layer in order]
        assert model.config.layer_types == [kinds[layer] for layer in order]
    assert list(model.model.layers) == layers
    assert model.config.layer_types == kinds


def test_differences_are_those_of_the_models_own_forward():
    """Through kept beginnings of a base that changes, against layers exchanged in the model itself."""
    subject = loaded(tiny("llama"))
    losses, generator = raced(subject), np.random.default_rng(0)
    base = tuple(range(LAYERS))
    for _ in range(4):
        trials = [tuple(generator.permutation(LAYERS).tolist()) for _ in range(5)] + [base]
        found = losses.differences(base, trials)
        own = {order: own_loss(subject, order) for order in (base, *trials)}
        assert found == pytest.approx([own[trial] - own[base] for trial in trials], abs=1e-5)
        assert found[-1] == pytest.approx(0, abs=1e-6)
        base = (*base[:2], *(layer for layer in trials[0] if layer not in base[:2]))


def test_kept_beginnings_save_work_and_change_nothing(subject, losses):
    """Exchanging the last two layers reruns two of five, once the states along the base are kept."""
    base = tuple(range(LAYERS))
    losses.differences(base, [base])
    before = losses.layer_tokens
    late = (*base[:-2], base[-1], base[-2])
    found = losses.differences(base, [late])
    assert losses.layer_tokens - before == 2 * (8 + 2 * 10)  # padding is run, too
    assert found == pytest.approx(raced(subject).differences(base, [late]), abs=1e-6)


def test_what_was_run_is_not_run_again(subject, losses):
    """An order that is asked for twice, as trial or as base, costs nothing the second time."""
    base, trial = tuple(range(LAYERS)), (0, 2, 1, 3, 4)
    (first,) = losses.differences(base, [trial])
    before = losses.layer_tokens, losses.head_tokens
    assert losses.differences(base, [trial, trial]).tolist() == [first, first]
    assert losses.differences(trial, [base]) == pytest.approx([-first], abs=1e-12)
    assert (losses.layer_tokens, losses.head_tokens) == before
    assert losses.trials == 4


def test_slots_are_relabelled_layers(subject):
    shuffle = (3, 1, 4, 0, 2)
    slots = (2, 0, 1, 4, 3)
    layers = tuple(shuffle[slot] for slot in slots)
    assert raced(subject, shuffle=shuffle).loss(slots) == raced(subject).loss(layers)


def test_beginnings_of_orders_compete(losses):
    """`lowest` reads partial orders too, as construction needs; every one of them alone gives the same losses."""
    trials = [(2, 0, layer) for layer in (1, 3, 4)]
    best, values = losses.lowest(trials)
    apart = [losses.loss(trial) for trial in trials]
    assert values == pytest.approx(apart, abs=1e-5)
    assert best == int(np.argmin(apart))


def test_construction_goes_on_from_what_it_has(losses):
    """After (2, 0) and three thirds, (2, 0, 1) and two fourths run the 1 again, and two layers; nothing before."""
    tokens = 8 + 2 * 10
    losses.lowest([(2, 0, layer) for layer in (1, 3, 4)])
    assert losses.layer_tokens == (2 + 3) * tokens
    losses.lowest([(2, 0, 1, layer) for layer in (3, 4)])
    assert losses.layer_tokens == (2 + 3 + 1 + 2) * tokens


def test_a_race_gives_up_losers_only(subject):
    """What is worse on the first stage is read no further; a margin, or being better, keeps it in."""
    worse, better = tuple(range(LAYERS)), tuple(reversed(range(LAYERS)))
    opening = raced(subject, stages=1)
    if opening.differences(better, [worse])[0] < 0:
        worse, better = better, worse
    racing, patient = raced(subject, z=1e-9), raced(subject)
    first, whole = (losses.differences(better, [worse])[0] for losses in (opening, patient))
    assert racing.differences(better, [worse])[0] == pytest.approx(first, abs=1e-6)
    assert first != pytest.approx(whole, abs=1e-4)
    assert racing.differences(better, [worse], first + 1)[0] == pytest.approx(whole, abs=1e-6)
    assert racing.differences(worse, [better])[0] == pytest.approx(-whole, abs=1e-6)


def test_construction_reads_no_further_when_one_is_left(subject):
    """All but the best have lost after the first stage; a trial without others is read to the end."""
    trials = [(2, 0, layer) for layer in (1, 3, 4)]
    opening, racing, patient = raced(subject, stages=1), raced(subject, z=1e-9), raced(subject)
    best, values = racing.lowest(trials)
    first_best, first = opening.lowest(trials)
    assert best == first_best
    assert values == pytest.approx(first, abs=1e-6)
    assert patient.lowest(trials)[1] != pytest.approx(first, abs=1e-4)
    assert racing.layer_tokens == opening.layer_tokens < patient.layer_tokens
    assert racing.lowest(trials[:1])[1] == pytest.approx([patient.loss(trials[0])], abs=1e-6)


def test_errors_of_running_means_are_standard_errors():
    """In two stages, of one trial that goes on and one that is left out; what does not vary has none, or a rounding."""
    values = np.random.default_rng(0).normal(size=(2, 9))
    race = _Race(2)
    race.add(values[:, :4])
    race.drop(np.array([False, True]))
    race.add(values[:1, 4:])
    assert race.mean == pytest.approx([values[0].mean(), values[1, :4].mean()])
    assert race.error == pytest.approx([values[0].std(ddof=1) / 3, values[1, :4].std(ddof=1) / 2])
    for constant in np.linspace(0.1, 3, 30):
        race = _Race(1)
        race.add(np.full((1, 7), constant))
        assert race.error == pytest.approx([0], abs=1e-7)


def test_an_order_without_a_finite_loss_has_lost():
    subject = loaded(tiny("llama"))
    losses = raced(subject)
    losses.differences((0, 1, 2), [(0, 1, 2)])
    subject.decoder.layers[4].mlp.down_proj.weight.data.fill_(float("nan"))
    assert losses.differences((0, 1, 2), [(0, 1, 4), (0, 2, 1)])[0] == np.inf
    assert losses.lowest([(0, 4), (0, 1)])[0] == 1
    with pytest.raises(UserError, match="not finite"):
        losses.loss((0, 4))
    with pytest.raises(UserError, match="not finite"):
        losses.differences((4,), [(0,)])
