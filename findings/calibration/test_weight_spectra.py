"""Known answers of T-9: matrices read from files, gains of norms, circuits of heads, and the published figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lab import published
from lab.errors import NotApplicable, UserError
from lab.experiments.layers.measuring.weight_spectra import circuits, folded
from lab.experiments.layers.weight_spectra import MATRICES, Budget, WeightSpectra, measure
from lab.statistics import depth
from lab.statistics.correlations import correlation_p_value, pearson_by_order, spearman_by_order, without_each
from lab.statistics.spectra import Spectrum
from lab.statistics.spectrum_size import participation_ratio
from lab.store import Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.facts import Local
from lab.subjects.matrices import LayerWeights
from lab.subjects.tiny import LAYERS, loaded, tiny

pytestmark = pytest.mark.calibration

WIDTH, HEADS, GROUPS, SIZE = 32, 4, 2, 8


def saved(model, folder):
    model.save_pretrained(folder)
    subject = loaded(model)
    return replace(subject, facts=replace(subject.facts, source=Local(folder)))


def record_of(subject, sweep=None):
    data = measure(subject, None, Budget(), sweep or Sweep())
    settings = json.loads(data.attrs["settings"])
    named = {"subject": "tiny", "source": "measured", "condition": "quick-float32"}
    return WeightSpectra(data.assign_attrs(named, provenance=json.dumps({"settings": settings})))


def weights_of(model, folder):
    model.save_pretrained(folder)
    return LayerWeights(Decoder(model), folder)


def by_name(weights, layer=LAYERS - 1):
    return {matrix.name: weights.read(matrix) for matrix in weights.matrices if matrix.layer == layer}


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def subject(model, tmp_path_factory):
    return saved(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def record(subject):
    return record_of(subject)


# ---- matrices


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_matrices_are_the_models_own(architecture, tmp_path):
    model = tiny(architecture)
    weights = weights_of(model, tmp_path)
    assert weights.names == list(MATRICES)
    for layer, block in enumerate(model.model.layers):
        for name, values in by_name(weights, layer).items():
            part = block.self_attn if name in MATRICES[:4] else block.mlp
            assert np.array_equal(values, getattr(part, name).weight.numpy())


def test_transposed_and_fused_weights_of_gpt2_are_split(tmp_path):
    model = tiny("gpt2")
    found = by_name(weights_of(model, tmp_path))
    block = model.transformer.h[-1]
    expected = block.attn.c_attn.weight.numpy().T.reshape(3, WIDTH, WIDTH)
    for name, values in zip(("q_proj", "k_proj", "v_proj"), expected, strict=True):
        assert np.array_equal(found[name], values)
    assert np.array_equal(found["down_proj"], block.mlp.c_proj.weight.numpy().T)
    assert "gate_proj" not in found


def other(architecture, **more):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = AutoConfig.for_model(architecture, vocab_size=89, pad_token_id=0, **sizes, **more)
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def test_fused_weights_of_phi3_are_split(tmp_path):
    model = other("phi3", num_key_value_heads=GROUPS)
    found = by_name(weights_of(model, tmp_path))
    fused = model.model.layers[-1].self_attn.qkv_proj.weight.numpy()
    assert np.array_equal(np.vstack([found[name] for name in ("q_proj", "k_proj", "v_proj")]), fused)
    assert found["k_proj"].shape == (GROUPS * SIZE, WIDTH)
    both = model.model.layers[-1].mlp.gate_up_proj.weight.numpy()
    assert np.array_equal(np.vstack([found["gate_proj"], found["up_proj"]]), both)


def test_interleaved_weights_of_neox_are_split(tmp_path):
    """Each head's rows hold its query, its key and its value: whichever head is silenced, the model says so."""
    model = other("gpt_neox")
    found = by_name(weights_of(model, tmp_path))
    fused = model.gpt_neox.layers[-1].attention.query_key_value.weight.numpy().reshape(HEADS, 3, SIZE, WIDTH)
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        assert np.array_equal(found[name], fused[:, index].reshape(-1, WIDTH))


def test_matrices_without_a_shared_name_keep_their_path(tmp_path):
    weights = weights_of(tiny("qwen3_next"), tmp_path)
    assert {"linear_attn.out_proj", "mlp.shared_expert.up_proj", "q_gate_proj"} <= set(weights.names)
    assert "up_proj" not in weights.names
    assert "mlp.experts.gate_up_proj" in weights.left_out


def test_a_missing_tensor_is_one_line(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"hold no model\.layers\.0"):
        LayerWeights(Decoder(tiny("llama", intermediate_size=40)), tmp_path)


