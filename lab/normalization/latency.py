"""How long norms take, as modules of their own: forward and backward, each call waited for.

As published: a module of width h on an input of batch 4 and s tokens in bfloat16 ([4, h, s] for batch, group and
instance norm), forward and `sum().backward()` timed apart, medians of 50 calls. The backward time contains that of the
sum and autograd's own, which identity shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from subprocess import SubprocessError
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lab.errors import UserError, first_line
from lab.normalization.settings import Bench

Result = TypeVar("Result")

BATCH = 4
GROUPS = 32
EPS = 1e-6
#: a shape whose two medians differ by more than this share was disturbed, and counts as not measured
DISTURBED = 0.2
CHANNELS_FIRST = ("batch_norm", "group_norm_32", "instance_norm")


class EagerRmsNorm(nn.Module):
    """The RMSNorm of Transformers' models: five kernels forward."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normed [..., d]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return self.weight * normed.to(x.dtype)


def module(norm_type: str, width: int) -> Callable[[Tensor], Tensor]:
    """A norm by the name of its type.

    Raises:
        UserError: no such type.
    """
    made: dict[str, Callable[[], nn.Module]] = {
        "rms_norm_eager": lambda: EagerRmsNorm(width),
        "rms_norm_compiled": lambda: EagerRmsNorm(width),
        "layer_norm": lambda: nn.LayerNorm(width, eps=EPS),
        "batch_norm": lambda: nn.BatchNorm1d(width),
        "group_norm_32": lambda: nn.GroupNorm(GROUPS, width),
        "instance_norm": lambda: nn.InstanceNorm1d(width, affine=True),
        "identity": nn.Identity,
    }
    if norm_type not in made:
        raise UserError(f"unknown norm {norm_type!r}: choose one of {', '.join(made)}")
    return made[norm_type]()


@cache
def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why PyTorch's compiler does not work here, in one line, tried on a small norm; None if it does.

    On a CUDA device it needs Triton, a C compiler, and Python's headers.
    """
    norm = compiled(EagerRmsNorm(GROUPS).to(device, dtype))
    try:
        _backward(norm(inputs("rms_norm_compiled", GROUPS, 1, device, dtype)))
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        return first_line(error)
    return None


def compiled(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm compiled for the one shape that it meets.

    Norms share their code: without a reset the compiler takes a length that it has seen to change as variable, and
    what it makes of a shape depends on those before.
    """
    torch.compiler.reset()
    made: Callable[[Tensor], Tensor] = torch.compile(norm, dynamic=False)
    return made


def inputs(norm_type: str, width: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random input [4, s, h], or [4, h, s] for the norms whose channels come first; the same at every call."""
    generator = torch.Generator(device).manual_seed(42)
    shape = (BATCH, width, length) if norm_type in CHANNELS_FIRST else (BATCH, length, width)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(True)


def measured(
    norm_type: str, width: int, length: int, device: torch.device, dtype: torch.dtype, bench: Bench
) -> tuple[float, float]:
    """Median forward and backward time of one shape [ms]; NaN where a second series of calls disagrees."""
    norm = module(norm_type, width)
    assert isinstance(norm, nn.Module)
    norm = norm.to(device, dtype)
    compiles = norm_type == "rms_norm_compiled"
    call: Callable[[Tensor], Tensor] = compiled(norm) if compiles else norm
    x = inputs(norm_type, width, length, device, dtype)
    for _ in range(bench.compiled_warmup if compiles else bench.warmup):
        _backward(call(x))
    (forward, backward), (again, back_again) = (_medians(call, x, bench.calls) for _ in range(2))
    return agreed(forward, again), agreed(backward, back_again)


def agreed(first: float, second: float) -> float:
    """The smaller of two medians, or NaN where they differ by more than `DISTURBED` of it."""
    low, high = sorted((first, second))
    return low if high <= (1 + DISTURBED) * low else float("nan")


def _medians(call: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> tuple[float, float]:
    forward, backward = [], []
    for _ in range(calls):
        x.grad = None
        seconds, output = _timed(partial(call, x), x.device)
        forward.append(seconds)
        backward.append(_timed(partial(_backward, output), x.device)[0])
    return 1e3 * float(np.median(forward)), 1e3 * float(np.median(backward))


def _backward(output: Tensor) -> None:
    output.sum().backward()  # type: ignore[no-untyped-call]


def _timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    _wait(device)
    started = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
