"""Known answers and invariants of contrastive trajectories: pairs, read-outs, divergences and alignment."""

import itertools
import math

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lab.corpora.contrastive_groups import CONTRASTS, PREFIXES, Group
from lab.corpora.contrastive_tokens import ContrastivePair, TokenGroups, TokenSequence
from lab.errors import NotApplicable, UserError
from lab.experiments.layers.contrastive_trajectories import Budget, ContrastiveTrajectories
from lab.experiments.layers.measuring.contrastive_trajectories import Layout, cosine, distance, measured, states_at
from lab.residual.pair_lens import PairLens, PairRows, divergences
from lab.statistics.alignment import linear_cka, unbiased_cka
from lab.store import Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import LAYERS, VOCABULARY, tiny

pytestmark = pytest.mark.calibration

FAMILIES, ENTRIES = 12, 3
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")


def random_layout(seed=0, *, tails=0):
    """Families of random words behind random prompts of several lengths; style entries of 9 tokens.

    Args:
        seed: of the tokens.
        tails: random tokens behind every word, so that no pivot is complete.
    """
    draw = np.random.default_rng(seed)

    def ids(count):
        return tuple(draw.integers(3, VOCABULARY, count).tolist())

    sequences, pairs, names = [], [], []
    for index in range(FAMILIES):
        prompt, stem, words = ids(4 + index % 3), ids(2), draw.permutation(np.arange(3, VOCABULARY))[:4].tolist()
        names.append(f"f{index}")
        for prefix in PREFIXES:
            front = prompt + (stem if prefix == "shared" else ())
            first = len(sequences)
            sequences += [TokenSequence((*front, word, *ids(tails)), len(prompt)) for word in words]
            pairs += [
                pair(names[-1], kind, prefix, first, first + 1 + place, sequences)
                for place, kind in enumerate(CONTRASTS)
            ]
    style = [f"s{index}" for index in range(2 * ENTRIES)]
    for index, name in enumerate(style):
        prompt, stem = ids(5), ids(3) if index % 2 else ()
        first = len(sequences)
        heads = draw.permutation(np.arange(3, VOCABULARY))[:2].tolist()
        sequences += [TokenSequence((*prompt, *stem, head, *ids(8)), 5) for head in heads]
        pairs.append(pair(name, "style", PREFIXES[index % 2], first, first + 1, sequences))
    return Layout(TokenGroups(tuple(sequences), tuple(pairs), {}), names, style)


def pair(family, relationship, prefix, a, b, sequences):
    first, second = sequences[a].ids, sequences[b].ids
    pivot = next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)
    group = Group(f"{family}/{relationship}/{prefix}", relationship, prefix, "p", ("a", "b"), family)
    complete = sum(pivot == len(ids) - 1 for ids in (first, second))
    return ContrastivePair(group, a, b, pivot, complete, pivot - sequences[a].prompt_tokens)


