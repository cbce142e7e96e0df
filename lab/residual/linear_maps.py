"""Linear maps in the place of decoder layers: ridge and reduced-rank regression, and the layer they stand in for.

A map predicts a layer's update, y ~ x W + b, from its input x [d]. Fits solve the normal equations in float64;
the penalty is relative to the mean eigenvalue of the inputs' second moments, lambda = rho tr(X^T X) / d, so that it
means the same for residual streams of any norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lab.subjects.calls import hidden_of

#: rho = lambda d / tr(X^T X). A few massive directions make up most of the trace, so that the best rho is near 0.1
#: to 1 for some thousand tokens; the grid goes two decades beyond, lest its edge decide.
PENALTIES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True)
class LinearMap:
    """x -> x W + b with W [d_in, d_out] and b [d_out], in float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Predictions [..., d_out] in float32."""
        return inputs.float() @ self.weight + self.bias


class Regression:
    """Ridge regression of y [n, d_out] on x [n, d_in] for any penalty, from one eigendecomposition.

    W(lambda) = Q (S + lambda)^-1 Q^T X^T Y with X^T X = Q S Q^T.

    Args:
        inputs, outputs: samples, any dtype.
        intercept: fit b too, on centred samples; otherwise b = 0, as published.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, *, intercept: bool = True):
        x, y = inputs.double(), outputs.double()
        self.centre = x.mean(0) if intercept else torch.zeros_like(x[0])
        self.level = y.mean(0) if intercept else torch.zeros_like(y[0])
        x = x - self.centre
        self.second_moments = x.T @ x
        self.eigenvalues, self.basis = torch.linalg.eigh(self.second_moments)
        self.projected = self.basis.T @ (x.T @ (y - self.level))

    def weight(self, rho: float) -> Tensor:
        """W [d_in, d_out] in float64 at the penalty lambda = rho tr(X^T X) / d_in."""
        penalty = rho * self.eigenvalues.mean()
        weight: Tensor = self.basis @ (self.projected / (self.eigenvalues + penalty)[:, None])
        return weight

    def map(self, weight: Tensor) -> LinearMap:
        """The map with this W, and the intercept that belongs to it."""
        return LinearMap(weight.float(), (self.level - self.centre @ weight).float())

    def best(self, inputs: Tensor, outputs: Tensor, penalties: Sequence[float] = PENALTIES) -> tuple[LinearMap, float]:
        """The map whose penalty gives the smallest squared error on held-out samples, and that penalty."""
        tried = [(self.map(self.weight(rho)), rho) for rho in penalties]
        return min(tried, key=lambda candidate: squared_error(candidate[0], inputs, outputs))

    def low_rank(self, rho: float, rank: int, *, by: str = "predictions") -> LinearMap:
        """The map cut to a rank.

        Args:
            rho: penalty.
            rank: of W.
            by: `predictions` keeps the leading principal directions of the predictions X W (reduced-rank
                regression, Izenman 1975), `weights` the leading singular triplets of W, as published: that ignores
                which inputs occur.
        """
        weight = self.weight(rho)
        if by == "weights":
            left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
            return self.map(left[:, :rank] * sizes[:rank] @ right[:rank])
        if by != "predictions":
            raise ValueError(f"cut by {by!r}; by predictions or by weights")
        _, directions = torch.linalg.eigh(weight.T @ self.second_moments @ weight)
        kept = directions[:, -rank:]
        return self.map(weight @ kept @ kept.T)


def squared_error(linear: Callable[[Tensor], Tensor], inputs: Tensor, outputs: Tensor) -> float:
    """Sum over samples and coordinates of the squared error, in float64."""
    return float((outputs.double() - linear(inputs).double()).square().sum())


class MappedLayer:
    """A decoder layer whose update comes from a linear map: a variant for the executor.

    Args:
        layer: the layer it stands in for.
        update: map from the layer's input to its update.
        norm: applied to the input before the map; None maps the residual stream itself.
        exact_first: the first so many positions keep the layer's own output. The first position holds the same
            token in every text and often an enormous update, which no other token shares.
    """

    def __init__(self, layer: nn.Module, update: Callable[[Tensor], Tensor], *, norm: Any = None, exact_first: int = 1):
        self.layer, self.update, self.norm, self.exact_first = layer, update, norm, exact_first

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """New states [k * B, T, d]."""
        read = hidden if self.norm is None else self.norm(hidden)
        states = (hidden.float() + self.update(read)).to(hidden.dtype)
        if self.exact_first:
            # The whole layer runs for it: call arguments cannot be cut to a few positions without knowing each.
            own = hidden_of(self.layer(hidden, *args, **kwargs))
            states[:, : self.exact_first] = own[:, : self.exact_first]
        return states
