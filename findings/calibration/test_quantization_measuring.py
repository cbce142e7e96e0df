"""Known answers of the T-11 measurement as a whole, on tiny decoders with planted layers."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr

from lab import published
from lab.errors import NotApplicable, UserError
from lab.experiments.systems.measuring.quantization_weights import expected_gigabytes
from lab.experiments.systems.measuring.quantization_workbench import samples
from lab.experiments.systems.quantization import Budget, Quantization, measure
from lab.quantization import footprint, libraries
from lab.quantization.libraries import GGUF
from lab.quantization.recipes import first_last_protected
from lab.quantization.whole_models import LIBRARIES
from lab.store import Sweep
from lab.subjects.tiny import LAYERS, loaded, random_corpus, tiny

pytestmark = pytest.mark.calibration

BUDGET = Budget(None, None, None, 1, None, (8, 3, 2), 4, group_sizes=(32,), footprints=False, head_dtype="float32")
LENGTHS = ((7, 15), (4, 9), (9, 13), (3, 12), (5, 11), (4, 14))


NOTHING = 1e-5  #: nat; programs that run in blocks of other sizes differ in the last bits of float32


def model_of(architecture="llama", **changes):
    heads = {"head_dim": 16} if architecture in ("qwen3", "gemma3_text") else {}
    return tiny(architecture, **{"hidden_size": 64, "intermediate_size": 128, **heads, **changes})


def record_of(model, corpus=None, budget=BUDGET):
    data = measure(loaded(model), corpus or random_corpus(LENGTHS), budget, Sweep())
    return Quantization(data.assign_attrs(subject="tiny", source="measured", condition="full-float32"))


@pytest.fixture(scope="module")
def planted():
    """A record of a model whose layer 1 writes nothing, whatever its weights."""
    model = model_of()
    block = model.model.layers[1]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    return record_of(model)


def test_a_layer_that_writes_nothing_loses_nothing(planted):
    for damage in (planted.two_bit_damage, planted.three_bit_damage, planted.true_two_bit_damage):
        assert abs(float(damage.sel(layer=1))) < NOTHING
        assert (abs(damage.drop_sel(layer=1)) > NOTHING).all()
    assert abs(float(planted.knockout_damage.sel(layer=1))) < NOTHING
    assert (abs(planted.matrix_damage.sel(layer=1)) < NOTHING).all()


def test_eight_bits_are_within_three_standard_errors_of_nothing(planted):
    per_text = planted.variable("layer_loss").sel(bits=8) - planted.variable("baseline_loss")
    error = np.asarray(per_text.std("prompt", ddof=1)) / np.sqrt(per_text.sizes["prompt"])
    assert (np.abs(planted.damage(8)) <= 3 * error + 0.01).all()


def test_whole_and_single_layers_agree_where_one_layer_is_left():
    model = model_of(num_hidden_layers=1)
    found = record_of(model)
    assert found.whole_damage(2) == pytest.approx(float(found.damage(2)[0]), abs=1e-7)
    assert found.super_additivity(2) == pytest.approx(1, abs=1e-6)


def test_recipes_of_one_width_equal_the_method(planted):
    assert planted.recipe_damage("uniform_4bit") == pytest.approx(planted.method_damage("rtn_4"), abs=1e-7)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3_text"])
def test_every_architecture_gives_a_whole_record(architecture):
    found = record_of(model_of(architecture))
    assert not [name for name in found.data if "loss" in str(name) and not np.isfinite(found.data[name]).all()]
    assert found.data.sizes["layer"] == LAYERS
    assert float(abs(found.weight_error_ratio - 1).max()) < 0.4
    assert all(variable.attrs["unit"] and variable.attrs["description"] for variable in found.data.data_vars.values())


def test_single_matrices_of_every_other_layer():
    found = record_of(model_of(), budget=replace(BUDGET, matrix_stride=2))
    assert found.matrix_damage.layer.values.tolist() == [0, 2, 4]
    assert (found.matrix_damage.sum("matrix") / found.damage(2)).sizes == {"layer": 3}


def test_texts_of_recipes_are_others_than_those_of_the_layer_sweep():
    subject = loaded(model_of())
    for budget in (BUDGET, replace(BUDGET, layer_tokens=20, method_tokens=20, matrix_tokens=10)):
        corpus = random_corpus(LENGTHS)
        texts = samples(corpus, subject, budget)
        assert not set(texts.layers.prompts) & set(texts.methods.prompts)
        assert set(texts.matrices.prompts) <= set(texts.layers.prompts)
        unscored = [text.completion_ids for text in corpus.texts if text.id not in texts.methods.prompts]
        assert [text.ids for text in texts.calibration] == unscored


def test_texts_are_completions_without_prompts():
    corpus = random_corpus(((7, 15), (4, 9)))
    layers = samples(corpus, loaded(model_of()), replace(BUDGET, block_tokens=10)).layers
    (text,) = layers.texts
    assert text.ids == corpus.texts[0].completion_ids[:10]
    assert text.targets == tuple(range(1, 10))  # the first token has nothing before it


def test_a_start_token_is_kept_where_prompts_have_one():
    corpus = random_corpus(((7, 15), (4, 9)))
    begun = [replace(text, prompt_ids=(1, *text.prompt_ids[1:])) for text in corpus.texts]
    layers = samples(replace(corpus, texts=tuple(begun)), loaded(model_of()), BUDGET).layers
    assert layers.texts[0].ids == (1, *corpus.texts[0].completion_ids)
    assert layers.texts[0].targets == tuple(range(1, 16))


def test_too_few_texts_are_refused():
    with pytest.raises(UserError, match="too few for two samples"):
        samples(random_corpus(((7, 15),)), loaded(model_of()), BUDGET)


def test_weights_on_a_grid_bar_claims_about_full_precision():
    model = model_of()
    free = record_of(model)
    free.require_full_precision()
    free.require_free_weights("gguf_q4_1")
    stored = copy.deepcopy(model)
    for layer in stored.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = GGUF("Q4_1")(module.weight.data)
    gridded = record_of(stored)
    assert gridded.stored_in_few_bits == 1
    with pytest.raises(NotApplicable, match="stored in 5 bits or fewer before"):
        gridded.require_full_precision()
    with pytest.raises(NotApplicable, match="a grid that it shares"):
        gridded.require_free_weights("gguf_q4_1")
    gridded.require_free_weights("rtn_3", "gguf_q8_0")


def of_rises(rises, tokens, **others) -> Quantization:
    """A record of methods whose losses rise by these amounts on texts of so many tokens, `rtn_8` the first."""
    methods = {"rtn_8": rises, **others}
    losses = {
        "method_baseline_loss": ("method_prompt", np.ones(len(rises))),
        "method_loss": (("method", "method_prompt"), 1 + np.array(list(methods.values()))),
        "method_scored_tokens": ("method_prompt", np.array(tokens)),
    }
    data = xr.Dataset(losses, {"method": list(methods)})
    return Quantization(data.assign_attrs(subject="tiny", source="measured", condition="quick"))


def test_the_interval_of_a_damage_is_students_formula_on_equal_texts():
    rises = np.random.default_rng(0).normal(0.002, 0.01, 30)
    half_width = of_rises(rises, np.full(30, 20)).method_half_width("rtn_8")
    low, high = scipy.stats.t.interval(0.95, 29, rises.mean(), scipy.stats.sem(rises))
    assert half_width == pytest.approx((high - low) / 2)


def test_the_interval_of_few_unequal_texts_covers_the_truth_as_often_as_it_says():
    """Eight texts of 20 to 60 tokens: 94 % of the intervals hold the damage; with 1.96 it would be 90 %."""
    generator = np.random.default_rng(2)
    covered = []
    for _ in range(1000):
        record = of_rises(generator.normal(0.002, 0.01, 8), generator.integers(20, 60, 8))
        low, high = record.damage_interval("rtn_8")
        covered.append(low <= 0.002 <= high)
    assert 0.92 < np.mean(covered) < 0.96


def test_the_interval_of_a_damage_is_the_bootstraps_on_unequal_texts():
    generator = np.random.default_rng(1)
    record = of_rises(generator.normal(0.002, 0.01, 60), generator.integers(5, 60, 60))
    low, high = np.percentile([each.method_damage("rtn_8") for each in record.resamples], (2.5, 97.5))
    assert record.method_half_width("rtn_8") == pytest.approx((high - low) / 2, rel=0.1)


#: four equal texts whose 95 % interval is the mean +- 0.0271: t(3) = 3.182 times sqrt(0.00087 / 3 / 4)
AROUND = np.array([0.0, 0.02, -0.02, 0.01]) - 0.0025


def test_a_limit_inside_the_interval_bars_the_claim_and_one_outside_does_not():
    """Refuted and held are both resolved, however wide the interval is beside the limit."""
    record = of_rises(0.01 + AROUND, [20] * 4)
    assert record.damage_interval("rtn_8") == pytest.approx((0.01 - 0.02717, 0.01 + 0.02717), abs=1e-5)
    words = r"rise of the loss under rtn_8 lies between -0.017 and 0.037 nat on tiny, which does not tell it from 0.005"
    with pytest.raises(NotApplicable, match=words):
        record.require_resolved(0.005, "rtn_8")
    record.require_resolved(0.038, "rtn_8")
    record.require_resolved(-0.018, "rtn_8")
    # its half-width exceeds 0.005, but all of it lies above
    of_rises(0.04 + AROUND, [20] * 4).require_resolved(0.005, "rtn_8")
    # and less than 0.02 may be known of a damage that is within 0.02
    with pytest.raises(NotApplicable, match=r"which does not tell it from 0.02"):
        record.require_resolved(0.02, "rtn_8")


def test_the_worst_of_several_methods_decides():
    """One that is clearly above refutes, whatever the others are; else all must be clearly below."""
    low, near, high = -0.02 + AROUND, 0.01 + AROUND, 0.05 + AROUND
    record = of_rises(near, [20] * 4, low=low, high=high)
    record.require_resolved(0.01, "rtn_8", "low", "high")
    record.require_resolved(0.01, "low")
    with pytest.raises(NotApplicable, match=r"largest rise of the loss under rtn_8, low lies between -0.017 and"):
        record.require_resolved(0.01, "rtn_8", "low")


def test_two_methods_are_compared_on_the_texts_they_share():
    """Each is known to 0.0271, their difference exactly, or as the texts on which they differ tell."""
    record = of_rises(AROUND, [20] * 4, same=AROUND + 0.001, apart=AROUND - 0.003, other=-AROUND + 0.001)
    assert record.method_half_width("same", "rtn_8") == pytest.approx(0, abs=1e-12)
    assert record.damage_interval("apart", "rtn_8") == pytest.approx((-0.003, -0.003))
    assert record.method_half_width("other", "rtn_8") == pytest.approx(2 * record.method_half_width("rtn_8"))
    record.require_resolved_difference(0.002, "same", "rtn_8")
    record.require_resolved_difference(0.002, "apart", "rtn_8")
    for limit in (0.002, 0.03):
        with pytest.raises(
            NotApplicable, match=r"loss under other less that under rtn_8 lies between -0.053 and 0.055"
        ):
            record.require_resolved_difference(limit, "other", "rtn_8")
    record.require_resolved_difference(0.06, "other", "rtn_8")


def test_a_difference_near_the_negative_limit_is_not_resolved():
    record = of_rises(AROUND, [20] * 4, other=np.zeros(4) - 0.03)
    with pytest.raises(NotApplicable, match=r"tell it from -0.03"):
        record.require_resolved_difference(0.03, "other", "rtn_8")
    record.require_resolved_difference(0.002, "other", "rtn_8")


def test_what_texts_resolve_is_not_asked_of_a_draw():
    """Draws of a record that is clear of the limit apply, though many of their own intervals hold it."""
    generator = np.random.default_rng(3)
    record = of_rises(generator.normal(0.0, 0.01, 20), np.full(20, 20))
    limit = record.damage_interval("rtn_8")[1] + 1e-4
    draws = record.resamples
    own = [draw.damage_interval("rtn_8") for draw in draws]
    assert sum(low <= limit <= high for low, high in own) > 100
    for draw in draws:
        draw.require_resolved(limit, "rtn_8")
        draw.require_resolved_difference(limit, "rtn_8", "rtn_8")


def test_published_figures_have_no_interval():
    record = Quantization(published.dataset("quantization"))
    assert record.damage_interval("rtn_8") is None
    record.require_resolved(record.method_damage("rtn_8"), "rtn_8")
    record.require_resolved_difference(0.0, "rtn_8", "gptq_w8a16")
    with pytest.raises(NotApplicable, match="holds no gguf_q8_0"):
        of_rises(AROUND, [20] * 4).damage_interval("gguf_q8_0")


# ---- recipes


def of_recipes(deals=(), **recipes) -> Quantization:
    """A record of recipes by name: their widths, and what each does to the loss; and of random deals."""
    widths, losses = zip(*recipes.values(), strict=True)
    arrays = {
        "method_baseline_loss": ((), 1.0),
        "recipe_bits": (("recipe_layerwise", "layer"), np.array(widths)),
        "recipe_loss": ("recipe", 1 + np.array(losses)),
        "permuted_recipe_loss": ("permutation", 1 + np.array(deals)),
    }
    data = xr.Dataset(arrays, {"recipe_layerwise": list(recipes), "recipe": list(recipes)})
    return Quantization(data.assign_attrs(subject="tiny", source="measured", condition="quick"))


def test_recipes_of_the_same_widths_are_not_compared():
    record = of_recipes(plain=([4, 4, 4], 0.3), last=([4, 4, 5], 0.2), again=([4, 4, 5], 0.2), first=([5, 4, 4], 0.25))
    record.require_different_widths("plain", "last", "first")
    with pytest.raises(NotApplicable, match="last and again give the layers of tiny the same widths"):
        record.require_different_widths("plain", "last", "again")
    with pytest.raises(NotApplicable, match="holds no widths of other"):
        record.require_different_widths("plain", "other")
    assert record.different_recipes == ["plain", "last", "first"]


def test_the_trim_leaves_a_model_of_18_layers_no_protection():
    assert set(first_last_protected(18)) == {4}
    assert first_last_protected(36).tolist() == [4] * 35 + [5]


@pytest.mark.parametrize(("beaten", "deals", "p"), [(20, 20, 1 / 21), (19, 20, 2 / 21), (96, 100, 5 / 101), (0, 4, 1)])
def test_a_recipe_counts_as_one_of_the_deals(beaten, deals, p):
    """Of 20 deals all must be beaten for p <= 0.05, of 100 at least 96; a tie is not beaten."""
    losses = [0.3] * beaten + [0.2] * (deals - beaten)
    assert of_recipes(losses, known=([3, 4, 5], 0.2)).deal_p_value("known") == pytest.approx(p)


@pytest.mark.parametrize(("layers", "first"), [(36, 4), (30, 3), (24, 2), (18, 2)])
def test_the_first_12_percent_of_the_depth_are_whole_layers(layers, first):
    """12 % of the depth: four of the original's 36 layers, and as many as end there in other models."""
    data = xr.Dataset({"layer_loss": ("layer", np.zeros(layers))}, {"layer": np.arange(layers)})
    record = Quantization(data.assign_attrs(subject="tiny", source="measured", condition="quick"))
    assert record.first_layers(0.12).tolist() == [True] * first + [False] * (layers - first)
    assert record.ends == {*range(first), layers - 1}


