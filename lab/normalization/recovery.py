"""Training the norms alone: how much of a swap's damage do a few steps on their scales and shifts undo?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional

from lab.corpora.batches import TokenBatch
from lab.normalization.replacements import Replacement
from lab.normalization.settings import Training
from lab.normalization.surgery import Renormed, walk
from lab.subjects.anatomy import Decoder
from lab.subjects.head import Head

#: called after the steps at which the loss is to be read, with the model in its trained state
Checkpoint = Callable[[int, Renormed], None]


def train(swapped: Renormed, batches: Sequence[TokenBatch], training: Training, checkpoint: Checkpoint) -> None:
    """Train scales and shifts of the replaced norms; everything else is frozen.

    A step whose loss or gradient is not finite changes nothing. Once all texts in a row have changed nothing, none ever
    will, and the remaining checkpoints see the state as it is.

    Args:
        swapped: a decoder whose rule gives `Replacement`s. Its model is not written to.
        batches: training texts, used in turn; the loss is that of their scored tokens.
        training: see `Training`.
        checkpoint: called before the first step with 0, and after each of `training.steps`.
    """
    kept = _Kept(swapped)
    parameters = [parameter for module in kept.modules.values() for parameter in module.train_affine()]
    optimiser = torch.optim.Adam(parameters, lr=training.learning_rate)
    checkpoint(0, kept.renormed)
    places = [batch.to(swapped.decoder.device) for batch in batches]
    idle = 0
    for step, batch in zip(range(1, training.steps[-1] + 1), cycle(places), strict=False):
        if idle < len(places):
            optimiser.zero_grad()
            with torch.enable_grad():
                loss = completion_loss(kept.renormed, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            # Swaps that overflow on a text learn nothing from it; their loss, which is read, tells.
            learns = bool(torch.isfinite(nn.utils.clip_grad_norm_(parameters, training.clip)))
            idle = 0 if learns else idle + 1
            if learns:
                optimiser.step()
        if step in training.steps:
            checkpoint(step, kept.renormed)


def completion_loss(renormed: Renormed, batch: TokenBatch) -> Tensor:
    """Mean loss of a batch's scored tokens [nat/token], differentiable in the norms."""
    readable: Decoder = renormed.readable()
    *_, (_, final) = walk(renormed.decoder, batch, renormed.layer)
    hidden = readable.final_norm(final[batch.scored.row, batch.scored.position])
    return functional.cross_entropy(_logits(readable.unembedding, hidden).float(), batch.scored.target)


def _logits(head: Head, hidden: Tensor) -> Tensor:
    """Logits [n, V] of normed states [n, d]; the head's own way works in place, which gradients do not survive."""
    logits: Tensor = head.linear(hidden) * head.multiplier / head.divisor
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


class _Kept:
    """One replacement per norm that stays the same module from call to call, so that it can learn."""

    def __init__(self, swapped: Renormed):
        self.modules: dict[tuple[int, str], Replacement] = {}
        norms = [norm for own in swapped.norms.layers for role, norm in own.items() if role in swapped.roles]
        norms += [swapped.norms.final] * (swapped.norms.final.role in swapped.roles)
        for norm in norms:
            made = swapped.rule(norm)
            assert isinstance(made, Replacement)
            self.modules[norm.layer, norm.role] = made
        self.renormed = Renormed(
            swapped.decoder, swapped.norms, swapped.roles, lambda norm: self.modules[norm.layer, norm.role]
        )
