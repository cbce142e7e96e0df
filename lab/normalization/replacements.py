"""What can take the place of an RMSNorm: other normalizations with its learned scale, and the lack of one.

x is one token's vector at the norm, mu and sigma^2 the mean and the variance (ddof 0) of its channels,
rms^2 = mean(x^2) = sigma^2 + mu^2. Sums are formed in float32 whatever the dtype of the states; the result is rounded
once. Scales are the model's own; there is no shift unless one is trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lab.errors import UserError
from lab.normalization.sites import Norm

Sink = Callable[[str, Tensor, Tensor], None]


class Replacement(nn.Module):
    """A module in the place of a norm: x [..., d] -> gain * normed(x) + shift [..., d], in the dtype of x.

    Args:
        norm: the norm replaced.
        eps_factor: multiplies the model's eps.
    """

    shift: nn.Parameter | None

    def __init__(self, norm: Norm, *, eps_factor: float = 1.0):
        super().__init__()
        self.token_axis = norm.token_axis
        self.eps = norm.eps * eps_factor
        self.gain = nn.Parameter(norm.gain.clone(), requires_grad=False)
        self.shift = None

    def train_affine(self) -> list[nn.Parameter]:
        """Make scale and shift, which starts at zero, trainable; returns them."""
        self.shift = nn.Parameter(torch.zeros_like(self.gain))
        self.gain.requires_grad_(True)
        return [self.gain, self.shift]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., d] of inputs [..., d]."""
        y = self.gain * self.normed(x.float())
        return (y if self.shift is None else y + self.shift).to(x.dtype)

    def normed(self, x: Tensor) -> Tensor:
        """The vector before scale and shift [..., d], in float32."""
        raise NotImplementedError

    def _rms_normed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def _later(self, x: Tensor) -> Tensor:
        """Whether each position is not the first, in a shape that broadcasts over x."""
        shape = [1] * x.dim()
        shape[self.token_axis] = x.shape[self.token_axis]
        return (torch.arange(x.shape[self.token_axis], device=x.device) > 0).reshape(shape)


class RmsNorm(Replacement):
    """gain * x / sqrt(rms^2 + eps): the model's own, formed anew."""

    def normed(self, x: Tensor) -> Tensor:
        """x over its root mean square [..., d]."""
        return self._rms_normed(x)


class LayerNorm(Replacement):
    """gain * (x - mu) / sqrt(sigma^2 + eps)."""

    def normed(self, x: Tensor) -> Tensor:
        """x centred, over its standard deviation [..., d]."""
        return self._rms_normed(x - x.mean(-1, keepdim=True))


class TokenGroupNorm(Replacement):
    """Layer norm of each group of d / G neighbouring channels, token by token."""

    def __init__(self, norm: Norm, groups: int):
        super().__init__(norm)
        self.groups = _divided(norm, groups)

    def normed(self, x: Tensor) -> Tensor:
        """Groups centred, over their own standard deviations [..., d]."""
        grouped = _in_groups(x, self.groups)
        return self._rms_normed(grouped - grouped.mean(-1, keepdim=True)).flatten(-2)


class JointGroupNorm(Replacement):
    """The same with mean and variance over a group's channels and *all positions* of the sequence: not causal.

    Padding would count; give it texts without.
    """

    def __init__(self, norm: Norm, groups: int):
        super().__init__(norm)
        self.groups = _divided(norm, groups)

    def normed(self, x: Tensor) -> Tensor:
        """Groups centred, over their own standard deviations [..., d]."""
        grouped = _in_groups(x, self.groups)
        over = (self.token_axis, -1)
        centred = grouped - grouped.mean(over, keepdim=True)
        return (centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + self.eps)).flatten(-2)