# ---- gains of the norms


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_folding_a_gain_undoes_dividing_by_it(architecture, tmp_path):
    """A model whose gains are ones and whose weights hold them is the folded one."""
    model = tiny(architecture)
    weights = weights_of(model, tmp_path)
    gains = weights.gains()
    matrix = next(matrix for matrix in weights.matrices if matrix.name == "q_proj")
    before, after = gains[matrix.layer, matrix.module]
    block = (model.transformer.h if architecture == "gpt2" else model.model.layers)[0]
    norm = block.ln_1 if architecture == "gpt2" else block.input_layernorm
    shift = 1 if architecture == "gemma3_text" else 0  # Gemma multiplies by 1 + w
    assert before == pytest.approx(norm.weight.double().numpy() + shift, abs=1e-5)
    assert (after is not None) == (architecture in ("qwen3", "gemma3_text"))
    values = weights.read(matrix)
    scale = np.tile(after if after is not None else np.ones(SIZE), len(values) // SIZE)
    assert folded(values / before / scale[:, None], before, after) == pytest.approx(values)


def test_gains_of_one_change_nothing(tmp_path):
    model = tiny("llama")
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            nn.init.ones_(norm.weight)
    found = record_of(saved(model, tmp_path))
    assert np.allclose(found.folded_ratio, found.ratio, rtol=1e-5)


def test_gains_reach_the_matrices_that_they_feed(record, model):
    weight = model.model.layers[2].mlp.up_proj.weight.double().numpy()
    gain = model.model.layers[2].post_attention_layernorm.weight.double().numpy()
    expected = participation_ratio(np.linalg.svd(weight * gain, compute_uv=False) ** 2)
    assert record.data["folded_effective_rank"].sel(layer=2, matrix="up_proj") == pytest.approx(expected, rel=1e-5)
    assert record.folded_ratio.sel(layer=2, matrix="down_proj") == pytest.approx(
        float(record.ratio.sel(layer=2, matrix="down_proj"))
    )


# ---- the record


def test_spectra_are_those_of_the_plain_svd(record, model):
    for layer, block in enumerate(model.model.layers):
        for name in MATRICES:
            weight = getattr(block.self_attn if name in MATRICES[:4] else block.mlp, name).weight
            plain = Spectrum(torch.linalg.svdvals(weight.double()).numpy(), *weight.shape)
            at = record.data.sel(layer=layer, matrix=name)
            assert float(at["effective_rank"]) == pytest.approx(plain.effective_rank, rel=1e-6)
            assert float(at["spectral_entropy"]) == pytest.approx(plain.spectral_entropy, rel=1e-6)
            assert float(at["largest_singular_value"]) == pytest.approx(float(plain.values[0]), rel=1e-6)
            assert float(at["condition_number"]) == pytest.approx(plain.condition_number, rel=1e-4)
            assert int(at["energy_rank_90"]) == plain.energy_rank(90)


def test_circuits_are_those_of_the_products_head_by_head(record, model):
    block = model.model.layers[1].self_attn
    for head in range(HEADS):
        own, shared = slice(head * SIZE, head * SIZE + SIZE), slice(head // 2 * SIZE, head // 2 * SIZE + SIZE)
        routing = block.q_proj.weight[own].double().T @ block.k_proj.weight[shared].double()
        writing = block.o_proj.weight[:, own].double() @ block.v_proj.weight[shared].double()
        for circuit, product in (("qk", routing), ("ov", writing)):
            expected = participation_ratio(torch.linalg.svdvals(product).numpy() ** 2)
            found = record.data["circuit_effective_rank"].sel(layer=1, head=head, circuit=circuit)
            assert float(found) == pytest.approx(expected, rel=1e-6)


def test_circuits_do_not_depend_on_the_basis_inside_a_head(model):
    block = model.model.layers[0].self_attn
    attention = {name: getattr(block, name).weight.double().numpy() for name in MATRICES[:4]}
    turn = np.linalg.inv(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    turned = dict(attention)
    turned["q_proj"] = np.vstack([np.linalg.inv(turn).T @ rows for rows in np.split(attention["q_proj"], HEADS)])
    turned["k_proj"] = np.vstack([turn @ rows for rows in np.split(attention["k_proj"], GROUPS)])
    assert np.allclose(circuits(turned, SIZE), circuits(attention, SIZE), rtol=1e-6)
    assert not np.allclose(
        participation_ratio(np.linalg.svd(turned["k_proj"])[1] ** 2),
        participation_ratio(np.linalg.svd(attention["k_proj"])[1] ** 2),
    )


def test_layers_that_copy_a_query_overlap_wholly(tmp_path):
    model = tiny("llama")
    model.model.layers[3].self_attn.q_proj.weight.data.copy_(model.model.layers[1].self_attn.q_proj.weight)
    overlap = record_of(saved(model, tmp_path)).query_overlap.values
    assert overlap[1, 3] == pytest.approx(1)
    assert np.array_equal(overlap, overlap.T)
    assert np.diag(overlap) == pytest.approx(np.ones(LAYERS))
    assert overlap[1, 2] < 0.6


def test_kinds_of_attention_are_the_configurations(tmp_path):
    found = record_of(saved(tiny("gemma3_text"), tmp_path))
    assert found.data["attention_kind"].values.tolist() == [1, 0, 1, 1, 0]


def test_layers_without_attention_have_gaps_and_no_verdict(tmp_path):
    found = record_of(saved(tiny("qwen3_next"), tmp_path))
    queries = found.of(found.ratio, "q_proj")
    assert queries["layer"].values.tolist() == [2, 4]
    with pytest.raises(NotApplicable, match="layer 0 has no such matrix"):
        found.at(queries, 0)
    with pytest.raises(NotApplicable, match="no up_proj"):
        found.of(found.ratio, "up_proj")
    assert found.entry(found.ratio, 4, "q_proj") == found.at(queries, 4)
    with pytest.raises(NotApplicable, match="layer 0 has no such matrix"):
        found.entry(found.ratio, 0, "q_proj")
    with pytest.raises(NotApplicable, match="layer 5 has no such matrix"):
        found.entry(found.ratio, 5, "q_proj")
    with pytest.raises(NotApplicable, match="no up_proj"):
        found.entry(found.ratio, 0, "up_proj")
    assert found.circuit_ratio("qk").sizes["layer"] == 2


def test_stored_grids_show_and_lose_the_tail(tmp_path):
    model = tiny("llama", hidden_size=64, intermediate_size=96)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            step = parameter.abs().amax(1, keepdim=True) / 7
            parameter.data.copy_((parameter / step).round() * step)
    found = record_of(saved(model, tmp_path))
    assert (found.data["grid_levels"] <= 15).all()
    with pytest.raises(NotApplicable, match="lie on a grid"):
        found.require_free_tail()
    assert 0 < float(found.rounding_shift("effective_rank").max()) < 0.1


def test_weights_on_no_grid_have_a_tail_and_no_shift(record):
    record.require_free_tail()
    assert (record.data["rounding_share"] == 0).all()
    assert np.array_equal(record.data["rounded_effective_rank"], record.effective_rank)
    with pytest.raises(NotApplicable, match="on no grid"):
        record.rounding_shift("effective_rank")


def test_an_interrupted_measurement_resumes_to_the_same_record(subject, record, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(done, total, what):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        record_of(subject, Sweep(tmp_path, interrupt))
    assert len(list(tmp_path.glob("*.npz"))) >= 2
    assert record_of(subject, Sweep(tmp_path)).data.identical(record.data)


# ---- profiles over depth


def test_a_step_is_split_where_it_is():
    profile = np.r_[np.zeros(7), np.ones(13)]
    assert depth.best_split(profile) == (7, pytest.approx(1))
    assert depth.explained_by_split(profile, 7) == pytest.approx(1)
    assert depth.zone_difference(profile, 7) == pytest.approx(1)
    assert depth.zone_difference([0.0, 3.0, 5.0, 6.0, 10.0], 2) == pytest.approx(7 - 1.5)
    assert depth.explained_by_split(profile, 3) < 0.5


def test_shifts_do_not_believe_a_slow_change():
    """A sine fits any two halves; noise with one true step is believed."""
    wave = np.sin(np.linspace(0, 2 * np.pi, 36, endpoint=False) + 0.7)
    assert depth.welch_p_value(wave, 18) < 0.01 < 0.05 < depth.zone_shift_p_value(wave, 18)
    assert depth.zone_shift_p_value(np.r_[np.zeros(18), np.ones(18)], 18) == pytest.approx(2 / 36)


def partly_attending(queries, missing):
    """A record of square matrices whose Q has these ratios in all layers but the missing ones."""
    ratio = np.full((len(queries), len(MATRICES)), 0.5)
    ratio[:, 0] = queries
    ratio[missing, 0] = np.nan
    coords = {"layer": np.arange(len(queries)), "matrix": list(MATRICES)}
    sizes = {name: ("matrix", np.full(len(MATRICES), 100.0)) for name in ("rows", "columns")}
    return WeightSpectra(xr.Dataset({"effective_rank": (("layer", "matrix"), 100 * ratio), **sizes}, coords))


def test_zones_and_splits_count_layers_also_where_some_have_no_attention():
    step = np.r_[np.full(6, 0.2), np.full(6, 0.5)]
    for missing in ([], [0, 1, 2, 4], [7, 8]):
        found = partly_attending(step, missing)
        assert found.border == 6
        assert float(found.zone_effects(["q_proj"])[0]) == pytest.approx(0.3)
        assert found.split("q_proj") == (6, pytest.approx(1))


def test_correlations_are_over_the_layers_that_both_profiles_have():
    ratios = np.random.default_rng(3).uniform(0.2, 0.8, 12)
    found = partly_attending(ratios, [0, 5, 6])
    whole = xr.DataArray(ratios.round(1), coords={"layer": np.arange(12)})
    kept = np.delete(np.arange(12), [0, 5, 6])
    assert spearman_by_order(found.mean_ratio, whole) == spearman_by_order(ratios[kept], whole.values[kept])
    assert pearson_by_order(whole, found.mean_ratio) == pearson_by_order(found.mean_ratio, whole)
    assert without_each(found.mean_ratio, whole, pearson_by_order) == pytest.approx(
        without_each(ratios[kept], whole.values[kept], pearson_by_order)
    )
    shifted = xr.DataArray(ratios, coords={"layer": np.arange(1, 13)})
    assert pearson_by_order(shifted, found.ratio.sel(matrix="k_proj") + ratios) == pytest.approx(1), "order, not labels"


@pytest.mark.parametrize("shape", [(300, 300), (1200, 300), (300, 1200)])
def test_random_matrices_have_the_stable_share_of_their_shape(shape):
    """A little more: their largest singular value stays below its limit, so none looks as if directions stood out."""
    values = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), compute_uv=False)
    sizes = {name: ("matrix", [float(size)]) for name, size in zip(("rows", "columns"), shape, strict=True)}
    record = WeightSpectra(xr.Dataset(sizes, {"matrix": ["q_proj"]}))
    stable_rank = (values**2).sum() / values[0] ** 2
    share = stable_rank / participation_ratio(values**2)
    assert 1 < share / float(record.gaussian_stable_share[0]) < 1.05


# ---- published figures


@pytest.fixture(scope="module")
def original():
    return WeightSpectra(published.dataset("weight_spectra"))


def test_published_figures_agree_with_each_other(original):
    data = original.data
    stable = data["frobenius_norm_squared"] / data["largest_singular_value"] ** 2
    assert np.allclose(stable, data["stable_rank"], rtol=2e-4)
    assert np.allclose(original.effective_rank / original.max_rank, original.ratio, atol=6e-5)


def test_an_entry_is_the_number_at_its_labels(original):
    """In either order of the dimensions; `entry` finds it by position."""
    for quantity in (original.ratio, original.max_rank + 0 * original.ratio):
        for name in MATRICES:
            found = [original.entry(quantity, layer, name) for layer in range(36)]
            assert found == [float(quantity.sel(layer=layer, matrix=name)) for layer in range(36)]
            assert found == original.of(quantity, name).values.tolist()


def test_published_zone_tests_follow_from_the_published_ratios(original):
    for name in MATRICES:
        profile, at = original.of(original.ratio, name), original.data.sel(matrix=name)
        assert profile[:17].mean() == pytest.approx(float(at["zone_mean_plateau"]), abs=1e-4)
        assert profile[17:].mean() == pytest.approx(float(at["zone_mean_late"]), abs=1e-4)
        assert depth.welch_p_value(profile, 17) == pytest.approx(float(at["zone_welch_p"]), rel=0.01)


def test_published_correlations_follow_from_the_published_ratios(original):
    from lab.experiments.layers.layer_knockout import LayerKnockout

    damage = LayerKnockout(published.dataset("layer_knockout")).loss_delta
    profiles = {"mean": original.mean_ratio, **{name: original.of(original.ratio, name) for name in MATRICES}}
    for name, profile in profiles.items():
        at = original.data.sel(target="t2_knockout_delta_loss", weight=name)
        assert pearson_by_order(profile, damage) == pytest.approx(float(at["cross_pearson_r"]), abs=2e-3)
        assert spearman_by_order(profile, damage) == pytest.approx(float(at["cross_spearman_rho"]), abs=2e-3)
        assert correlation_p_value(float(at["cross_pearson_r"]), 36) == pytest.approx(
            float(at["cross_pearson_p"]), abs=2e-3
        )
