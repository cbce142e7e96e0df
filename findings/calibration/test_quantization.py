"""Known answers of rounding rules, quantized layers and library quantizers."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab.corpora.batches import TokenText, token_batches
from lab.errors import NotApplicable, UserError
from lab.experiments.systems.measuring.quantization_methods import methods
from lab.quantization.layers import Workshop, matrices
from lab.quantization.libraries import GGUF, NormalFloat4, TorchAO, to_nf4_
from lab.quantization.rounding import (
    SCHEMES,
    GaussianNoise,
    Rounding,
    distinct_values,
    gaussian_error,
    largest_group,
    relative_error,
)
from lab.quantization.whole_models import DISTINCT_LIMIT
from lab.residual.executor import Executor
from lab.residual.programs import identity
from lab.residual.readouts import CompletionLoss
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import VOCABULARY, tiny

pytestmark = pytest.mark.calibration

GROUP = 16
BITS = st.sampled_from([2, 3, 4, 6, 8])
SEEDS = st.integers(0, 10_000)
SCHEME = st.sampled_from(sorted(SCHEMES))
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")


def weights(seed, rows=6, groups=3, tail=1.0):
    """A random matrix; `tail` > 1 makes its tails heavy."""
    drawn = torch.randn((rows, groups * GROUP), generator=torch.Generator().manual_seed(seed))
    return drawn.sign() * drawn.abs() ** tail


def published_rule(weight, bits, group):
    """The source's definition, one group at a time, in plain Python."""
    largest = 2 ** (bits - 1) - 1
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group].float()
            scale = max(float(values.abs().max()), 1e-8) / largest
            codes = [min(max(round(float(value / scale)), -largest - 1), largest) for value in values]
            out[row, start : start + group] = torch.tensor(codes) * torch.tensor(scale)
    return out


def wide(architecture, **changes):
    """A tiny decoder whose rows hold whole blocks of 64 weights."""
    heads = {"head_dim": 16} if architecture in ("qwen3", "gemma3_text") else {}
    return tiny(architecture, hidden_size=64, intermediate_size=128, **heads, **changes)


def texts_of(seed=0, rows=3, tokens=12):
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    return [TokenText(tuple(row), tuple(range(1, tokens))) for row in ids]


def batch_of(seed=0, rows=3, tokens=12):
    return token_batches(texts_of(seed, rows, tokens), 256)[0]


def losses(workshop, batch, programs):
    executor = Executor(workshop.decoder)
    executor.variants = workshop.variants
    loss = CompletionLoss(workshop.decoder, batch, head_dtype=torch.float32)
    return executor.run(batch, programs, loss)["loss"].sum(1).numpy() / len(batch.scored)


# ---- rounding rules


@given(SEEDS, BITS)
@settings(max_examples=25, deadline=None)
def test_rounding_is_the_published_rule(seed, bits):
    weight = weights(seed)
    torch.testing.assert_close(Rounding(bits, GROUP)(weight), published_rule(weight, bits, GROUP), rtol=1e-6, atol=1e-9)


def test_halves_are_rounded_to_even():
    row = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0]])
    assert Rounding(4, 8)(row).tolist() == [[7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 0.0]]


@given(SEEDS, BITS, st.sampled_from(["symmetric_amax", "asymmetric_minmax"]))
@settings(max_examples=40, deadline=None)
def test_rounding_twice_is_rounding_once(seed, bits, scheme):
    """Not so for the other two rules, which clip or fit their step to what they are given."""
    rule = Rounding(bits, GROUP, scheme)
    once = rule(weights(seed))
    torch.testing.assert_close(rule(once), once, rtol=1e-5, atol=1e-7)


@given(SEEDS, BITS)
@settings(max_examples=25, deadline=None)
def test_error_is_at_most_half_a_step(seed, bits):
    weight = weights(seed, tail=2)
    error = (Rounding(bits, GROUP)(weight) - weight).abs().reshape(-1, GROUP)
    step = weight.abs().reshape(-1, GROUP).amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert (error <= step / 2 * (1 + 1e-5)).all()


