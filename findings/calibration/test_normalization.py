"""Known answers of the instruments of T-15: norms found by role, replacements, statistics, constants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab.corpora.batches import TokenText, token_batches
from lab.errors import NotApplicable, UserError
from lab.normalization import moments
from lab.normalization.constants import later_tokens, median_rms, pooled_statistics, running_statistics
from lab.normalization.replacements import (
    Calibrating,
    FixedStatistics,
    FrozenScale,
    Identity,
    JointGroupNorm,
    LayerNorm,
    NoGain,
    RmsNorm,
    TokenGroupNorm,
)
from lab.normalization.sites import FINAL, Norm, norms_of
from lab.normalization.surgery import Renormed, tapped, walk, with_modules
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import LAYERS, tiny

pytestmark = pytest.mark.calibration

SANDWICH = ["pre_attention", "post_attention", "pre_mlp", "post_mlp", "query", "key"]
ROLES = {
    "llama": ["pre_attention", "pre_mlp"],
    "qwen2": ["pre_attention", "pre_mlp"],
    "qwen3": ["pre_attention", "pre_mlp", "query", "key"],
    "gemma3_text": SANDWICH,
}
WIDTH = 16


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(gain, eps=1e-6, token_axis=1):
    return Norm("pre_mlp", 0, "norm", gain, eps, token_axis)


def batch_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = [TokenText(tuple(torch.randint(80, (n,), generator=generator).tolist()), (n - 1,)) for n in lengths]
    (batch,) = token_batches(texts, 10_000)
    return batch


def final_state(renormed, batch):
    """Final state and what the final norm makes of it."""
    with torch.no_grad():
        *_, (_, state) = walk(renormed.decoder, batch, renormed.layer)
        return renormed.readable().final_norm(state)


any_vectors = st.integers(0, 2**31).map(lambda seed: 3 * vectors(2, 5, WIDTH, seed=seed) + vectors(1, seed=seed))


# ---- the norms of a model


@pytest.mark.parametrize("architecture", ROLES)
def test_norms_are_found_by_role(architecture):
    decoder = Decoder(tiny(architecture))
    norms = norms_of(decoder)
    assert [sorted(layer) for layer in norms.layers] == [sorted(ROLES[architecture])] * LAYERS
    assert norms.final.layer == LAYERS
    layer = decoder.layers[2]
    scale = 1.0 if architecture == "gemma3_text" else 0.0
    for role, attribute in (
        ("pre_attention", "input_layernorm"),
        ("pre_mlp", "pre_feedforward_layernorm" if scale else "post_attention_layernorm"),
        *([("post_attention", "post_attention_layernorm"), ("post_mlp", "post_feedforward_layernorm")] * bool(scale)),
        *([("query", "self_attn.q_norm"), ("key", "self_attn.k_norm")] * ("query" in ROLES[architecture])),
    ):
        assert norms.layers[2][role].path == attribute
        own = layer.get_submodule(attribute).weight
        torch.testing.assert_close(norms.layers[2][role].gain, own + scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("architecture", "axis"), [("qwen3", 1), ("gemma3_text", 2)])
def test_the_token_axis_of_head_norms(architecture, axis):
    assert norms_of(Decoder(tiny(architecture))).layers[0]["query"].token_axis == axis


@pytest.mark.parametrize("architecture", ["gpt2", "cohere"])
def test_models_without_rms_norms_are_refused(architecture):
    with pytest.raises(NotApplicable, match=r"no RMSNorm|T-15 studies"):
        norms_of(Decoder(tiny(architecture)))


def test_a_layer_with_other_modules_shares_all_weights_and_leaves_the_model_alone():
    layer = Decoder(tiny("qwen3")).layers[0]
    before = dict(layer.named_modules())
    other = nn.Identity()
    clone = with_modules(layer, {"self_attn.q_norm": other})
    assert clone.self_attn.q_norm is other
    assert dict(layer.named_modules()) == before
    shared = {id(weight) for weight in layer.parameters()}
    assert {id(weight) for weight in clone.parameters()} <= shared
    clone.register_forward_hook(lambda *_: pytest.fail("a hook of the clone ran on the original"))
    assert len(layer._forward_hooks) == 0


# ---- replacements


@pytest.mark.parametrize("architecture", ROLES)
def test_rms_norm_formed_anew_reproduces_the_model(architecture):
    decoder = Decoder(tiny(architecture))
    norms, batch = norms_of(decoder), batch_of(7, 11)
    intact = final_state(Renormed(decoder, norms, (), RmsNorm), batch)
    anew = final_state(Renormed(decoder, norms, (*ROLES[architecture], FINAL), RmsNorm), batch)
    torch.testing.assert_close(anew, intact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        final_state(Renormed(decoder, norms, (*ROLES[architecture], FINAL), LayerNorm), batch), intact, atol=1e-2
    )


def test_a_swap_with_itself_is_identical():
    decoder = Decoder(tiny("gemma3_text"))
    norms, batch = norms_of(decoder), batch_of(7, 11)

    def itself(norm):
        return decoder.final_norm if norm.role == FINAL else decoder.layers[norm.layer].get_submodule(norm.path)

    swapped = final_state(Renormed(decoder, norms, (*SANDWICH, FINAL), itself), batch)
    assert torch.equal(swapped, final_state(Renormed(decoder, norms, (), itself), batch))
    taps = []
    with torch.no_grad():
        states = [
            state
            for _, state in walk(decoder, batch, lambda i: tapped(decoder, norms, i, lambda *x: taps.append(x[0])))
        ]
    assert torch.equal(decoder.final_norm(states[-1]), swapped)
    assert taps[:6] == ["pre_attention", "query", "key", "post_attention", "pre_mlp", "post_mlp"]


def centred(model):
    """A model whose every write to the residual stream has mean zero over channels."""
    model.get_input_embeddings().weight.data -= model.get_input_embeddings().weight.mean(1, keepdim=True)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data -= linear.weight.mean(0, keepdim=True)
    return model


def test_layer_norm_equals_rms_norm_where_the_stream_has_no_mean():
    decoder = Decoder(centred(tiny("llama", tie_word_embeddings=False)))
    norms, batch = norms_of(decoder), batch_of(9)
    roles = ("pre_attention", "pre_mlp", FINAL)
    found = [final_state(Renormed(decoder, norms, roles, rule), batch) for rule in (RmsNorm, LayerNorm)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@given(any_vectors, st.floats(0.1, 10))
@settings(deadline=None, max_examples=25)
def test_invariances_of_the_norms(x, factor):
    gain = 1 + 0.1 * vectors(WIDTH, seed=3)
    norm, order = norm_of(gain, eps=0.0), torch.randperm(WIDTH)
    close = {"rtol": 1e-3, "atol": 1e-4}
    rms, layer = RmsNorm(norm), LayerNorm(norm)
    torch.testing.assert_close(x.square().mean(-1), x.var(-1, unbiased=False) + x.mean(-1) ** 2, **close)
    torch.testing.assert_close(rms(factor * x), rms(x), **close)
    torch.testing.assert_close(layer(factor * x + 5), layer(x), **close)
    torch.testing.assert_close(RmsNorm(norm_of(gain[order], eps=0.0))(x[..., order]), rms(x)[..., order], **close)
    torch.testing.assert_close(NoGain(norm)(x) * gain, rms(x), **close)


def test_group_norms_know_layer_norm():
    norm, x = norm_of(1 + 0.1 * vectors(WIDTH)), vectors(2, 6, WIDTH, seed=1) + 1
    assert torch.equal(TokenGroupNorm(norm, 1)(x), LayerNorm(norm)(x))
    torch.testing.assert_close(JointGroupNorm(norm, 1)(x[:, :1]), LayerNorm(norm)(x[:, :1]))
    torch.testing.assert_close(JointGroupNorm(norm, 4)(x[:, :1]), TokenGroupNorm(norm, 4)(x[:, :1]))
    reference = nn.functional.group_norm(x.movedim(-1, 1), 4, eps=norm.eps).movedim(1, -1)
    torch.testing.assert_close(JointGroupNorm(norm, 4)(x), norm.gain * reference)
    with pytest.raises(UserError, match="16 channels do not divide into 5 groups"):
        JointGroupNorm(norm, 5)


def test_a_frozen_scale_equals_rms_norm_where_all_tokens_are_alike():
    x = vectors(2, 6, WIDTH)
    x = 2.5 * x / x.square().mean(-1, keepdim=True).sqrt()
    norm = norm_of(1 + 0.1 * vectors(WIDTH), eps=0.0)
    torch.testing.assert_close(FrozenScale(norm, 2.5)(x), RmsNorm(norm)(x))
    x[:, 0] *= 300  # a massive activation
    torch.testing.assert_close(FrozenScale(norm, 2.5, first_exact=True)(x), RmsNorm(norm)(x))
    assert float(FrozenScale(norm, 2.5)(x)[0, 0].abs().max()) > 100


def test_the_first_token_lies_on_the_token_axis():
    x = vectors(2, 3, 6, WIDTH)  # heads before tokens
    norm = norm_of(torch.ones(WIDTH), token_axis=2)
    changed = FrozenScale(norm, 1.0, first_exact=True)(x) != x
    assert changed[:, :, 0].all()
    assert not changed[:, :, 1:].any()


def test_half_precision_is_rounded_once():
    x = (100 * vectors(2, 6, WIDTH)).bfloat16()
    norm = norm_of(1 + 0.1 * vectors(WIDTH))
    assert torch.equal(LayerNorm(norm)(x), LayerNorm(norm)(x.float()).bfloat16())


# ---- batch norm


@pytest.mark.parametrize("updates", [1, 5])
def test_the_schedule_leaves_a_share_of_the_initial_statistics(updates):
    x = 3 + 2 * vectors(1, 400, WIDTH)
    real = torch.ones(1, 400, dtype=torch.bool)
    mean = variance = None
    for _ in range(updates):
        module = Calibrating(norm_of(torch.ones(WIDTH)), real, momentum=0.1, mean=mean, variance=variance)
        module(x)
        mean, variance = module.mean, module.variance
    kept = 0.9**updates
    torch.testing.assert_close(variance, kept + (1 - kept) * x[0].var(0))
    torch.testing.assert_close(mean, (1 - kept) * x[0].mean(0))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_exact_statistics_normalize_the_calibration_texts(architecture):
    """In the replaced model every channel of every norm has mean 0 and variance 1 over the texts calibrated on."""
    decoder = Decoder(tiny(architecture))
    norms, batch = norms_of(decoder), batch_of(9, 12, 7)
    roles = (*norms.block_roles, FINAL)
    found = pooled_statistics(decoder, norms, roles, batch)
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    normed = []

    class Watched(FixedStatistics):
        def normed(self, x):
            y = super().normed(x)
            normed.append(y[real])
            return y

    def rule(norm):
        return Watched(norm, found[norm.layer, norm.role].mean, found[norm.layer, norm.role].variance)

    final_state(Renormed(decoder, norms, roles, rule), batch)
    assert len(normed) == LAYERS * len(norms.block_roles) + 1
    for y in normed:
        assert float(y.mean(0).abs().max()) < 2e-3
        np.testing.assert_allclose(y.var(0, unbiased=False).numpy(), 1, atol=0.02)


def test_statistics_of_the_schedule_start_at_one():
    decoder = Decoder(tiny("llama"))
    norms, batch = norms_of(decoder), batch_of(9)
    found = running_statistics(decoder, norms, norms.block_roles, [batch], momentum=1e-6)
    for module in found.values():
        torch.testing.assert_close(module.variance, torch.ones_like(module.variance), rtol=0, atol=1e-2)


# ---- what norms see


def test_typical_scales_leave_the_first_token_and_padding_out():
    decoder = Decoder(tiny("llama"))
    norms, long = norms_of(decoder), batch_of(12)
    (padded,) = token_batches([TokenText(tuple(long.ids[0].tolist()), ()), TokenText((1, 2), ())], 100)
    taken = median_rms(decoder, norms, padded)
    states = []
    with torch.no_grad():
        for index, _ in walk(
            decoder, padded, lambda i: tapped(decoder, norms, i, lambda role, x, y: states.append((role, x)))
        ):
            if index == 1:
                break
    role, x = states[2]
    by_hand = torch.cat([x[0, 1:2], x[1, 1:]]).square().mean(-1).sqrt().median()
    assert role == "pre_attention"
    assert taken[1, "pre_attention"] == pytest.approx(float(by_hand))
    assert later_tokens(torch.arange(12.0).reshape(1, 2, 3, 2), torch.ones(1, 3, dtype=torch.bool), 2).shape == (4, 2)


def test_pooled_moments_of_a_gaussian():
    found = moments.pooled(vectors(200, 500))
    assert abs(found["excess_kurtosis"]) <= 3 * math.sqrt(24 / 100_000)
    assert abs(found["skewness"]) <= 3 * math.sqrt(6 / 100_000)
    assert found["std"] == pytest.approx(1, abs=0.01)
    assert found["near_zero_fraction"] == pytest.approx(2 * 0.001 * 0.3989, rel=0.3)


@given(st.integers(3, 400))
@settings(deadline=None, max_examples=20)
def test_one_element_gives_the_largest_kurtosis(count):
    x = torch.zeros(count, 1)
    x[count // 2] = 7232
    found = moments.pooled(x)
    assert found["excess_kurtosis"] == pytest.approx(count - 5 + 1 / (count - 1), rel=1e-6)
    assert found["top_element_power_share"] == 1


def test_kurtosis_tells_the_share_of_one_element():
    x = vectors(80, 100)
    x[0, 3] = 500
    found = moments.pooled(x)
    assert found["excess_kurtosis"] / x.numel() == pytest.approx(found["top_element_power_share"] ** 2, rel=0.01)


def test_random_vectors_have_the_mean_of_chance():
    width = 640
    found = moments.per_token(vectors(10_001, width))["mean_to_std"]
    assert found * math.sqrt(math.pi * width / 2) == pytest.approx(1, abs=0.02)


def test_figures_per_token_leave_a_massive_first_token_out():
    x = vectors(60, 200)
    ordinary = moments.per_token(x)
    x[0, 5] = 1e4
    found = moments.per_token(x)
    assert found["first_token_rms"] == pytest.approx(1e4 / math.sqrt(200), rel=1e-3)
    assert {name: value for name, value in found.items() if name != "first_token_rms"} == {
        name: value for name, value in ordinary.items() if name != "first_token_rms"
    }
    assert moments.pooled(x)["std"] > 50 * ordinary["token_std"]


@pytest.mark.parametrize("ratio", [0.01, 0.5])
def test_a_planted_mean_changes_layer_norm_as_the_formula_has_it(ratio):
    """x of mean r and deviation 1: cos(LN, RMS) = 1 / sqrt(1 + r^2), and equal norms."""
    x = vectors(50, 400)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=False, keepdim=True) + ratio
    assert moments.per_token(x)["mean_to_std"] == pytest.approx(ratio, rel=1e-4)
    found = moments.layer_norm_change(x, torch.ones(400), 0.0)
    assert found == pytest.approx(math.sqrt(2 - 2 / math.sqrt(1 + ratio**2)), rel=1e-3)


def test_the_change_is_the_mean_as_the_scale_weighs_it():
    """Two channels with all of the gain and none of the spread: a mean of 1 % of the spread rules the output."""
    x = vectors(50, 400)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=False, keepdim=True)
    x[:, :2] *= 1e-3
    x += 0.01
    gain = torch.full((400,), 1e-3)
    gain[:2] = 10
    assert moments.layer_norm_change(x, torch.ones(400), 0.0) < 0.02
    assert moments.layer_norm_change(x, gain, 0.0) > 0.3


def test_extremes_of_heads():
    x = torch.zeros(3, 4, 5)
    x[1, 2, 3] = -9
    assert moments.head_extremes(x, 1)["abs_max"] == 9
    x = torch.full((3, 4, 5), 2.0)
    x[:, 0] = 100
    assert moments.head_extremes(x, 1)["rms_median"] == 2


def test_identity_is_the_input():
    x = vectors(2, 3, WIDTH).bfloat16()
    assert Identity(norm_of(torch.ones(WIDTH)))(x) is x