def test_memory_is_known_of_the_methods_that_were_loaded():
    found = {"stored_memory": ("memory_method", [2.0, 1.0])}
    data = xr.Dataset(found, {"memory_method": ["bfloat16", "bitsandbytes_int8"]})
    record = Quantization(data.assign_attrs(subject="tiny", source="measured", condition="quick"))
    assert record.memory_methods == ["bfloat16", "bitsandbytes_int8"]
    assert record.memory("bitsandbytes_int8") == 1
    with pytest.raises(NotApplicable, match="holds no memory of bitsandbytes_nf4"):
        record.memory("bitsandbytes_nf4")


def test_missing_libraries_are_named(monkeypatch):
    """Their methods are left out of the record, with one line that says so; claims about them do not apply."""
    monkeypatch.setattr(libraries, "LIBRARIES", {"no-such-library": ("bitsandbytes_nf4",), **LIBRARIES})
    with pytest.warns(RuntimeWarning, match="not installed: no-such-library; the record lacks"):
        found = record_of(model_of())
    assert "bitsandbytes_nf4" not in found.methods
    assert {"bitsandbytes_int8", "rtn_4", "gguf_q4_0"} <= set(found.methods)
    with pytest.raises(NotApplicable, match="holds no bitsandbytes_nf4"):
        found.method_damage("bitsandbytes_nf4")