@given(SEEDS, BITS)
@settings(max_examples=25, deadline=None)
def test_the_largest_weight_of_a_group_is_exact(seed, bits):
    weight = weights(seed).reshape(-1, GROUP)
    at = weight.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(Rounding(bits, GROUP)(weight).gather(-1, at), weight.gather(-1, at), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scheme", "levels"), [("symmetric_amax", 2), ("asymmetric_minmax", 1), ("mse_optimal", 1)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_number_of_levels(scheme, levels, bits):
    """The published rule reaches 2^b - 1 of its levels, so that its 2 bits are ternary; the others reach 2^b."""
    rounded = Rounding(bits, 4096, scheme)(torch.randn((1, 4096), generator=torch.Generator().manual_seed(0)))
    assert len(rounded.unique()) == 2**bits - levels + 1


@given(SEEDS, BITS, SCHEME, st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_scaling_a_group_scales_its_result(seed, bits, scheme, factor):
    factor = 2.0 ** round(np.log2(factor))  # a power of two is exact in binary
    rule, weight = Rounding(bits, GROUP, scheme), weights(seed)
    scaled = weight.clone()
    scaled[:, :GROUP] *= factor
    expected = rule(weight)
    expected[:, :GROUP] *= factor
    torch.testing.assert_close(rule(scaled), expected, rtol=1e-5, atol=1e-7)


@given(SEEDS, BITS)
@settings(max_examples=25, deadline=None)
def test_sign_flips_commute(seed, bits):
    rule, weight = Rounding(bits, GROUP), weights(seed)
    assert torch.equal(rule(-weight), -rule(weight))


@given(SEEDS, BITS, SCHEME)
@settings(max_examples=25, deadline=None)
def test_permuting_rows_commutes(seed, bits, scheme):
    """Fails if a group straddles a row border."""
    rule, weight = Rounding(bits, GROUP, scheme), weights(seed)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(rule(weight[order]), rule(weight)[order])


def test_groups_do_not_influence_each_other():
    weight = weights(1)
    other = weight.clone()
    other[:, GROUP:] *= 100
    assert torch.equal(Rounding(3, GROUP)(weight)[:, :GROUP], Rounding(3, GROUP)(other)[:, :GROUP])


def test_groups_must_fit_into_rows():
    with pytest.raises(UserError, match="groups of 128 weights do not fit into rows of 576"):
        Rounding(4, 128)(torch.zeros(2, 576))
    assert largest_group({576, 1536}, (128, 64)) == 64
    assert largest_group({896, 4864}, (128, 64)) == 128
    with pytest.raises(NotApplicable, match="cannot be rounded"):
        largest_group({600}, (128, 64))


def test_zeros_stay_zeros():
    for scheme in ("symmetric_amax", "symmetric_full_range", "asymmetric_minmax"):
        assert not Rounding(3, GROUP, scheme)(torch.zeros(2, GROUP)).any()


# ---- the error law


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (128, {8: 0.0065, 6: 0.0265, 4: 0.117, 3: 0.274, 2: 0.766}),
        (64, {8: 0.0059, 6: 0.0243, 4: 0.108, 3: 0.251, 2: 0.718}),
    ],
)
def test_error_law_of_gaussian_weights(group, expected):
    found = {bits: gaussian_error(Rounding(bits, group), group * 64) for bits in expected}
    assert found == pytest.approx(expected, rel=0.01)


def test_four_level_rules_reach_their_textbook_error():
    """Max (1960): the optimal uniform quantizer with four levels has a mean squared error of 0.1188."""
    assert gaussian_error(Rounding(2, 4096, "mse_optimal"), 4096) == pytest.approx(0.1188**0.5, rel=0.01)
    assert gaussian_error(Rounding(2, 64, "mse_optimal"), 4096) <= 0.1188**0.5  # fitted to each group


def test_most_gaussian_weights_vanish_at_two_bits():
    weight = torch.randn((512, 128), generator=torch.Generator().manual_seed(0))
    assert float((Rounding(2, 128)(weight) == 0).float().mean()) == pytest.approx(0.83, abs=0.01)


