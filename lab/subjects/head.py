"""The head of a decoder: hidden states to logits, in the precision a measurement asks for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import UserError
from lab.subjects import products

#: Configuration entries by which some architectures multiply (Cohere, Falcon-H1) or divide (Granite) their logits.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)


class Head:
    """Linear map to the vocabulary, then the model's own scaling and soft capping.

    logits = cap tanh(z / cap) with z = (W h + b) times a multiplier or over a divisor; most models have
    neither (cap: Gemma 2, arXiv:2408.00118, sec. 2).

    Args:
        linear: the model's output embedding.
        multiplier, divisor, cap: the model's constants.
    """

    def __init__(self, linear: nn.Module, *, multiplier: float = 1.0, divisor: float = 1.0, cap: float | None = None):
        self.linear = linear
        self.multiplier, self.divisor, self.cap = multiplier, divisor, cap
        self._weights: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    @property
    def vocabulary(self) -> int:
        """Number of logits, V."""
        return int(self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """The matrix W [V, d] in the model's dtype."""
        weight: Tensor = self.linear.weight  # type: ignore[assignment]
        return weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., d] in the model's dtype."""
        return self.shape_logits_(self.linear(hidden))

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits [..., V] in float32, the product taken in `dtype`."""
        return self.shape_logits_(self.product(hidden, dtype).float())

    def product(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """W h + b [..., V] of normed hidden states [..., d] in `dtype`, not yet scaled and capped."""
        weight, bias = self.cast(dtype)
        return products.linear(hidden.to(dtype), weight, bias)

    def shape_logits_(self, logits: Tensor) -> Tensor:
        """Scale and cap raw logits in place, as the model does."""
        if self.multiplier != 1:
            logits.mul_(self.multiplier)
        if self.divisor != 1:
            logits.div_(self.divisor)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The matrix W [V, d] and the bias [V], if there is one, in `dtype`.

        Cast once and kept; a cast to their own dtype copies nothing.
        """
        if dtype not in self._weights:
            bias = getattr(self.linear, "bias", None)
            self._weights[dtype] = (self.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
        return self._weights[dtype]


def possible_heads(model: Any, config: Any) -> tuple[Head, ...]:
    """The head as the configuration describes it, and the plain one.

    Some models ignore an entry of their configuration (Gemma 3 with vision does not cap its logits), so
    the caller compares with the model's own logits.

    Args:
        model: a causal language model of Transformers.
        config: the configuration of its text tower.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise UserError(f"{type(model).__name__} has no head over a vocabulary; load it as a causal language model")
    configured = Head(
        linear,
        multiplier=_product(config, MULTIPLIERS),
        divisor=_product(config, DIVISORS),
        cap=getattr(config, "final_logit_softcapping", None),
    )
    return configured, Head(linear)


def _product(config: Any, names: tuple[str, ...]) -> float:
    factors = (getattr(config, name, None) for name in names)
    return math.prod(float(factor) for factor in factors if factor is not None)