@pytest.mark.parametrize(("installed", "lacks"), [({"gguf": "1"}, True), (dict.fromkeys(LIBRARIES, "1"), False)])
def test_claims_about_every_method_want_every_library(installed, lacks):
    named = {"subject": "tiny", "source": "measured", "condition": "quick"}
    settings = json.dumps({"settings": {"quantization_libraries": installed}})
    record = Quantization(xr.Dataset(attrs=named | {"provenance": settings}))
    with pytest.raises(NotApplicable, match="bitsandbytes, torchao") if lacks else nullcontext():
        record.require_every_library()


# ---- memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    model_of(hidden_size=256, intermediate_size=512).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("method", footprint.METHODS)
def test_stored_bytes_are_what_arithmetic_expects(folder, method):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    total = sum(parameter.numel() for parameter in model.parameters())
    head, tied = model.lm_head.weight.numel(), model.config.tie_word_embeddings
    linear = sum(w.numel() for name, w in model.named_parameters() if "layers" in name and w.dim() == 2)
    expected = expected_gigabytes(linear, total, head, tied, 64)[method]
    quantized = footprint.quantize_model(model, method, 64)
    found = footprint.stored_bytes(quantized) / footprint.GIGABYTE
    # channel scales and codebooks weigh more in a tiny model
    assert found == pytest.approx(expected, rel=0.02 if method == "bfloat16" else 0.06)