def test_error_falls_with_the_width_and_with_smaller_groups():
    by_bits = [gaussian_error(Rounding(bits, 64), 4096) for bits in (2, 3, 4, 6, 8)]
    by_group = [gaussian_error(Rounding(4, group), 4096) for group in (128, 64, 32)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


def test_noise_has_the_size_asked_for_and_no_direction():
    weight = weights(3, rows=64, groups=8)
    noisy = GaussianNoise(0.25)(weight, "0.q_proj")
    assert relative_error(weight, noisy) == pytest.approx(0.25, rel=1e-4)
    overlap = ((noisy - weight) * weight).sum() / ((noisy - weight).norm() * weight.norm())
    assert abs(overlap) < 0.05
    assert not torch.equal(noisy, GaussianNoise(0.25)(weight, "1.q_proj"))
    assert torch.equal(noisy, GaussianNoise(0.25)(weight, "0.q_proj"))


def test_a_stored_grid_is_seen():
    free = torch.randn((64, 576), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert distinct_values(free) > 30
    assert distinct_values(GGUF("Q8_0")(free)) > DISTINCT_LIMIT + 2
    assert distinct_values(GGUF("Q5_0")(free)) < DISTINCT_LIMIT - 2
    assert distinct_values(GGUF("Q4_1")(free)) <= 16


# ---- libraries


@pytest.mark.parametrize("double", [True, False])
def test_nf4_error_is_the_textbook_one_and_bitsandbytes(double):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn((256, 1024), generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    own = relative_error(weight, NormalFloat4()(weight))
    assert own == pytest.approx(0.092, abs=1e-3)
    assert own == pytest.approx(relative_error(weight, dequantize_4bit(codes, state)), abs=1e-3)


def test_q4_1_keeps_what_it_stored():
    """Weights off a Q4_1 file lose (almost) nothing to Q4_1 again, and as much as free ones to another grid."""
    stored = GGUF("Q4_1")(torch.randn((64, 576), generator=torch.Generator().manual_seed(0)))
    assert relative_error(stored, GGUF("Q4_1")(stored)) < 0.01
    assert relative_error(stored, Rounding(4, 64)(stored)) == pytest.approx(0.108, rel=0.15)


def test_torchao_int8_is_symmetric_per_channel():
    weight = weights(5, rows=32, groups=8).bfloat16()
    scale = weight.float().abs().amax(1, keepdim=True) / 127.5
    assert float(((TorchAO(8)(weight).float() - weight.float()).abs() / scale).max()) <= 1.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nf4_layers_equal_the_library_forward(architecture):
    model = wide(architecture)
    workshop, batch = Workshop(Decoder(model)), batch_of()
    own = losses(workshop, batch, [workshop.program([workshop.all(NormalFloat4())] * workshop.decoder.n_layers)])
    whole = copy.deepcopy(model)
    for layer in Decoder(whole).layers:
        to_nf4_(layer)
    logits = whole(batch.ids).logits[:, :-1].float()
    theirs = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch.ids[:, 1:].reshape(-1))
    assert float(own[0]) == pytest.approx(float(theirs), abs=2e-3)


def test_torchao_layers_equal_the_library_forward():
    from torchao.quantization import quantize_

    model = wide("llama")
    workshop, batch = Workshop(Decoder(model)), batch_of()
    for rule in (TorchAO(8), TorchAO(4, 32)):
        own = losses(workshop, batch, [workshop.program([workshop.all(rule)] * workshop.decoder.n_layers)])
        whole = copy.deepcopy(model)
        for layer in whole.model.layers:
            quantize_(layer, rule.configuration())
        logits = whole(batch.ids).logits[:, :-1].float()
        theirs = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch.ids[:, 1:].reshape(-1))
        assert float(own[0]) == pytest.approx(float(theirs), abs=1e-4)


# ---- quantized layers in programs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantized_layers_equal_a_model_with_their_weights(architecture):
    model = wide(architecture)
    workshop, batch = Workshop(Decoder(model)), batch_of()
    rule = Rounding(3, 32)
    before = [parameter.clone() for parameter in model.parameters()]
    programs = [workshop.one_layer(2, workshop.all(rule)), workshop.one_layer(4, workshop.only("up_proj", rule))]
    own = losses(workshop, batch, programs)
    for index, (layer, kept) in enumerate([(2, None), (4, "up_proj")]):
        other = copy.deepcopy(model)
        for path, linear in matrices(Decoder(other).layers[layer]).items():
            if kept is None or path.endswith(kept):
                linear.weight.data = rule(linear.weight.data)
        plain = Workshop(Decoder(other))
        assert own[index] == losses(plain, batch, [identity(5)])[0]
    assert all(map(torch.equal, before, model.parameters()))


def test_prefix_sharing_changes_no_bit():
    model = wide("llama")
    workshop, batch = Workshop(Decoder(model)), batch_of()
    plans = [workshop.all(Rounding(bits, 32)) for bits in (3, 2)]
    programs = [workshop.one_layer(layer, plan) for layer in range(5) for plan in plans]
    shared = losses(workshop, batch, programs)
    alone = Executor(workshop.decoder, variants=workshop.variants, share_prefixes=False)
    loss = CompletionLoss(workshop.decoder, batch, head_dtype=torch.float32)
    apart = alone.run(batch, programs, loss)["loss"].sum(1).numpy() / len(batch.scored)
    np.testing.assert_allclose(shared, apart, rtol=1e-6)


def test_weights_on_the_grid_change_no_bit():
    model = wide("llama")
    rule = Rounding(4, 32)
    for layer in model.model.layers:
        for linear in matrices(layer).values():
            codes = torch.randint(-7, 8, linear.weight.shape, generator=torch.Generator().manual_seed(1)).float()
            codes[:, ::32] = 7  # every group reaches its largest code
            linear.weight.data = codes / 64
    workshop, batch = Workshop(Decoder(model)), batch_of()
    quantized, intact = losses(workshop, batch, [workshop.program([workshop.all(rule)] * 5), identity(5)])
    assert quantized == intact


def test_eight_bits_lose_nothing_and_noise_grows_squared():
    """Loss grows as the square of small weight noise: slope 2 in log-log, over seeds that cancel its first order."""
    model = wide("llama", seed=3)
    workshop, batch = Workshop(Decoder(model)), batch_of(rows=8)
    sizes = (0.02, 0.04, 0.08)
    noises = [GaussianNoise(size, seed) for size in sizes for seed in range(12)]
    pairs = [rule for noise in noises for rule in (noise, _Opposite(noise))]
    programs = [identity(5), *(workshop.one_layer(2, workshop.all(rule)) for rule in (Rounding(8, 32), *pairs))]
    found = losses(workshop, batch, programs)
    rises = (found[2:] - found[0]).reshape(len(sizes), -1)
    assert abs(found[1] - found[0]) < np.abs(rises[0]).mean()
    curvature = np.abs(rises.mean(1))
    slope = np.polyfit(np.log(sizes), np.log(curvature), 1)[0]
    assert slope == pytest.approx(2, abs=0.3)


class _Opposite:
    """Noise of the opposite sign: the mean of the two has no first-order term."""

    def __init__(self, noise):
        self.noise = noise
        self.name = f"opposite-{noise.name}"

    def __call__(self, weight, place=""):
        return 2 * weight - self.noise(weight, place)


def test_every_method_runs_and_changes_the_loss():
    workshop, batch = Workshop(Decoder(wide("qwen2"))), batch_of()
    chosen = methods(workshop, 32, texts_of())
    found = losses(workshop, batch, [identity(5), *(method.program(workshop) for method in chosen)])
    assert len({method.name for method in chosen}) == len(chosen)
    assert np.isfinite(found).all()
    assert (found[1:] != found[0]).all()


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.LayerNorm(4), "has no linear maps"),
        (nn.ModuleDict({"up": nn.Linear(4, 4), "experts": nn.Embedding(2, 4)}), "keeps experts.weight in another form"),
        (nn.Embedding(2, 4), "keeps weight in another form"),
    ],
)
def test_a_layer_of_anything_but_linear_maps_is_refused(layer, why):
    with pytest.raises(NotApplicable, match=why):
        matrices(layer)


def test_layers_without_linear_maps_are_refused():
    with pytest.raises(NotApplicable, match="only layers of plain linear maps"):
        Workshop(Decoder(tiny("gpt2")))
