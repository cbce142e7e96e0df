"""Half-precision products on processors that have no instructions for them.

Without bfloat16 instructions (AVX-512, AMX, or their like) PyTorch falls back to a loop that is ten times
slower than float32 (two AVX2 cores: 0.016 against 0.17 TFLOP/s). The same numbers can be had from the fast
kernel: a product of two bfloat16 numbers is exact in float32, sums are kept in float32 either way, and the
result is rounded once. So a wide product differs from a native one by the order of summation only, which
also differs between any two native kernels.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

#: Rows of a weight that are widened at a time: a tile of SmolLM2's vocabulary matrix stays below 20 MB.
TILE_ROWS = 8192


@cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU kernels multiply matrices of this dtype at full speed."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dtype not in (torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + b [..., n] for h [..., d], W [n, d] and b [n], in their dtype, by whichever kernel is the fast one."""
    if hidden.device.type != "cpu" or is_native(weight.dtype):
        return F.linear(hidden, weight, bias)
    return wide_linear(hidden, weight, bias)


def linear_into(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """h W^T for h [r, d] and W [n, d], written to `out` [r, n] of the same dtype."""
    if hidden.device.type != "cpu" or is_native(weight.dtype):
        return torch.mm(hidden, weight.t(), out=out)
    wide = hidden.float()
    for tile, columns in zip(torch.split(weight, TILE_ROWS), torch.split(out, TILE_ROWS, dim=1), strict=True):
        columns.copy_(wide @ tile.float().t())
    return out


def wide_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + b [..., n] with products and sums in float32 and one rounding at the end; weights widened in tiles."""
    wide = hidden.float()
    biases = [None] * -(-len(weight) // TILE_ROWS) if bias is None else torch.split(bias.float(), TILE_ROWS)
    tiles = zip(torch.split(weight, TILE_ROWS), biases, strict=True)
    parts = [F.linear(wide, tile.float(), part).to(hidden.dtype) for tile, part in tiles]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class WideLinear(nn.Linear):
    """A linear map that multiplies in float32 and rounds to its own dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., n] of inputs [..., d]."""
        return wide_linear(input, self.weight, self.bias)


class WideConv1D(Conv1D):  # type: ignore[misc]  # Transformers' types are not followed
    """GPT-2's linear map, whose weight lies transposed, in the same way."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., n] of inputs [..., d]."""
        return wide_linear(x, self.weight.t(), self.bias)


WIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: WideLinear, Conv1D: WideConv1D}


def widen_slow_products(model: nn.Module) -> int:
    """Let a model's linear maps on the CPU multiply in float32 where their dtype is slow; returns how many do.

    Weights stay as they are, in number and in memory. Subclasses of `nn.Linear` (quantized ones) have products of
    their own and are left alone.
    """
    slow = [
        module
        for module in model.modules()
        if type(module) in WIDE and module.weight.device.type == "cpu" and not is_native(module.weight.dtype)
    ]
    for module in slow:
        module.__class__ = WIDE[type(module)]
    return len(slow)
