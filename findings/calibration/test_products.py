"""Half-precision products without half-precision instructions: the same numbers up to the order of summation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lab.subjects import products
from lab.subjects.anatomy import Decoder
from lab.subjects.products import WideConv1D, WideLinear, linear_into, wide_linear, widen_slow_products
from lab.subjects.tiny import tiny

pytestmark = pytest.mark.calibration

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch):
    """A machine without half-precision instructions."""
    monkeypatch.setattr(products, "is_native", lambda dtype: dtype == torch.float32)


def drawn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.booleans())
def test_a_wide_product_is_the_exact_one_rounded_once(dtype, rows, width, outputs, biased):
    """Within half a unit in the last place of the float64 product, and float32's own error before the rounding."""
    hidden, weight = drawn(rows, width, dtype=dtype), drawn(outputs, width, dtype=dtype, seed=1)
    bias = drawn(outputs, dtype=dtype, seed=2) if biased else None
    exact = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    magnitude = F.linear(hidden.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    found = wide_linear(hidden, weight, bias)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    summation = (width + 2) * torch.finfo(torch.float32).eps * magnitude
    assert ((found.double() - exact).abs() <= rounding * 1.01 + summation).all()


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
def test_tiles_change_nothing(monkeypatch, slow, tile):
    hidden, weight, bias = (drawn(*shape, dtype=torch.bfloat16) for shape in ((5, 16), (21, 16), (21,)))
    expected = F.linear(hidden.float(), weight.float(), bias.float()).bfloat16()
    monkeypatch.setattr(products, "TILE_ROWS", tile)
    torch.testing.assert_close(wide_linear(hidden, weight, bias), expected)
    out = torch.empty(5, 21, dtype=torch.bfloat16)
    torch.testing.assert_close(linear_into(hidden, weight, out), (hidden.float() @ weight.float().t()).bfloat16())


def test_a_wide_model_agrees_with_the_native_one(slow):
    """Logits of a small model differ by a few roundings, and its weights are the same tensors."""
    native = tiny("llama").bfloat16()
    ids = torch.arange(1, 25)[None]
    expected = native(ids).logits
    weights = [parameter.data_ptr() for parameter in native.parameters()]
    assert widen_slow_products(native) == sum(isinstance(module, nn.Linear) for module in native.modules())
    assert [parameter.data_ptr() for parameter in native.parameters()] == weights
    found = native(ids).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 16 * torch.finfo(torch.bfloat16).eps * scale
    assert Decoder(native).n_layers == native.config.num_hidden_layers


def test_gpt2s_transposed_map_is_widened_too(slow):
    plain = Conv1D(12, 8).bfloat16()
    hidden = drawn(3, 8, dtype=torch.bfloat16)
    expected = (hidden.float() @ plain.weight.float() + plain.bias.float()).bfloat16()
    assert widen_slow_products(plain) == 1
    assert type(plain) is WideConv1D
    torch.testing.assert_close(plain(hidden), expected)


def test_fast_products_and_quantized_maps_are_left_alone(slow):
    class Quantized(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(4, 4), Quantized(4, 4).bfloat16(), nn.Linear(4, 4).bfloat16()])
    assert widen_slow_products(model) == 1
    assert [type(module) for module in model] == [nn.Linear, Quantized, WideLinear]


def test_float32_is_always_native():
    assert products.is_native(torch.float32)
