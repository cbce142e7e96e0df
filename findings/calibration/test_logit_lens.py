"""Known answers of the logit lens: of models, its record, and the published figures against each other."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from findings.calibration.lens_cases import logits_of
from lab import published
from lab.corpora.corpus import Corpus, Text
from lab.corpora.token_classes import TOKEN_TYPES
from lab.errors import NotApplicable, UserError
from lab.experiments.layers.logit_lens import Budget, LogitLens, measure
from lab.records import Record
from lab.residual.lens import Lens
from lab.residual.lens_readings import update_similarity
from lab.statistics.lens_figures import Tokens, _matched_difference, _surprisal_figures, lens_figures
from lab.store import Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import ARCHITECTURES, LAYERS, VOCABULARY, tiny

pytestmark = pytest.mark.calibration

ALL = Budget(prompts=None, tokens=None, stride=1, batch_tokens=32)


# ---- readings of models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_slot_is_the_models_own_output(architecture):
    model = tiny(architecture)
    record, corpus = record_of(model), corpus_of()
    expected = [own_log_probabilities(model, text) for text in corpus.texts]
    found = record.data["target_log_probability"].values[-1]
    np.testing.assert_allclose(found, np.concatenate([targets for targets, _ in expected]), atol=2e-4)
    np.testing.assert_array_equal(record.data["rank"].values[-1] == 0, np.concatenate([top for _, top in expected]))


def own_log_probabilities(model, text):
    """Log-probability of each completion token, and whether it is the argmax, by the model's own forward."""
    ids = torch.tensor([text.prompt_ids + text.completion_ids])
    with torch.no_grad():
        log_p = model(ids).logits[0].float().log_softmax(-1)[len(text.prompt_ids) - 1 : -1]
    targets = torch.tensor(text.completion_ids)
    return log_p[range(len(targets)), targets].numpy(), (log_p.argmax(-1) == targets).numpy()


def test_layers_that_do_nothing_leave_all_slots_alike():
    found = record_of(without_updates(tiny("llama"))).data
    for name in ("rank", "entropy", "target_log_probability", "bfloat16_rank", "residual_norm"):
        values = found[name].values
        np.testing.assert_array_equal(values, np.broadcast_to(values[0], values.shape))
    assert found["kl"].values.max() <= 1e-5
    assert found["step_kl"].values.max() <= 1e-5


def without_updates(model):
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


def test_scaling_the_stream_changes_nothing():
    decoder = Decoder(tiny("llama"))
    states, targets = logits_of(4, (2, 7, 32), scale=10), torch.arange(7)
    plain, scaled = Lens(decoder).read(states, targets), Lens(decoder).read(3 * states, targets)
    torch.testing.assert_close(plain.mid_rank, scaled.mid_rank)
    torch.testing.assert_close(plain.entropy, scaled.entropy, atol=1e-3, rtol=1e-3)


def test_renaming_the_vocabulary_changes_nothing():
    permutation = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    model, renamed = tiny("llama", tie_word_embeddings=False), tiny("llama", tie_word_embeddings=False)
    renamed.lm_head.weight[permutation] = model.lm_head.weight.clone()
    renamed.model.embed_tokens.weight[permutation] = model.model.embed_tokens.weight.clone()
    plain, other = record_of(model).data, record_of(renamed, corpus_of(rename=permutation)).data
    for name in ("rank", "kl", "entropy"):
        np.testing.assert_allclose(other[name], plain[name], atol=1e-4)


