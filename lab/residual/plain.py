"""A model's own forward, one text at a time: what one would write first, and what the executor is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.corpora.batches import TokenText


@contextmanager
def layers_exchanged(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """The model itself runs these of its layers, in this order; then its own again."""
    inner, config = model.model, model.config
    kept, types = inner.layers, getattr(config, "layer_types", None)
    inner.layers = nn.ModuleList([kept[layer] for layer in layers])
    if types is not None:
        config.layer_types = [types[layer] for layer in layers]
    try:
        yield
    finally:
        inner.layers = kept
        if types is not None:
            config.layer_types = types


@torch.inference_mode()
def token_losses(model: nn.Module, text: TokenText) -> Tensor:
    """Loss of each scored token [n], nat, float32; logits of every position are formed."""
    device = next(model.parameters()).device
    ids, targets = torch.tensor([text.ids], device=device), torch.tensor(text.targets, device=device)
    logits = model(ids, use_cache=False).logits[0]
    return F.cross_entropy(logits[targets - 1].float(), ids[0, targets], reduction="none")


def plain_losses(model: nn.Module, texts: Sequence[TokenText]) -> list[float]:
    """Mean loss of each text [nat/token]."""
    return [float(token_losses(model, text).mean()) for text in texts]
