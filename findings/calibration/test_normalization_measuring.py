"""Known answers of the T-15 measurement as a whole, on tiny decoders, of its record and of timings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from findings.calibration.normalization_cases import BUDGET, LENGTHS, record_of
from lab import published
from lab.errors import NotApplicable, UserError
from lab.experiments.surgery.measuring import normalization_latency
from lab.experiments.surgery.measuring.normalization import parts
from lab.experiments.surgery.normalization import EXPERIMENT, Normalization
from lab.normalization import latency
from lab.normalization.settings import NORM_TYPES, Bench
from lab.records import variable
from lab.store import Sweep
from lab.subjects.tiny import LAYERS, random_corpus, tiny

pytestmark = pytest.mark.calibration

NOTHING = 1e-5  #: nat; programs that run in blocks of other sizes differ in the last bits of float32


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def record(request):
    return record_of(tiny(request.param))


def test_a_record_is_whole(record):
    assert not [name for name, array in record.data.data_vars.items() if np.isnan(array.values).all()]
    assert all(array.attrs["unit"] and array.attrs["description"] for array in record.data.data_vars.values())
    assert record.data.sizes["layer"] == LAYERS
    assert "group_norm_5" not in record.variants  # 32 channels do not divide by 5
    assert set(record.data.data_vars) - {"site_frozen_scale_loss"} >= {"site_norm_removed_loss", "recovery_loss"}
    assert EXPERIMENT.tolerance("replacement_loss").reason


def test_what_changes_nothing_costs_nothing(record):
    assert abs(record.damage("rms_norm")) < NOTHING
    assert record.variable("restored_loss").equals(record.variable("baseline_loss"))
    assert record.uniform_loss == pytest.approx(math.log(89))
    assert record.variable("restored_loss").sizes == {"prompt": 6}


def test_only_joint_group_norm_looks_ahead(record):
    leaks = {name: record.leak(name) for name in record.variants}
    joint = {"group_norm_1", "group_norm_4", "group_norm_8"}
    assert set(record.joint_groups) == joint
    assert min(leaks[name] for name in joint) > 1e-3
    assert {leak for name, leak in leaks.items() if name not in joint and math.isfinite(leak)} == {0.0}


def test_single_sites_and_single_layers_agree(record):
    """A layer's losses differ between sites, and every site of a layer matters."""
    single = record.mean("site_norm_removed_loss") - record.baseline_loss
    assert single.sizes == {"site": len(record.sites), "layer": LAYERS}
    assert float(abs(single).min()) > NOTHING
    assert float(abs(record.removed_damage).min()) > NOTHING


def plain_losses(model, record, corpus):
    """Loss of each scored text by the model's own forward [prompt]."""
    texts = {text.id: text for text in corpus.texts}
    found = []
    for prompt in record.data["prompt_id"].values:
        ids = torch.tensor([texts[str(prompt)].prompt_ids + texts[str(prompt)].completion_ids])
        first = len(texts[str(prompt)].prompt_ids)
        logits = model(ids, use_cache=False).logits[0, first - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, first:])))
    return found


def test_losses_equal_those_of_a_model_whose_modules_are_exchanged():
    """Layer 3 without its two norms, and PyTorch's own layer norm everywhere, put into the model by hand."""
    model, corpus = tiny("llama"), random_corpus(LENGTHS)
    record = record_of(model, replace(BUDGET, training=None), corpus)
    block, own = model.model.layers[3], dict(model.model.layers[3].named_children())
    block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
    found = record.variable("layer_norm_removed_loss").sel(layer=3)
    np.testing.assert_allclose(found, plain_losses(model, record, corpus), rtol=1e-4)
    block.input_layernorm = own["input_layernorm"]
    found = record.variable("site_norm_removed_loss").sel(layer=3, site="pre_mlp")
    np.testing.assert_allclose(found, plain_losses(model, record, corpus), rtol=1e-4)
    block.post_attention_layernorm = own["post_attention_layernorm"]

    def layer_norm(norm):
        made = torch.nn.LayerNorm(32, eps=norm.variance_epsilon, bias=False)
        made.weight.data.copy_(norm.weight)
        return made

    for layer in model.model.layers:
        layer.input_layernorm = layer_norm(layer.input_layernorm)
        layer.post_attention_layernorm = layer_norm(layer.post_attention_layernorm)
    model.model.norm = layer_norm(model.model.norm)
    with torch.no_grad():
        by_hand = plain_losses(model, record, corpus)
    np.testing.assert_allclose(record.variable("replacement_loss").sel(variant="layer_norm"), by_hand, rtol=1e-4)


def test_head_norms_of_models_that_have_none():
    record = record_of(tiny("llama"), replace(BUDGET, training=None, sites_separately=False, removals=("identity",)))
    assert record.loss_of("layer_norm_all") == record.loss_of("layer_norm")
    for ask in (record.require_head_norms, lambda: record.head_norm_damage, lambda: record.amplification("key")):
        with pytest.raises(NotApplicable, match="no query and key norms"):
            ask()
    with pytest.raises(NotApplicable, match="holds no recovery_loss"):
        record.recovered("layer_norm")