def planted(layer):
    """A model whose layers do nothing, except that one of them adds the unembedding of the next token, tenfold."""
    model = without_updates(tiny("llama", hidden_size=VOCABULARY + 3, head_dim=8, tie_word_embeddings=True))
    nn.init.orthogonal_(model.model.embed_tokens.weight)
    model.model.norm.weight.fill_(1)
    decoder = Decoder(model)
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def reveal(module, args, output):
        following = seen[-1].roll(-1, dims=1)
        return output + 10 * model.model.embed_tokens.weight[following[: len(output)]]

    decoder.layers[layer].register_forward_hook(reveal)
    return decoder


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_a_planted_prediction_is_found_at_its_layer(layer):
    # One text at a time: the hook reads the ids of the forward pass that the layer belongs to.
    record = record_of(planted(layer), budget=Budget(prompts=None, tokens=None, stride=1, batch_tokens=1))
    before, after = record.top1.sel(slot=slice(None, layer - 1)), record.top1.sel(slot=slice(layer, None))
    assert float(before.max()) <= 0.1
    assert float(after.min()) == 1
    ever = record.data["rank"].values[: layer + 1].max(axis=0) >= 10
    crystallization = lens_figures(record.data)["crystallization_histogram"]
    assert float(crystallization.sel(slot=layer)) >= ever.sum() > 0


def test_a_tied_embedding_reads_its_own_token():
    record = record_of(planted(2), corpus_of(repeating=True))
    assert record.repeat_share > 0.2
    assert float(record.top1.sel(slot=-1)) == pytest.approx(record.repeat_share)


def test_update_similarity_of_planted_updates():
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    states = torch.stack([torch.zeros(1, 2), first, first + second, first])
    found = update_similarity(states)[:, 0]
    assert math.isnan(found[0])
    assert found[1:].tolist() == pytest.approx([math.sqrt(0.5), -1])


# ---- the measured record


def corpus_of(lengths=((7, 5), (4, 9), (9, 3)), seed=0, rename=None, repeating=False):
    """Random texts with so many prompt and completion tokens."""
    generator = np.random.default_rng(seed)
    texts = []
    for index, (prompt, completion) in enumerate(lengths):
        ids = generator.integers(1, VOCABULARY, size=prompt + completion)
        if repeating:
            ids[prompt + 1 :: 2] = ids[prompt : prompt + len(ids[prompt + 1 :: 2]) * 2 : 2]
        if rename is not None:
            ids = rename.numpy()[ids]
        ids = tuple(ids.tolist())
        category = "reasoning" if index % 2 else "factual"
        texts.append(Text(f"p{index}", category, ids[:prompt], ids[prompt:], (2, prompt), (True,) * completion))
    return Corpus("tiny", tuple(texts), None, {}, {}, ("factual", "reasoning"))


def subject_of(model):
    """What `measure` needs of a loaded subject; tokens decode to numbers, words and dots in turn."""
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    words = ("7", " word", " the", ".", "\n")
    return SimpleNamespace(
        decoder=decoder,
        tokenizer=SimpleNamespace(decode=lambda ids: words[ids[0] % len(words)]),
        facts=SimpleNamespace(vocabulary=VOCABULARY, tied=decoder.model.config.tie_word_embeddings),
    )


def record_of(model, corpus=None, budget=ALL, sweep=None):
    data = measure(subject_of(model), corpus or corpus_of(), budget, sweep or Sweep())
    attrs = {"subject": "tiny", "source": "measured", "condition": "full-float32"}
    return LogitLens(data.assign_attrs(attrs, provenance='{"settings": ' + data.attrs["settings"] + "}"))


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def record(model):
    return record_of(model)


def test_batches_do_not_matter(model, record):
    alone = record_of(model, budget=Budget(prompts=None, tokens=None, stride=1, batch_tokens=1))
    for name, values in record.data.items():
        np.testing.assert_allclose(alone.data[name], values, atol=2e-4, err_msg=name)


def test_strided_tokens_and_all_numbers_are_read(model, record):
    strided = record_of(model, budget=Budget(prompts=2, tokens=6, stride=3, batch_tokens=32)).data
    places = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]  # 5 tokens of the first text, 6 of the second
    regular = [0, 3, 5, 8]
    numbers = [place for place in places if TOKEN_TYPES[record.data["token_type"].values[place]] == "number"]
    assert set(numbers) - set(regular)
    expected = sorted({*regular, *numbers})
    np.testing.assert_allclose(strided["entropy"], record.data["entropy"][:, expected], atol=2e-4)
    assert strided["in_sample"].values.tolist() == [place in regular for place in expected]
    assert int(strided["scored_tokens"].sum()) == len(expected)


