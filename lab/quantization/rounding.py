"""Rounding of weights to few levels, and what it costs in relative error.

Every rule works on groups of consecutive weights inside a row (a group never crosses a row border) and returns
dequantized weights in the dtype it was given. `symmetric_amax` is the published rule: for b bits

    M = 2^(b-1) - 1,   s = max(max |w|, 1e-8) / M,   w_hat = s clip(round(w / s), -M - 1, M),

rounded half to even. Since |w / s| <= M, only 2^b - 1 of the 2^b levels are ever used, so that its "2 bits" are
ternary: -s, 0, s. The other rules use all levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from lab.errors import NotApplicable, UserError

SMALLEST_AMAX = 1e-8  #: a group of zeros keeps a finite scale
GAUSSIAN_WEIGHTS = 2**20  #: sample size of the error law: its own relative error is below 0.3 %
SEED = 20260704

#: Steps, in standard deviations, of the uniform quantizer with 2^b levels that is optimal for Gaussian values
#: (Max 1960, table II); where the search for a group's own step begins.
GAUSSIAN_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
MSE_ROUNDS = 4


def symmetric_amax(groups: Tensor, bits: int) -> Tensor:
    """The published rule; groups [n, g] in float32 -> dequantized [n, g]."""
    largest = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_AMAX).div_(largest)
    return (groups / scale).round_().clamp_(-largest - 1, largest).mul_(scale)


def symmetric_full_range(groups: Tensor, bits: int) -> Tensor:
    """All 2^b levels -2^(b-1) .. 2^(b-1) - 1 times max |w| / 2^(b-1); the largest positive weight is clipped."""
    half = 2 ** (bits - 1)
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_AMAX).div_(half)
    return (groups / scale).round_().clamp_(-half, half - 1).mul_(scale)


def asymmetric_minmax(groups: Tensor, bits: int) -> Tensor:
    """2^b levels evenly spaced from the group's minimum to its maximum."""
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    scale = (high - low).clamp_(min=SMALLEST_AMAX).div_(2**bits - 1)
    return ((groups - low) / scale).round_().mul_(scale).add_(low)


def mse_optimal(groups: Tensor, bits: int) -> Tensor:
    """2^b levels (k + 1/2) s around zero, the step s fitted to the group.

    Codes and step are improved in turn, neither of which can raise the error: codes by rounding, the step by least
    squares, s = sum(w c) / sum(c^2).
    """
    half = 2 ** (bits - 1)
    step = groups.square().mean(-1, keepdim=True).sqrt_().clamp_(min=SMALLEST_AMAX).mul_(GAUSSIAN_STEPS[bits])
    codes = _half_integers(groups, step, half)
    for _ in range(MSE_ROUNDS):
        step = (groups * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
        codes = _half_integers(groups, step.clamp_(min=SMALLEST_AMAX), half)
    return codes.mul_(step)


def _half_integers(groups: Tensor, step: Tensor, half: int) -> Tensor:
    return (groups / step).floor_().clamp_(-half, half - 1).add_(0.5)


SCHEMES: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "symmetric_amax": symmetric_amax,
    "symmetric_full_range": symmetric_full_range,
    "asymmetric_minmax": asymmetric_minmax,
    "mse_optimal": mse_optimal,
}


@dataclass(frozen=True)
class Rounding:
    """Round-to-nearest of weights.

    Attributes:
        bits: width of a code, 2 to 8.
        group: weights that share a scale; must divide the length of a row.
        scheme: one of `SCHEMES`.
    """

    bits: int
    group: int
    scheme: str = "symmetric_amax"

    @property
    def name(self) -> str:
        """E.g. `symmetric_amax-3-g64`."""
        return f"{self.scheme}-{self.bits}-g{self.group}"

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """Dequantized weight [out, in] in its own dtype.

        Args:
            weight: the matrix.
            place: which matrix of the model it is; rounding does not depend on it.

        Raises:
            UserError: the group size does not divide the length of a row.
        """
        if weight.shape[-1] % self.group:
            raise UserError(
                f"groups of {self.group} weights do not fit into rows of {weight.shape[-1]}: choose a group size that "
                "divides them"
            )
        groups = weight.float().reshape(-1, self.group)
        return SCHEMES[self.scheme](groups, self.bits).reshape(weight.shape).to(weight.dtype)


@dataclass(frozen=True)
class GaussianNoise:
    """Unbiased weight noise with the relative error of a rounding, but independent of the weights.

    Rounding errors at 3 bits and fewer depend on the weights (small ones vanish); this noise does not, nor does it
    know of any grid that the weights lie on.

    Attributes:
        relative_error: ||dW|| / ||W|| of every matrix.
        seed: of the noise; every matrix draws its own.
    """

    relative_error: float
    seed: int = SEED

    @property
    def name(self) -> str:
        """E.g. `noise-0.117-1`."""
        return f"noise-{self.relative_error:.6g}-{self.seed}"

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The matrix with noise added, in its own dtype."""
        generator = torch.Generator().manual_seed(self.seed + crc32(place.encode()))
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        size = self.relative_error * torch.linalg.norm(weight.float()) / torch.linalg.norm(noise)
        noisy: Tensor = (weight.float() + size * noise).to(weight.dtype)
        return noisy


def relative_error(weight: Tensor, rounded: Tensor) -> float:
    """||W - W_hat||_F / ||W||_F, summed in float64."""
    wide = weight.double()
    return float(torch.linalg.norm(wide - rounded.double()) / torch.linalg.norm(wide))


def gaussian_error(quantize: Callable[[Tensor], Tensor], columns: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error on independent Gaussian weights in rows of so many: what the rule alone costs."""
    generator = torch.Generator().manual_seed(SEED)
    rows = max(1, GAUSSIAN_WEIGHTS // columns)
    weight = torch.randn((rows, columns), generator=generator).to(dtype)
    return relative_error(weight, quantize(weight))


def largest_group(columns: set[int], sizes: tuple[int, ...]) -> int:
    """The largest of these group sizes that divides every row length.

    Raises:
        NotApplicable: none does.
    """
    fitting = [size for size in sizes if all(length % size == 0 for length in columns)]
    if not fitting:
        lengths = ", ".join(map(str, sorted(columns)))
        raise NotApplicable(f"no group size of {sizes} divides rows of {lengths} weights; this model cannot be rounded")
    return max(fitting)


def distinct_values(weight: Tensor, block: int = 32) -> float:
    """Mean number of distinct values among so many consecutive weights of a row.

    A matrix that once was stored in b bits, in blocks of at least this size, has at most 2^b of them, whatever it was
    converted to since. Freshly trained weights have nearly as many as there are places.
    """
    usable = weight[:, : weight.shape[1] // block * block].float().reshape(-1, block)
    ordered = usable.sort(dim=-1).values
    return float((ordered.diff(dim=-1) != 0).sum(-1).double().mean() + 1)
