"""Known answers of layer shuffle recovery: features, raced losses, whole measurements, published figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lab import published
from lab.errors import NotApplicable, UserError
from lab.experiments.layers.layer_shuffle_recovery import (
    ENSEMBLE,
    METHODS,
    PUBLISHED_METHODS,
    QUICK,
    WEIGHT_METHODS,
    LayerShuffleRecovery,
    measure,
    plateau,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_features import (
    PROBE_SCALES,
    fingerprints,
    noise,
    pair_spreads,
    weight_features,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_methods import (
    WITHOUT_TEXT,
    SlotFeatures,
    cosines,
)
from lab.experiments.layers.measuring.layer_shuffle_recovery_runs import calibration_text, plain_text
from lab.residual.executor import Executor
from lab.residual.order_losses import LayerOrderLosses
from lab.statistics import orders, seriation
from lab.store import Sweep
from lab.subjects.anatomy import hidden_of
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
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request):
    return loaded(tiny(request.param))


@pytest.fixture(scope="module")
def corpus():
    return random_corpus(LENGTHS)


def record_of(subject, corpus, budget=BUDGET, sweep=None):
    data = measure(subject, corpus, budget, sweep or Sweep())
    attributes = {"subject": "tiny", "source": "measured", "condition": "quick-float32"}
    return LayerShuffleRecovery(data.assign_attrs(attributes))


def own_loss(model, layers, ids):
    """Loss per token of one text, through the model's own forward with its layers in this order."""
    kept = model.model.layers
    types = getattr(model.config, "layer_types", None)
    model.model.layers = nn.ModuleList([kept[layer] for layer in layers])
    if types is not None:
        model.config.layer_types = [types[layer] for layer in layers]
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        return functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").numpy()
    finally:
        model.model.layers = kept
        if types is not None:
            model.config.layer_types = types


# ---- raced losses


@pytest.fixture
def losses(subject, corpus):
    return raced(subject, corpus)


def raced(subject, corpus, *, z=float("inf"), shuffle=None, budget=BUDGET):
    texts = calibration_text(corpus, budget, 0)
    return LayerOrderLosses(
        subject.decoder, texts, shuffle or range(subject.decoder.n_layers), z=z, head_dtype=torch.float32
    )


def texts_of(corpus, seed=0):
    longest = sorted(corpus.texts[BUDGET.heldout_texts :], key=lambda text: -len(plain_text(text).ids))
    own = longest[seed :: BUDGET.seeds]
    return [list(plain_text(own[0], 8).ids), *(list(plain_text(text, 10).ids) for text in own[1:3])]


def test_the_true_order_has_the_models_own_loss(subject, corpus, losses):
    expected = np.concatenate([own_loss(subject.model, range(LAYERS), ids) for ids in texts_of(corpus)])
    assert losses.loss(tuple(range(LAYERS))) == pytest.approx(expected.mean(), abs=1e-5)


def test_differences_are_those_of_the_models_own_forward(corpus):
    """Through kept beginnings of a base that changes, against layers exchanged in the model itself."""
    subject = loaded(tiny("llama"))
    losses, generator = raced(subject, corpus), np.random.default_rng(0)
    base = tuple(range(LAYERS))
    for _ in range(4):
        trials = [tuple(generator.permutation(LAYERS).tolist()) for _ in range(5)] + [base]
        found = losses.differences(base, trials)
        own = {
            order: np.concatenate([own_loss(subject.model, order, ids) for ids in texts_of(corpus)]).mean()
            for order in (base, *trials)
        }
        assert found == pytest.approx([own[trial] - own[base] for trial in trials], abs=1e-5)
        assert found[-1] == pytest.approx(0, abs=1e-6)
        base = (*base[:2], *(layer for layer in trials[0] if layer not in base[:2]))


def test_kept_beginnings_save_work_and_change_nothing(subject, corpus, losses):
    """Exchanging the last two layers reruns two of five, once the states along the base are kept."""
    base = tuple(range(LAYERS))
    losses.differences(base, [base])
    before = losses.layer_tokens
    late = (*base[:-2], base[-1], base[-2])
    found = losses.differences(base, [late])
    tokens = sum(len(ids) for ids in texts_of(corpus))
    assert losses.layer_tokens - before == 2 * tokens
    assert found == pytest.approx(raced(subject, corpus).differences(base, [late]), abs=1e-6)