class FixedStatistics(Replacement):
    """gain_c * (x_c - m_c) / sqrt(v_c + eps) with constant m and v [d]: batch norm in evaluation mode."""

    mean: Tensor
    variance: Tensor

    def __init__(self, norm: Norm, mean: Tensor, variance: Tensor):
        super().__init__(norm)
        self.register_buffer("mean", mean.float())
        self.register_buffer("variance", variance.float())

    def normed(self, x: Tensor) -> Tensor:
        """Channels centred and scaled by constants [..., d]."""
        return (x - self.mean) * torch.rsqrt(self.variance + self.eps)


class FrozenScale(Replacement):
    """gain * x / s with one constant s per norm: scale and gain without adaptation to the token.

    Args:
        norm: the norm replaced.
        scale: s, a typical root mean square at this norm.
        first_exact: leave the first position its own root mean square, which massive activations make large.
    """

    def __init__(self, norm: Norm, scale: float, *, first_exact: bool = False):
        super().__init__(norm)
        self.scale, self.first_exact = scale, first_exact

    def normed(self, x: Tensor) -> Tensor:
        """x over the constant [..., d]."""
        frozen = x / self.scale
        return torch.where(self._later(x), frozen, self._rms_normed(x)) if self.first_exact else frozen


class NoGain(Replacement):
    """x / sqrt(rms^2 + eps): the learned scale alone is gone."""

    def __init__(self, norm: Norm):
        super().__init__(norm)
        self.gain = nn.Parameter(torch.ones_like(norm.gain), requires_grad=False)

    def normed(self, x: Tensor) -> Tensor:
        """x over its root mean square [..., d]."""
        return self._rms_normed(x)


class Identity(Replacement):
    """x: adaptation, scale and gain are all gone."""

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x


class Calibrating(Replacement):
    """Batch norm while its statistics are collected: normalizes each channel by the tokens that it is given.

    Args:
        norm: the norm replaced.
        real: which positions are tokens and no padding [B, T].
        mean, variance: running statistics to be updated [d]; both None starts at 0 and 1.
        momentum: weight of this batch in the running statistics, which take the unbiased variance as PyTorch's do;
            1 is exact pooled statistics (biased variance).
    """

    def __init__(
        self,
        norm: Norm,
        real: Tensor,
        *,
        momentum: float = 1.0,
        mean: Tensor | None = None,
        variance: Tensor | None = None,
    ):
        super().__init__(norm)
        self.norm, self.real, self.momentum = norm, real, momentum
        self.mean = torch.zeros_like(norm.gain) if mean is None else mean
        self.variance = torch.ones_like(norm.gain) if variance is None else variance

    def normed(self, x: Tensor) -> Tensor:
        """Channels centred and scaled by the batch's own statistics [B, T, d]."""
        tokens = x[self.real]
        mean, variance = tokens.mean(0), tokens.var(0, unbiased=False)
        unbiased = 1.0 if self.momentum == 1 else len(tokens) / (len(tokens) - 1)
        self.mean = (1 - self.momentum) * self.mean + self.momentum * mean
        self.variance = (1 - self.momentum) * self.variance + self.momentum * unbiased * variance
        return (x - mean) * torch.rsqrt(variance + self.eps)

    def fixed(self) -> FixedStatistics:
        """Evaluation mode: the norm with the statistics collected so far."""
        return FixedStatistics(self.norm, self.mean, self.variance)


class Tap(nn.Module):
    """A norm that tells what it was given and what it returned, and is else the norm itself.

    Args:
        norm: the module watched.
        role: handed on to the sink.
        sink: called as `sink(role, given, returned)`.
    """

    def __init__(self, norm: nn.Module, role: str, sink: Sink):
        super().__init__()
        self.norm, self.role, self.sink = norm, role, sink

    def forward(self, x: Tensor) -> Tensor:
        """What the norm returns [..., d]."""
        y: Tensor = self.norm(x)
        self.sink(self.role, x, y)
        return y


def _in_groups(x: Tensor, groups: int) -> Tensor:
    return x.reshape(*x.shape[:-1], groups, -1)


def _divided(norm: Norm, groups: int) -> int:
    width = len(norm.gain)
    if width % groups:
        raise UserError(f"{width} channels do not divide into {groups} groups")
    return groups