def test_head_norms_of_models_that_have_them():
    model = tiny("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.fill_(3.0)
        layer.self_attn.k_norm.weight.data.fill_(0.5)
    record = record_of(model, replace(BUDGET, training=None, sites_separately=False, removals=("identity",)))
    rms = record.mean("query_rms_median").sel(condition="with_qk_norm")
    np.testing.assert_allclose(rms.values, 3, rtol=1e-3)
    np.testing.assert_allclose(record.mean("key_rms_median").sel(condition="with_qk_norm").values, 0.5, rtol=1e-3)
    # The first layer's input is the same in the intact model and in the one without such norms.
    raw, without = (record.extremes("key").sel(condition=name) for name in ("raw_intact", "without_qk_norm"))
    assert float(raw[0]) == pytest.approx(float(without[0]), rel=1e-6)
    assert not np.allclose(raw[1:], without[1:], rtol=1e-3)
    assert abs(record.head_norm_damage) > NOTHING


def test_a_layer_that_writes_nothing_needs_no_norms():
    model = tiny("llama")
    block = model.model.layers[1]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    record = record_of(model, replace(BUDGET, training=None))
    for damage in (record.removed_damage, record.frozen_damage):
        assert abs(float(damage.sel(layer=1))) < NOTHING
        assert (abs(damage.drop_sel(layer=1)) > NOTHING).all()
    # Nothing is written, so nothing changes in the stream either.
    np.testing.assert_allclose(record.jumps[1], 1, rtol=1e-6)


def test_a_planted_jump_of_the_first_token_is_found():
    """One layer adds a huge element to the token that is first in every text, and to no other."""
    model, first, layer = tiny("llama"), 3, 2

    def plant(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        states[:, 0, 7] += 1e4

    model.model.layers[layer].register_forward_hook(plant)
    corpus = random_corpus(LENGTHS)
    begun = [replace(text, prompt_ids=(first, *text.prompt_ids[1:])) for text in corpus.texts]
    light = replace(BUDGET, training=None, sites_separately=False, removals=("identity",), groups=(1,))
    record = record_of(model, light, replace(corpus, texts=tuple(begun)))
    assert record.jump_layer == layer
    assert record.jump > 20
    assert record.token_jump < 10
    assert record.first_token_excess > 20
    assert record.top_element_share > 0.9


def test_texts_that_calibrate_are_not_scored():
    corpus = random_corpus(LENGTHS)
    taken = parts(corpus, BUDGET)
    assert not set(taken.scored.prompts) & set(taken.calibration.prompts)
    assert set(taken.scored.prompts) | set(taken.calibration.prompts) == {text.id for text in corpus.texts}
    few = parts(corpus, replace(BUDGET, prompts=2, calibration_prompts=1, tokens=3))
    assert (len(few.scored.texts), len(few.calibration.texts)) == (2, 1)
    assert few.scored.scored_tokens.tolist() == [3, 3]
    with pytest.raises(UserError, match="3 texts; 4 at least"):
        parts(random_corpus(LENGTHS[:3]), BUDGET)


# ---- the record


def broken(loss):
    arrays = {
        "baseline_loss": variable((), 0.5, "nat/token", ""),
        "uniform_loss": variable((), 4.5, "nat/token", ""),
        "replacement_loss": variable("variant", [2.5, loss], "nat/token", ""),
    }
    named = {"subject": "x", "source": "measured", "condition": "c"}
    return Normalization(xr.Dataset(arrays, {"variant": ["group_norm_8", "identity"]}, named))


def test_damage_of_a_model_that_overflows():
    record = broken(math.nan)
    assert record.damage_fraction("group_norm_8") == 0.5
    assert record.damage("identity") == record.ratio("identity") == math.inf
    assert math.isnan(record.loss_of("identity"))
    with pytest.raises(NotApplicable, match="no model with batch_norm"):
        record.damage("batch_norm")


def test_above_a_uniform_guess_a_share_is_one():
    assert broken(1e9).share_of_a_guess("group_norm_8") == 0.5
    assert broken(4.5).share_of_a_guess("identity") == 1
    assert broken(9.0).share_of_a_guess("identity") == broken(math.nan).share_of_a_guess("identity") == 1


def test_joint_group_norms_have_a_twin_per_token(record):
    """Of one group per token, layer norm is the name; of several, the twin was measured under its own."""
    twins = {name: record.token_twin(name) for name in record.joint_groups}
    assert twins == {
        "group_norm_1": "layer_norm",
        "group_norm_4": "group_norm_4_token",
        "group_norm_8": "group_norm_8_token",
    }
    assert set(twins.values()) <= set(record.variants)


def test_published_figures_follow_from_each_other():
    record = Normalization(published.dataset("normalization"))
    ratios = record.variable("replacement_loss_ratio").values
    np.testing.assert_allclose([record.ratio(name) for name in record.variants[:-1]], ratios[:-1], rtol=1e-3)
    np.testing.assert_allclose(record.removed_ratio, record.variable("layer_norm_removed_loss_ratio"), rtol=1e-3)
    np.testing.assert_allclose(
        record.variable("token_abs_mean") / record.variable("token_std"), record.mean_to_std, rtol=1e-3
    )
    # What one norm is given is what the layer before it wrote.
    np.testing.assert_allclose(record.at("norm_input_std")[1:], record.layer_output_std[:-1], rtol=1e-3)
    assert record.uniform_loss == pytest.approx(math.log(151_936), abs=1e-4)


def test_resamples_keep_losses_and_baseline_together(record):
    resample = record.resamples[0]
    assert abs(resample.damage("rms_norm")) < NOTHING
    assert resample.baseline_loss != record.baseline_loss


# ---- times


def test_disturbed_timings_do_not_count():
    assert latency.agreed(1.0, 1.1) == 1.0
    assert math.isnan(latency.agreed(1.0, 1.3))
    times = np.ones((2, 1, 3))
    times[0, 0] = [1, 9, 2]  # the middle length took longer than the longest
    times[1, 0] = [1, 1.1, 1]
    record = Normalization(
        xr.Dataset(
            {"total_latency": variable(("norm_type", "hidden_size", "sequence_length"), times, "ms", "")},
            {"norm_type": ["a", "b"], "hidden_size": [8], "sequence_length": [1, 2, 4]},
            {"subject": "x", "source": "measured", "condition": "c"},
        )
    )
    ratio = record.latency_ratio("a", "b").values[0]
    assert np.isnan(ratio[1])
    assert ratio[[0, 2]].tolist() == [1, 2]


@pytest.mark.parametrize("norm_type", [name for name in NORM_TYPES if name != "rms_norm_compiled"])
def test_every_norm_can_be_timed(norm_type):
    bench = Bench(calls=3, warmup=1)
    forward, backward = latency.measured(norm_type, 64, 16, torch.device("cpu"), torch.float32, bench)
    assert forward > 0 or math.isnan(forward)
    assert backward > 0 or math.isnan(backward)
    x = latency.inputs(norm_type, 64, 16, torch.device("cpu"), torch.float32)
    y = latency.module(norm_type, 64)(x)
    if norm_type == "rms_norm_eager":
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,), eps=latency.EPS))
    assert y.shape == x.shape