def test_slots_are_relabelled_layers(subject, corpus):
    shuffle = (3, 1, 4, 0, 2)
    true, shuffled = raced(subject, corpus), raced(subject, corpus, shuffle=shuffle)
    slots = (2, 0, 1, 4, 3)
    assert shuffled.loss(slots) == true.loss(tuple(shuffle[slot] for slot in slots))


def test_beginnings_of_orders_compete(subject, corpus, losses):
    """`lowest` reads partial orders too, as construction needs; every one of them alone gives the same losses."""
    trials = [(2, 0, layer) for layer in (1, 3, 4)]
    best, values = losses.lowest(trials)
    apart = [losses.loss(trial) for trial in trials]
    assert values == pytest.approx(apart, abs=1e-5)
    assert best == int(np.argmin(apart))


def test_a_race_gives_up_losers_only(subject, corpus):
    """What is worse on the first stage is read no further; a margin, or being better, keeps it in."""
    worse, better = tuple(range(LAYERS)), tuple(reversed(range(LAYERS)))
    opening = LayerOrderLosses(
        subject.decoder, calibration_text(corpus, BUDGET, 0)[:1], worse, z=float("inf"), head_dtype=torch.float32
    )
    if opening.differences(better, [worse])[0] < 0:
        worse, better = better, worse
    racing, patient = raced(subject, corpus, z=1e-9), raced(subject, corpus)
    first, whole = (losses.differences(better, [worse])[0] for losses in (opening, patient))
    assert racing.differences(better, [worse])[0] == pytest.approx(first, abs=1e-6)
    assert first != pytest.approx(whole, abs=1e-4)
    assert racing.differences(better, [worse], first + 1)[0] == pytest.approx(whole, abs=1e-6)
    assert racing.differences(worse, [better])[0] == pytest.approx(-whole, abs=1e-6)


def test_an_order_without_a_finite_loss_has_lost(corpus):
    subject = loaded(tiny("llama"))
    losses = raced(subject, corpus)
    losses.differences((0, 1, 2), [(0, 1, 2)])
    subject.decoder.layers[4].mlp.down_proj.weight.data.fill_(float("nan"))
    assert losses.differences((0, 1, 2), [(0, 1, 4), (0, 2, 1)])[0] == np.inf
    assert losses.lowest([(0, 4), (0, 1)])[0] == 1
    with pytest.raises(UserError, match="not finite"):
        losses.loss((0, 4))
    with pytest.raises(UserError, match="not finite"):
        losses.differences((4,), [(0,)])


# ---- features


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


# ---- whole measurements


@pytest.fixture(scope="module")
def record(subject, corpus):
    return record_of(subject, corpus)


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
        ids = list(plain_text(corpus.texts[prompt], BUDGET.heldout_tokens).ids)
        swapped = list(range(LAYERS))
        swapped[neighbour], swapped[neighbour + 1] = neighbour + 1, neighbour
        rise = own_loss(subject.model, swapped, ids).mean() - own_loss(subject.model, range(LAYERS), ids).mean()
        found = record.variable("neighbour_swap_delta").sel(neighbour=neighbour)[prompt]
        assert float(found) == pytest.approx(rise, abs=1e-5)


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


def test_neighbour_z_is_that_of_prompt_means():
    """With as many tokens in each prompt: mean over standard error of the prompts' means."""
    import xarray as xr

    from lab.records import variable

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


def test_executor_resumes_from_a_kept_state(subject, corpus):
    """What racing rests on: an edit puts a kept state in the place of the entry, whatever the layer that follows."""
    from lab.residual.order_losses import _after, _resume, _Stage
    from lab.residual.programs import Step, order

    (batch, *_) = calibration_text(corpus, BUDGET, 0)
    stage = _Stage(subject.decoder, batch, torch.float32)
    stage.keep((4, 2))
    executor = Executor(subject.decoder, edits={_after(2): _resume(stage._states[1])})
    programs = [(Step(None, edit=_after(2)), *order([0, 3])), order([4, 2, 0, 3])]
    resumed, whole = executor.run(batch, programs, stage.readout)["loss"]
    assert torch.allclose(resumed, whole, atol=1e-6)
    assert stage.kept == (4, 2)
