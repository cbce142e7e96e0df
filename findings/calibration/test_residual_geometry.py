"""Known answers of T-4's instrument on tiny decoders: layers that are planted, and the model's own hidden states."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab.errors import NotApplicable, UserError
from lab.experiments.layers.residual_geometry import Budget, ResidualGeometry, measure
from lab.statistics.point_clouds import participation_ratio
from lab.store import Sweep
from lab.subjects.tiny import LAYERS, loaded, random_corpus, tiny

pytestmark = pytest.mark.calibration

BUDGET = Budget(None, None, batch_tokens=40)
LENGTHS = ((7, 5), (4, 9), (9, 3), (5, 8))
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")


def record_of(subject, corpus=None, budget=BUDGET, sweep=None):
    data = measure(subject, corpus or random_corpus(LENGTHS), budget, sweep or Sweep())
    provenance = json.dumps({"settings": json.loads(data.attrs.pop("settings"))})
    named = {"subject": "tiny", "source": "measured", "condition": "full-float32", "provenance": provenance}
    return ResidualGeometry(data.assign_attrs(named))


class Scaled(nn.Module):
    """A layer that multiplies the stream."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, hidden, *_, **__):
        return self.factor * hidden


@torch.no_grad()
def own_states(model, corpus, first="completion"):
    """States of the measured tokens at every site [S, N, d], from the model's own modules by hooks."""
    states = [[] for _ in range(LAYERS + 1)]
    for text in corpus.texts:
        seen = []
        layers = model.model.layers
        hooks = [layers[0].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))]
        hooks += [
            layer.register_forward_hook(
                lambda _, given, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in layers
        ]
        model(torch.tensor([text.prompt_ids + text.completion_ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        start = {"completion": len(text.prompt_ids), "all": 0, "all_but_first": 1}[first]
        for site, state in enumerate(seen):
            states[site].append(state[0, start:].double().numpy())
    return np.stack([np.concatenate(parts) for parts in states])


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def record(model):
    return record_of(loaded(model))


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_figures_are_those_of_the_models_own_states(architecture):
    model, corpus = tiny(architecture), random_corpus(LENGTHS)
    record, h = record_of(loaded(model)), own_states(model, corpus)
    u, f = np.diff(h, axis=0), h[-1]
    norms = np.linalg.norm(h, axis=-1)
    contributions = np.concatenate([h[:1], u])
    along = (contributions * f).sum(-1) / norms[-1]
    mean_updates = u.mean(1)
    directions = mean_updates / np.linalg.norm(mean_updates, axis=1, keepdims=True)
    centred = h - h.mean(1, keepdims=True)
    singular = np.linalg.svd(centred, compute_uv=False)
    unit = h / norms[..., None]
    spread = np.linalg.svd(unit - unit.mean(1, keepdims=True), compute_uv=False) ** 2
    expected = {
        "norm_mean": norms.mean(1),
        "norm_std": norms.std(1),
        "norm_min": norms.min(1),
        "norm_max": norms.max(1),
        "norm_median": torch.from_numpy(norms).median(1).values.numpy(),
        "update_norm_mean": np.linalg.norm(u, axis=-1).mean(1),
        "update_norm_std": np.linalg.norm(u, axis=-1).std(1),
        "cosine_input_output": cosine(h[1:], h[:-1]).mean(1),
        "cosine_input_output_std": cosine(h[1:], h[:-1]).std(1),
        "update_ratio": (np.linalg.norm(u, axis=-1) / norms[1:]).mean(1),
        "update_alignment": cosine(u, h[:-1]).mean(1),
        "update_alignment_std": cosine(u, h[:-1]).std(1),
        "cosine_to_embedding": cosine(h, h[:1]).mean(1),
        "cosine_to_final": cosine(h, f[None]).mean(1),
        "update_cosine_to_final": cosine(u, f[None]).mean(1),
        "update_projection_fraction": np.abs(cosine(u, f[None])).mean(1),
        "final_projection_signed": along.mean(1),
        "final_projection_std": along.std(1),
        "final_norm_fraction": (along / norms[-1]).mean(1),
        "update_correlation": directions @ directions.T,
        "participation_ratio": participation_ratio((singular**2).sum(1), (singular**4).sum(1)),
        "participation_ratio_unit": participation_ratio(spread.sum(1), (spread**2).sum(1)),
        "variance_top1": singular[:, 0] ** 2 / (singular**2).sum(1),
    }
    for name, values in expected.items():
        assert record.variable(name).values == pytest.approx(values, rel=1e-4, abs=1e-5), name
    leading = record.variable("singular_values").values
    assert leading == pytest.approx(singular[:, : leading.shape[1]], rel=1e-4, abs=1e-4)
    assert (record.variable("drift_cosine").dropna("layer", how="all").sel(gap=2)[2:].notnull()).all()
    assert record.variable("drift_cosine").sel(gap=2)[3] == pytest.approx(cosine(h[4], h[2]).mean(), abs=1e-5)


# ---- identities


def test_contributions_sum_to_the_final_state(record):
    assert float(record.variable("final_norm_fraction").sum()) == pytest.approx(1, abs=1e-6)
    assert float(record.variable("final_projection_signed").sum()) == pytest.approx(
        float(record.norm_mean.sel(site=record.last)), rel=1e-6
    )
    assert record.final_share(0, record.last) == pytest.approx(
        1 - float(record.variable("final_norm_fraction").sel(site=-1)), abs=1e-6
    )


def test_drift_over_one_layer_is_the_cosine_of_input_and_output(record):
    drift = record.variable("drift_cosine").sel(gap=1).values
    assert np.isnan(drift[0])  # the embedding is never used
    assert drift[1:] == pytest.approx(record.cosine_input_output.values[1:])


def test_update_correlation_is_symmetric_with_unit_diagonal(record):
    matrix = record.update_correlation.values
    assert matrix == pytest.approx(matrix.T)
    assert np.diag(matrix) == pytest.approx(1)


def test_one_token_obeys_the_law_of_cosines(model):
    """|h_l-1|^2 = |h_l|^2 + |u|^2 - 2 <h_l, u>: three figures of one pair of vectors, here of one token."""
    corpus = random_corpus(((6, 1), (5, 1)))
    single = replace(corpus, texts=corpus.texts)
    record = record_of(loaded(model), single)
    one = record.data.isel(prompt=0)
    norm, ratio = one["norm"].values, one["update_ratio"].values
    update = ratio * norm[1:]
    alignment, kept = one["update_alignment"].values, one["cosine_input_output"].values
    assert norm[1:] ** 2 == pytest.approx(norm[:-1] ** 2 + update**2 + 2 * alignment * norm[:-1] * update, rel=1e-5)
    assert kept == pytest.approx((norm[:-1] + alignment * update) / norm[1:], rel=1e-5, abs=1e-6)


def test_signed_and_unsigned_alignment_agree_where_all_signs_do():
    """Layers that double the stream: every update points along the final state."""
    subject = loaded(tiny("llama"))
    subject.decoder.layers[:] = [Scaled(2.0)] * LAYERS
    record = record_of(subject)
    assert record.update_cosine_to_final.values == pytest.approx(record.update_projection_fraction.values)
    assert record.update_projection_fraction.values == pytest.approx(1)


# ---- planted layers


def test_idle_layers_move_nothing():
    subject = loaded(tiny("llama"))
    subject.decoder.layers[:] = [Scaled(1.0)] * LAYERS
    record = record_of(subject)
    assert record.update_norm.values == pytest.approx(0)
    assert record.cosine_input_output.values == pytest.approx(1)
    assert record.cosine_to_final.values == pytest.approx(1)
    assert np.ptp(record.participation_ratio.values) == pytest.approx(0, abs=1e-9)
    assert record.update_correlation.values == pytest.approx(0)  # no update, no direction
    assert record.norm_growth == pytest.approx((0, 0))


@pytest.mark.parametrize(
    ("factor", "kept", "ratio", "alignment"), [(3.0, 1, 2 / 3, 1), (0.5, 1, 1, -1), (-1.0, -1, 2, -1)]
)
def test_a_layer_that_scales_the_stream(factor, kept, ratio, alignment):
    subject = loaded(tiny("llama"))
    subject.decoder.layers[2] = Scaled(factor)
    record = record_of(subject)
    assert float(record.cosine_input_output[2]) == pytest.approx(kept)
    assert float(record.update_ratio[2]) == pytest.approx(ratio)
    assert float(record.update_alignment[2]) == pytest.approx(alignment)
    site = record.participation_ratio.sel(site=slice(1, 2)).values
    assert site[0] == pytest.approx(site[1])


def test_one_massive_token_collapses_the_raw_dimension_only():
    """A layer that adds a huge vector to a single position of a single text, as attention sinks do."""

    class Massive(nn.Module):
        def forward(self, hidden, *_, **__):
            hidden = hidden.clone()
            hidden[-1, -1, 3] += 1e4
            return hidden

    subject = loaded(tiny("llama"))
    subject.decoder.layers[2] = Massive()
    record = record_of(subject, budget=replace(BUDGET, batch_tokens=1000))
    raw, unit, trimmed = (record.variable(f"participation_ratio{kind}") for kind in ("", "_unit", "_trimmed"))
    assert float(raw.sel(site=2)) == pytest.approx(1, abs=0.01)
    assert float(unit.sel(site=2)) > 0.8 * float(unit.sel(site=1))
    assert float(trimmed.sel(site=2)) > 0.8 * float(trimmed.sel(site=1))
    assert record.variable("outlier_tokens").sel(site=[1, 2]).values.tolist() == [0, 1]
    assert float(record.single_token_share.sel(site=2)) == pytest.approx(1, abs=0.05)


# ---- which tokens


@pytest.mark.parametrize("positions", ["completion", "all", "all_but_first"])
def test_positions(model, positions):
    corpus = random_corpus(LENGTHS)
    record = record_of(loaded(model), corpus, replace(BUDGET, positions=positions))
    states = own_states(model, corpus, positions)
    assert int(record.data["scored_tokens"].sum()) == states.shape[1]
    assert record.norm_mean.values == pytest.approx(np.linalg.norm(states, axis=-1).mean(1), rel=1e-5)


def test_repeated_tokens_count_only_if_asked_for(model):
    corpus = random_corpus(LENGTHS)
    first = corpus.texts[0]
    stale = replace(first, novel=(True, False, True, False, True))
    corpus = replace(corpus, texts=(stale, *corpus.texts[1:]))
    tokens = [
        int(record_of(loaded(model), corpus, replace(BUDGET, score_repeated=score)).data["scored_tokens"][0])
        for score in (False, True)
    ]
    assert tokens == [3, 5]


def test_a_corpus_without_tokens_is_refused(model):
    corpus = random_corpus(LENGTHS)
    empty = replace(corpus, texts=tuple(replace(text, novel=(False,) * len(text.novel)) for text in corpus.texts))
    with pytest.raises(UserError, match="fewer than two tokens to measure; make it again"):
        record_of(loaded(model), empty)


def test_a_state_that_is_not_finite_is_refused():
    subject = loaded(tiny("llama"))
    subject.decoder.layers[2] = Scaled(float("nan"))
    with pytest.raises(UserError, match="the state at site 2 of prompt p0 is not finite"):
        record_of(subject)


# ---- streaming and resampling


@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(len(LENGTHS))), batch_tokens=st.sampled_from([16, 32, 1000]))
def test_neither_the_order_of_prompts_nor_the_batches_matter(model, record, order, batch_tokens):
    corpus = random_corpus(LENGTHS)
    shuffled = replace(corpus, texts=tuple(corpus.texts[index] for index in order))
    again = record_of(loaded(model), shuffled, replace(BUDGET, batch_tokens=batch_tokens))
    for name, array in record.summary().items():
        assert again.variable(name).values == pytest.approx(array.values, rel=1e-3, abs=1e-4, nan_ok=True), name


def test_an_interrupted_measurement_resumes(model, record, tmp_path):
    def stop_at_a_cloud(done, total, what):
        if what == "depths, all tokens" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_of(loaded(model), sweep=Sweep(tmp_path, stop_at_a_cloud))
    shards = len(list(tmp_path.iterdir()))
    again = record_of(loaded(model), sweep=Sweep(tmp_path))
    assert 3 < shards < len(list(tmp_path.iterdir()))
    assert again.summary().equals(record.summary())


def test_a_resample_is_the_measurement_of_its_prompts(model, record):
    """Figures that need no centre are exactly those of a corpus in which prompts are repeated."""
    corpus = random_corpus(LENGTHS)
    resample = record.resamples[0]
    draws = resample._draw.draws.astype(int)
    texts = [text for text, times in zip(corpus.texts, draws, strict=True) for _ in range(times)]
    repeated = replace(corpus, texts=tuple(replace(text, id=f"{text.id}-{i}") for i, text in enumerate(texts)))
    again = record_of(loaded(model), repeated)
    assert sorted(draws) != [1] * len(LENGTHS)
    for name in ("norm_mean", "norm_std", "norm_max", "update_ratio", "update_correlation", "final_norm_fraction"):
        assert resample.variable(name).values == pytest.approx(again.variable(name).values, rel=1e-4, abs=1e-5), name


def test_a_record_of_figures_says_what_it_lacks(record):
    figures = ResidualGeometry(record.summary()[["norm_mean"]].assign_attrs(record.data.attrs))
    assert figures.norm_mean.equals(record.norm_mean)
    with pytest.raises(NotApplicable, match="holds no participation_ratio"):
        _ = figures.participation_ratio
    assert not figures.resamples