def test_numbers_between_the_steps_count_for_their_class_only(model, record):
    strided = record_of(model, budget=Budget(prompts=None, tokens=None, stride=3, batch_tokens=32))
    regular = strided.data["rank"].values[:, strided.data["in_sample"].values > 0]
    np.testing.assert_allclose(strided.top1, (regular < 1).mean(axis=1))
    assert int(strided.variable("scored_token_count")) == regular.shape[1] == 2 + 3 + 1
    np.testing.assert_allclose(strided.type_rank("number"), record.type_rank("number"))


def test_an_interrupted_measurement_resumes(model, record, tmp_path):
    budget = Budget(prompts=None, tokens=None, stride=1, batch_tokens=1)

    def stop(done, total, what):
        if done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_of(model, budget=budget, sweep=Sweep(tmp_path, stop))
    assert len(list(tmp_path.iterdir())) == 1
    resumed = record_of(model, budget=budget, sweep=Sweep(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    np.testing.assert_allclose(resumed.data["entropy"], record.data["entropy"], atol=2e-4)


def test_nan_is_refused_with_slot_and_prompt():
    broken = tiny("llama")
    decoder = Decoder(broken)
    broken.model.layers[3].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="no finite probability at slot 3 on prompt p"):
        record_of(decoder)


def test_a_corpus_without_scored_tokens_is_refused(model):
    with pytest.raises(UserError, match="no scored token"):
        record_of(model, Corpus("tiny", (), None, {}, {}, ()))


def test_record_survives_the_store(record, tmp_path):
    record.data.to_netcdf(tmp_path / "record.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "record.nc", engine="scipy") as stored:
        xr.testing.assert_allclose(LogitLens(stored.load()).figures, record.figures)


def test_figures_bear_the_published_names_units_and_dimensions(record):
    original = published.dataset("logit_lens")
    assert set(original.data_vars) <= set(record.figures.data_vars)
    for name, figure in original.items():
        assert record.figures[name].dims == figure.dims, name
        assert record.figures[name].attrs["unit"] == figure.attrs["unit"], name


def test_both_settings_hold_the_same_figures(record):
    coarse = record.published_setting
    assert coarse.published_setting is coarse
    assert set(coarse.figures) <= set(record.figures) | {"lens_tied_fraction"}
    ranks = record.data["bfloat16_rank"]
    assert float(coarse.top1.sel(slot=2)) == pytest.approx(float((ranks.sel(slot=2) < 1).mean()))


def test_a_resample_holds_the_figures_of_the_drawn_prompts(record):
    drawn = LogitLens(record.data, np.array([1, 1, 0]))
    counts = record.data["scored_tokens"].values
    first = np.arange(counts[0])
    second = counts[0] + np.arange(counts[1])
    index = np.concatenate([second, second, first])
    np.testing.assert_allclose(drawn.median_rank, np.median(record.data["rank"].values[:, index], axis=1))
    np.testing.assert_allclose(drawn.top1, (record.data["rank"].values[:, index] < 1).mean(axis=1))
    assert drawn.figures["prompt_count_by_category"].values.tolist() == [1, 2]
    assert drawn.figures["completion_tokens_by_category"].values.tolist() == [counts[0], 2 * counts[1]]


def test_resamples_draw_the_same_prompts_as_other_records(record):
    counts = record.data["scored_tokens"]
    other = Record(xr.Dataset({"index": ("prompt", np.arange(len(counts)))}))
    for ours, theirs in zip(record.resamples[:20], other.resamples, strict=False):
        expected = counts.values[theirs.data["index"].values].sum()
        assert int(ours.figures["scored_token_count"]) == expected


def test_depth_helpers():
    record = LogitLens(published.dataset("logit_lens"))
    assert (record.slot_at(0), record.slot_at(13 / 36), record.slot_at(1)) == (-1, 12, 35)
    assert (float(record.depth.sel(slot=-1)), float(record.depth.sel(slot=35))) == (0, 1)
    assert record.early(record.top1).slot.values.tolist() == list(range(18))
    assert record.late(record.top1).slot.values.tolist() == list(range(18, 36))
    record.require_depth(12, 0, 13 / 36)
    with pytest.raises(NotApplicable, match=r"depths 0\.00 to 0\.36"):
        record.require_depth(13, 0, 13 / 36)


# ---- the published figures agree with each other


@pytest.fixture(scope="module")
def figures():
    return published.dataset("logit_lens")


def test_published_counts_add_up(figures):
    tokens = int(figures["scored_token_count"])
    assert int(figures["token_type_count"].sum()) == tokens
    assert int(figures["completion_tokens_by_category"].sum()) == tokens
    assert int(figures["crystallization_histogram"].sum()) == tokens
    assert int(figures["number_tokens_by_category"].sum()) == int(figures["token_type_count"].sel(token_type="number"))
    np.testing.assert_allclose(figures["hurt_count"] / tokens, figures["hurt_fraction"], rtol=1e-4)


def test_published_means_follow_from_the_published_parts(figures):
    histogram, weights = figures["crystallization_histogram"], figures["token_type_count"]
    mean = float((histogram * histogram.slot).sum() / histogram.sum())
    assert mean == pytest.approx(float(figures["crystallization_layer_mean"]), abs=1e-3)
    spread = float((histogram * (histogram.slot - mean) ** 2).sum() / histogram.sum()) ** 0.5
    assert spread == pytest.approx(float(figures["crystallization_layer_std"]), abs=1e-3)
    by_type = (figures["token_type_mean_rank"] * weights).sum("token_type") / weights.sum()
    np.testing.assert_allclose(by_type, figures["lens_mean_rank"], rtol=1e-3)


def test_differences_at_equal_surprisal_do_not_see_what_surprisal_explains():
    """A value that grows with the tenth of surprisal, and is 3 larger in a group found mostly at high surprisal."""
    generator = np.random.default_rng(0)
    tenth = generator.permutation(np.repeat(np.arange(10), 100))
    surprisal = tenth + generator.uniform(0, 0.5, 1000)  # so no tenth ends within another's values
    group = generator.uniform(size=1000) < (tenth + 1) / 12
    values = 10.0 * tenth + 3 * group
    assert values[group].mean() - values[~group].mean() > 20
    assert _matched_difference(values, group, surprisal) == pytest.approx(3)
    assert math.isnan(_matched_difference(values[:0], group[:0], surprisal[:0]))


@pytest.mark.parametrize("function_words", [0, 40, 400])
def test_numbers_are_matched_with_content_words_alone(function_words):
    """Numbers crystallize at slot 5 and content words of the same surprisals at 2; function words change nothing."""
    crystallized = {"number": 5, "content_word": 2, "function_word": 0}
    counts = {"number": 40, "content_word": 40, "function_word": function_words}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    slots = np.arange(7)[:, None] - 1
    data = xr.Dataset(
        {
            "rank": (("slot", "token"), np.where(slots < [crystallized[kind] for kind in kinds], 50, 0)),
            "target_log_probability": (
                ("slot", "token"),
                np.broadcast_to(np.concatenate([-np.linspace(0, 1, n) for n in counts.values()]), (7, len(kinds))),
            ),
            "token_type": ("token", [TOKEN_TYPES.index(kind) for kind in kinds]),
            "in_sample": ("token", np.ones(len(kinds))),
        }
    )
    delay = _surprisal_figures(Tokens(data, np.arange(len(kinds))))["number_delay_at_equal_surprisal"]
    assert float(delay) == pytest.approx(3)
