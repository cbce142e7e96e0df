"""The training loop: AdamW on an adapter's parameters, linear warm-up and a cosine, loss on solutions alone.

Everything that is random comes from the seed: on one thread of one machine two runs are the same bit for bit. The head
is applied to positions whose token is learned and to no others; they are less than half of all, and the vocabulary is
the largest matrix of a small model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.adapters.merging import schedule
from lab.corpora.batches import Positions, TokenBatch, TokenText, token_batches
from lab.errors import UserError
from lab.subjects.anatomy import Decoder

WINDOW = 8  #: batches whose texts are sorted by length together, so that little is padded


@dataclass(frozen=True)
class Settings:
    """How an adapter is trained.

    Attributes:
        learning_rate: peak, reached when the warm-up ends.
        steps: of the optimizer, one batch each.
        batch: texts per step.
        warmup: steps of the warm-up.
        seed: of the order of the texts.
        clip: largest norm of a gradient.
    """

    learning_rate: float
    steps: int
    batch: int
    warmup: int
    seed: int
    clip: float = 1.0


@dataclass(frozen=True)
class Log:
    """What a training went through.

    Attributes:
        losses: mean loss of each step's learned tokens, before the step [nat/token].
        gradient_norms: norm of each step's gradient before clipping.
        tokens: tokens read, padding left out.
        seconds: of the whole loop.
    """

    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    tokens: int
    seconds: float


def train(
    decoder: Decoder,
    parameters: Sequence[Tensor],
    texts: Sequence[TokenText],
    settings: Settings,
    report: Callable[[int, float], None] | None = None,
) -> Log:
    """Train an adapter that is attached to a decoder.

    Args:
        decoder: its weights are frozen; only `parameters` change.
        parameters: the adapter's, in float32.
        texts: what is learned: their targets.
        settings: see `Settings`.
        report: called as `report(steps done, loss)` after every step.

    Raises:
        UserError: the loss or a gradient is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    losses, norms, tokens = [], [], 0
    started = time.perf_counter()
    for step, batch in enumerate(training_batches(texts, settings)):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, settings.learning_rate, settings.steps, settings.warmup)
        optimizer.zero_grad(set_to_none=True)
        loss = solution_loss(decoder, batch.to(decoder.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise UserError(
                f"training diverged at step {step}: the loss is {float(loss.detach()):g}; choose a lower rate"
            )
        optimizer.step()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
        tokens += int(batch.lengths.sum())
        if report is not None:
            report(step + 1, losses[-1])
    return Log(tuple(losses), tuple(norms), tokens, time.perf_counter() - started)


def training_batches(texts: Sequence[TokenText], settings: Settings) -> Iterator[TokenBatch]:
    """A batch for every step: texts in a shuffled order, every one before any comes again, alike lengths together."""
    generator = np.random.default_rng([settings.seed, 18])
    needed = settings.steps * settings.batch
    rounds = [generator.permutation(len(texts)) for _ in range(-(-needed // len(texts)))]
    order = np.concatenate(rounds)[:needed].tolist()
    for start in range(0, needed, WINDOW * settings.batch):
        window = sorted(order[start : start + WINDOW * settings.batch], key=lambda index: len(texts[index].ids))
        groups = [window[first : first + settings.batch] for first in range(0, len(window), settings.batch)]
        for place in generator.permutation(len(groups)):
            chosen = [texts[index] for index in groups[place]]
            yield token_batches(chosen, sum(len(text.ids) for text in chosen) * len(chosen))[0]


def solution_loss(decoder: Decoder, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of the batch's targets [nat/token], in float32."""
    return F.cross_entropy(target_logits(decoder, batch.ids, batch.scored), batch.scored.target)


def target_logits(decoder: Decoder, ids: Tensor, scored: Positions) -> Tensor:
    """Logits [n, V] in float32 that predict the targets, by the model's own forward up to the head.

    Nothing is written in place, as `Head` does: gradients pass.
    """
    hidden = decoder.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    head = decoder.unembedding
    weight, bias = head.cast(torch.float32)
    logits = F.linear(hidden[scored.row, scored.position].float(), weight, bias) * head.multiplier / head.divisor
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
