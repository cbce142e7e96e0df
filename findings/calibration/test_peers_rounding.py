"""Rounding of weights (T-11) against torchao's arithmetic, on matrices of SmolLM2-135M."""

import pytest
import torch
from safetensors import safe_open

from lab.quantization.libraries import TorchAO
from lab.quantization.rounding import Rounding

pytestmark = pytest.mark.calibration

MATRICES = ((0, "self_attn.q_proj"), (7, "self_attn.k_proj"), (15, "self_attn.v_proj"), (29, "mlp.down_proj"))


@pytest.fixture(scope="module")
def matrices(smollm2_folder):
    """Weights [out, in] in float32, as they are stored."""
    with safe_open(smollm2_folder / "model.safetensors", "pt") as tensors:
        return [tensors.get_tensor(f"model.layers.{layer}.{name}.weight").float() for layer, name in MATRICES]


def assert_alike_but_for_ties(ours, theirs, weight, step, ties):
    """Equal in float32, but where w / s lies within 1e-4 of a half: one step apart at most, and few are."""
    difference, level = (ours - theirs).abs(), weight / step
    tied = (level.abs() % 1 - 0.5).abs() < 1e-4
    assert float(difference[~tied].max()) <= 1e-6 * float(weight.abs().max())
    assert bool((difference <= 1.001 * step).all())
    assert float(tied.float().mean()) < ties


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_rounded_weights_are_those_of_torchao(matrices, bits, group):
    """Its affine primitives with the published levels, -(2^(b-1) - 1) to 2^(b-1) - 1, dequantized.

    It multiplies by 1 / s where the rule divides by s, which may decide a tie otherwise.
    """
    from torchao import quantization as torchao

    levels = 2 ** (bits - 1) - 1
    for weight in matrices:
        blocks, limits = (1, group), {"quant_min": -levels, "quant_max": levels}
        symmetric = torchao.MappingType.SYMMETRIC
        scale, zero = torchao.quant_primitives.choose_qparams_affine(weight, symmetric, blocks, torch.int8, **limits)
        codes = torchao.quantize_affine(weight, blocks, scale, zero, torch.int8, **limits)
        theirs = torchao.dequantize_affine(codes, blocks, scale, zero, torch.int8, **limits)
        step = scale.repeat_interleave(group, dim=1)
        assert_alike_but_for_ties(Rounding(bits, group)(weight), theirs, weight, step, ties=1e-3)


@pytest.mark.parametrize("group", [32, 64])
def test_torchaos_own_four_bits_have_another_step(matrices, group):
    """Its weight-only configuration divides by max |w| / 7.5, where the published rule has 7, and uses all 16 levels.

    So the largest weight of each group is a tie, by construction.
    """
    for weight in matrices:
        step = (weight.reshape(-1, group).abs().amax(1) / 7.5).repeat_interleave(group).reshape(weight.shape)
        expected = (weight / step).round().clamp(-8, 7) * step
        assert_alike_but_for_ties(TorchAO(4, group)(weight), expected, weight, step, ties=1.5 / group)