def record_of(model, layout):
    dataset = measured(Decoder(model), layout, Budget(None, batch_tokens=64), Sweep())
    return ContrastiveTrajectories(dataset.assign_attrs(subject="tiny", source="measured", condition="test"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny(request.param)


# ---- states and read-outs against the model itself


def test_states_are_those_of_the_model(model):
    """Right padding and batches change nothing: every read state equals the model's own on the sequence alone."""
    layout = random_layout()
    states = states_at(Decoder(model), layout, 64, Sweep())
    for (sequence, at), row in list(layout.points.items())[::7]:
        ids = torch.tensor([layout.groups.sequences[sequence].ids])
        with torch.no_grad():
            own = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        # Two threads sum in another order for a batch than for one text: float32's error on entries of up to 12.
        torch.testing.assert_close(states[:-1, row], torch.stack([s[0, at] for s in own[:-1]]), rtol=1e-5, atol=1e-4)


def test_the_last_layer_reads_the_models_own_distribution(model):
    """At the last layer, divergences, margin and ranks are those of the model's output."""
    layout = random_layout()
    record = record_of(model, layout)
    for place in (0, 1, 4, 11):
        one = layout.pairs[place]
        with torch.no_grad():
            logits = [
                model(torch.tensor([layout.groups.sequences[s].ids]), use_cache=False).logits[0] for s in (one.a, one.b)
            ]
        log_a, log_b = (torch.log_softmax(own[one.pivot].double(), -1) for own in logits)
        family, contrast, prefix = np.unravel_index(place, layout.shape)
        where = {"family": family, "contrast": contrast, "prefix": prefix, "layer": -1}
        kl = float((log_b.exp() * (log_b - log_a)).sum())
        assert float(record.data.kl_divergence.isel(where)) == pytest.approx(kl, abs=1e-4)
        before = logits[0][one.pivot - 1].double()
        tokens = [layout.groups.sequences[s].ids[one.pivot] for s in (one.a, one.b)]
        margin = float(before[tokens[0]] - before[tokens[1]])
        assert float(record.data.preference_margin.isel(where)) == pytest.approx(margin, abs=1e-4)
        rank = float((before > before[tokens[0]]).sum())
        assert float(record.data.alternative_rank.isel(family=family, word=0, prefix=prefix, layer=-1)) == rank


def test_states_before_the_pivot_are_identical(model):
    """T-17.35 in float32, on sequences of several lengths in one batch."""
    assert float(record_of(model, random_layout()).data.cosine_last_shared_min) >= 1 - 1e-6


def test_tokens_behind_the_pivot_do_not_matter(model):
    """What follows the pivot changes no reading at it or before it."""
    bare, continued = random_layout(), random_layout(tails=3)
    same = {
        s: TokenSequence((*one.ids, *other.ids[len(one.ids) :]), one.prompt_tokens)
        for s, (one, other) in enumerate(zip(bare.groups.sequences, continued.groups.sequences, strict=True))
    }
    continued = Layout(TokenGroups(tuple(same.values()), bare.groups.pairs, {}), bare.families, bare.style)
    first, second = record_of(model, bare).data, record_of(model, continued).data
    for name in ("cosine_similarity", "kl_divergence", "js_divergence", "preference_margin", "centred_cosine"):
        assert np.allclose(first[name], second[name], atol=1e-5), name


def test_the_embedding_knows_nothing_of_the_prompt():
    """At slot -1 the cosine depends on the two tokens alone: it is the same with and without a stem."""
    cosines = record_of(tiny("llama"), random_layout()).data.cosine_similarity.sel(slot=-1)
    assert np.allclose(cosines.sel(prefix="immediate"), cosines.sel(prefix="shared"), atol=1e-6)


def test_swapping_the_completions():
    """Symmetric quantities stay, the margin changes its sign, KL turns into its other direction."""
    layout = random_layout()
    swapped = [
        ContrastivePair(p.group, p.b, p.a, p.pivot, p.complete_pivots, p.shared_tokens) for p in layout.groups.pairs
    ]
    other = Layout(TokenGroups(layout.groups.sequences, tuple(swapped), {}), layout.families, layout.style)
    first, second = (record_of(tiny("llama"), one).data for one in (layout, other))
    for name in ("cosine_similarity", "l2_distance_normalized", "js_divergence", "style_js_divergence"):
        assert np.allclose(first[name], second[name], atol=1e-5), name
    assert np.allclose(first.preference_margin, -second.preference_margin, atol=1e-5)
    assert np.allclose(first.kl_divergence, second.reverse_kl_divergence, atol=1e-5)


def test_chunks_hold_as_many_pairs_as_rows_allow():
    """Three rows at most: pairs that share rows go together, and each pair stands in one chunk with all its rows."""
    lens = PairLens(Decoder(tiny("llama")))
    lens.chunk_rows = 3
    needed = np.array([[0, 1, 0, 4, 6, 6], [1, 2, 2, 5, 7, 7]])
    chunks = [(pairs.tolist(), rows.tolist()) for pairs, rows in lens._chunks(needed)]
    assert chunks == [([0, 1, 2], [0, 1, 2]), ([3], [4, 5]), ([4, 5], [6, 7])]
    lens.chunk_rows = 1  # a pair needs two: one pair at a time
    assert [pairs.tolist() for pairs, _ in lens._chunks(needed[:, :2])] == [[0], [1]]


def test_readings_of_chunks_are_those_of_one():
    """However few rows of logits are held at once, pairs stay together."""
    decoder, layout = Decoder(tiny("qwen2")), random_layout()
    states = states_at(decoder, layout, 64, Sweep())[3]
    whole, parts = PairLens(decoder), PairLens(decoder)
    parts.chunk_rows = 3
    one, many = (lens.read(states, layout.rows) for lens in (whole, parts))
    for name, values in one.items():
        assert np.allclose(values, many[name], atol=1e-5), name


def test_identical_states_do_not_diverge():
    """A state against itself: cosine 1, distance 0, no divergence, no preference between a token and itself."""
    decoder = Decoder(tiny("llama"))
    states = torch.randn(2, decoder.width, generator=torch.Generator().manual_seed(0))
    zero, token = np.array([0]), np.array([5])
    read = PairLens(decoder).read(states, PairRows(zero, zero, zero, token, token))
    for name in ("kl_divergence", "reverse_kl_divergence", "js_divergence", "preference_margin"):
        assert read[name][0] == pytest.approx(0, abs=1e-6)
    vector = states[0].numpy()
    assert cosine(vector, vector) == pytest.approx(1)
    assert distance(vector, vector) == 0


def test_states_that_are_not_finite_are_named():
    """The layer is named in one line."""
    model = tiny("llama")
    decoder = Decoder(model)
    model.model.layers[2].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="after layer 2 are not finite"):
        measured(decoder, random_layout(), Budget(None), Sweep())


# ---- properties

logits = arrays(np.float32, (2, 17), elements=st.floats(-30, 30, width=32))


@given(logits)
def test_divergences_are_bounded(pair_of_logits):
    """KL >= 2 TV^2 (Pinsker), 0 <= JS <= ln 2, and float32 agrees with float64."""
    log_a, log_b = torch.log_softmax(torch.from_numpy(pair_of_logits), -1)
    found = {name: float(value) for name, value in divergences(log_a, log_b).items()}
    exact = {name: float(value) for name, value in divergences(log_a.double(), log_b.double()).items()}
    variation = float((log_a.exp() - log_b.exp()).abs().sum()) / 2
    assert found == pytest.approx(exact, abs=1e-4)
    assert found["kl_divergence"] >= 2 * variation**2 - 1e-5
    assert found["reverse_kl_divergence"] >= 2 * variation**2 - 1e-5
    assert -1e-6 <= found["js_divergence"] <= math.log(2) + 1e-6


def test_divergences_of_a_known_pair():
    """(1/2, 1/2) against (1/4, 3/4), by hand."""
    log_a, log_b = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    found = divergences(log_a, log_b)
    assert float(found["kl_divergence"]) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    assert float(found["reverse_kl_divergence"]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    halves = [0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)]
    halves += [0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)]
    assert float(found["js_divergence"]) == pytest.approx(sum(halves) / 2, abs=1e-6)