def test_every_shape_is_compiled_for_itself(monkeypatch):
    """Also after others: one graph each, no size left open."""
    graphs, compile_ = [], torch.compile

    def note(graph, inputs):
        graphs.append([size for tensor in inputs for size in tensor.shape])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda norm, **options: compile_(norm, backend=note, **options))
    for width, length in ((8, 1), (8, 4), (8, 6), (12, 6)):
        bench = Bench(calls=1, compiled_warmup=1)
        latency.measured("rms_norm_compiled", width, length, torch.device("cpu"), torch.float32, bench)
    assert len(graphs) == 4
    assert all(type(size) is int for sizes in graphs for size in sizes)


def test_a_compiler_that_does_not_work_costs_its_own_times_only(monkeypatch):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", lambda norm, **options: broken)
    monkeypatch.setattr(normalization_latency, "measured_shape", lambda *_: (1.0, 2.0))
    latency.why_not_compiled.cache_clear()
    bench = Bench(widths=(8,), lengths=(2,), norm_types=("rms_norm_compiled", "layer_norm", "rms_norm_eager"))
    with pytest.warns(RuntimeWarning, match=r"cannot compile here \(Failed to find C compiler.\)"):
        times = normalization_latency._times(torch.device("cpu"), torch.float32, bench, Sweep())
    latency.why_not_compiled.cache_clear()
    assert np.isnan(times["total_latency"][0]).all()
    assert (times["total_latency"][1:] == 3).all()
    dims = normalization_latency.DIMENSIONS
    data = xr.Dataset({"total_latency": variable(dims, times["total_latency"], "ms", "")}, _labels(bench))
    record = Normalization(data.assign_attrs(subject="x", source="measured", condition="c"))
    assert record.latency_ratio("layer_norm", "rms_norm_eager").values.tolist() == [[1]]
    with pytest.raises(NotApplicable, match="no times of rms_norm_compiled"):
        record.latency_ratio("layer_norm", "rms_norm_compiled")


def _labels(bench):
    return normalization_latency.coords(torch.device("cuda"), bench)


def test_unknown_norms_cannot_be_timed():
    with pytest.raises(UserError, match="unknown norm 'batchnorm'"):
        latency.module("batchnorm", 8)