def test_a_process_of_its_own_sees_the_same_bytes(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    found = footprint.footprints(folder, ["bfloat16"], 64)["bfloat16"]
    assert found["stored"] == pytest.approx(footprint.stored_bytes(model) / footprint.GIGABYTE)
    assert found["seconds"] > 0


def test_a_process_grows_by_its_model_and_not_by_libraries_or_the_model_before(tmp_path):
    """Importing what quantizes takes 80 MB and more. Stored in float32, a model is converted and not mapped."""
    model_of(vocab_size=64_000, hidden_size=512, intermediate_size=1024).save_pretrained(tmp_path)
    methods = ["bfloat16", "torchao_int8_weight_only", "bitsandbytes_nf4"]
    found = footprint.footprints(tmp_path, methods, 64)
    assert list(found) == methods
    for memory in found.values():
        assert memory["stored"] < memory["resident"] < memory["stored"] + 0.05


def test_a_failing_process_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot measure the memory of bfloat16 on .* \(\w*Error: .*\); see"):
        footprint.footprints(tmp_path, ["bfloat16"], 64)


def test_scales_of_four_bit_weights_are_counted():
    """Codes, 8-bit scales of blocks of 64, float32 scales of 256 of those, their mean, and the two codebooks."""
    layer = torch.nn.Sequential(torch.nn.Linear(1024, 256, bias=False).bfloat16())
    weights = 1024 * 256
    blocks = weights // 64
    expected = weights // 2 + blocks + blocks // 256 * 4 + 4 + 16 * 4 + 256 * 4
    assert footprint.stored_bytes(libraries.to_nf4_(layer)) == expected