vectors = arrays(np.float64, (2, 6), elements=st.floats(-10, 10)).filter(
    lambda both: (np.linalg.norm(both, axis=1) > 1e-2).all()
)


@given(vectors, st.floats(0.01, 100))
@settings(max_examples=50)
def test_geometry_of_two_vectors(both, scale):
    """Bounds, scale, rotation, and distance^2 = 2 (1 - cosine) for equal norms."""
    a, b = both
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    for measure, largest in ((cosine, 1), (distance, 2)):
        assert -largest - 1e-9 <= measure(a, b) <= largest + 1e-9
        assert measure(scale * a, scale * b) == pytest.approx(measure(a, b), abs=1e-6)
        assert measure(a @ rotation, b @ rotation) == pytest.approx(measure(a, b), abs=1e-6)
        assert measure(a, b) == pytest.approx(measure(b, a), abs=1e-9)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    assert distance(a, b) ** 2 == pytest.approx(2 * (1 - cosine(a, b)), abs=1e-6)


# ---- alignment


def test_published_alignment_measures_the_number_of_tokens():
    """For independent clouds of few rows the usual CKA is near 1 (0.997 at n = 8, d = 2560) and 1 at n = 2."""
    draw = np.random.default_rng(0)
    for n, expected in ((2, 1.0), (3, 1.0), (8, 0.997), (64, 0.976)):
        x, y = draw.normal(size=(2, n, 2560))
        assert float(linear_cka(x, y)) == pytest.approx(expected, abs=0.002)


def test_unbiased_alignment_of_independent_clouds_is_zero():
    """Its mean over 200 pairs of clouds of 10 rows is 0 within three standard errors."""
    x, y = np.random.default_rng(0).normal(size=(2, 200, 10, 64))
    aligned = unbiased_cka(x, y)
    assert abs(aligned.mean()) <= 3 * aligned.std(ddof=1) / np.sqrt(len(aligned))


def test_alignment_ignores_rotation_scale_and_shift():
    """A cloud and its rotated, scaled and shifted copy are perfectly aligned, by both estimators."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(12, 6))
    rotation, _ = np.linalg.qr(draw.normal(size=(6, 6)))
    for estimator in (linear_cka, unbiased_cka):
        assert float(estimator(x - x.mean(0), 3 * (x - x.mean(0)) @ rotation)) == pytest.approx(1)
    assert float(linear_cka(x, 3 * x @ rotation + 5)) == pytest.approx(1)


def test_unbiased_alignment_needs_four_rows():
    """Below, it does not exist."""
    assert np.isnan(unbiased_cka(np.ones((3, 2)), np.ones((3, 2))))


def test_short_style_texts_have_no_alignment():
    """Below 8 tokens nothing is put in the place of CKA."""
    layout = random_layout()
    short = {
        s: TokenSequence(one.ids[: one.prompt_tokens + 7], one.prompt_tokens)
        for s, one in enumerate(layout.groups.sequences)
    }
    groups = TokenGroups(tuple(short.values()), layout.groups.pairs, {})
    record = record_of(tiny("llama"), Layout(groups, layout.families, layout.style))
    assert np.isnan(record.data.style_linear_cka).all()


# ---- what the record derives


def made_record(**variables):
    """A measured record of these arrays."""
    coords = {"layer": np.arange(LAYERS), "slot": np.arange(LAYERS + 1) - 1}
    attributes = {"subject": "made", "source": "measured", "condition": "test"}
    return ContrastiveTrajectories(xr.Dataset(variables, coords, attributes))


def test_commitment_is_the_first_layer_of_the_last_sign():
    """Signs + - + + + settle at layer 2 of 5, a constant sign at layer 0, a late change at the last."""
    margins = np.array([[1, -1, 1, 1, 1], [2, 1, 3, 1, 1], [1, 1, 1, 1, -1]], float)
    made = np.broadcast_to(margins[:, None, None], (3, 3, 2, LAYERS))
    record = made_record(preference_margin=(("family", "contrast", "prefix", "layer"), made))
    assert np.allclose(record.commitment_depths("antonym")[:, 0], np.array([3, 1, 5]) / LAYERS)


def test_commitment_by_chance_is_the_mean_over_all_orders():
    """Of the 24 orders of the first four layers; without disagreement, and with nothing else, all orders are alike."""
    margins = np.array([[1, -1, 1, 1, 1], [-1, 1, -1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, -1]], float)

    def record_with(rows):
        made = np.broadcast_to(rows[:, None, None], (len(rows), 3, 2, LAYERS))
        return made_record(preference_margin=(("family", "contrast", "prefix", "layer"), made))

    shuffled = [
        record_with(margins[:, [*order, LAYERS - 1]]).commitment_depths("antonym")[:, 0]
        for order in itertools.permutations(range(LAYERS - 1))
    ]
    assert np.allclose(record_with(margins).commitment_by_chance("antonym")[:, 0], np.mean(shuffled, axis=0))


def test_layers_at_a_depth():
    """Depth is (l + 1) / L; the upper bound is included, and rounding does not shift it."""
    record = made_record()
    assert list(record.layers(0, 0.4)) == [0, 1]
    assert list(record.layers(0.4)) == [2, 3, 4]
    assert list(record.layers(3 / 5, 4 / 5)) == [3]
    assert list(record.layers_from(3 / 5, 4 / 5)) == [2, 3]
    assert list(record.layers_from(0.5, 0.67)) == [2]
    assert list(record.layers_from(0)) == list(range(LAYERS))


def test_resampling_draws_families_and_style_entries():
    """A resample is the mean over the drawn families, the same for every variable."""
    values = np.arange(FAMILIES * 6.0 * LAYERS).reshape(FAMILIES, 3, 2, LAYERS)
    record = made_record(kl_divergence=(("family", "contrast", "prefix", "layer"), values))
    resample = record.resamples[0]
    drawn = resample._draws["family"]
    assert np.allclose(resample.average("kl_divergence"), values[drawn].mean(0))
    assert np.allclose(resample.mean("kl_divergence"), values[drawn].mean(0))
    assert len(set(drawn.tolist())) < FAMILIES


def test_few_families_are_not_compared():
    """Below 12 the comparison is not applicable."""
    values = np.ones((11, 3, 2, LAYERS))
    record = made_record(kl_divergence=(("family", "contrast", "prefix", "layer"), values))
    with pytest.raises(NotApplicable, match="11 groups"):
        record.contrast()
