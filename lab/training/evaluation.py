"""Evaluation under teacher forcing: the loss of every target, and whether it is the model's first choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lab.corpora.batches import Positions, TokenText, token_batches
from lab.corpora.exercises import Exercise
from lab.errors import UserError
from lab.residual.readouts import rows_at_a_time
from lab.store import Arrays
from lab.subjects.anatomy import Decoder


@torch.no_grad()
def target_readings(
    decoder: Decoder, texts: Sequence[TokenText], batch_tokens: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every text the losses of its targets [nat], and whether each is the argmax, both [targets].

    Logits are float32 whatever the model's dtype.

    Raises:
        UserError: a loss is not finite.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(texts)
    for batch in token_batches(texts, batch_tokens):
        here = batch.to(decoder.device)
        losses, right = [], []
        for logits, target in _logits(decoder, here.ids, here.scored):
            log_p = torch.log_softmax(logits, dim=-1)
            losses.append(-log_p.gather(-1, target[:, None])[:, 0].double().cpu().numpy())
            right.append((log_p.argmax(-1) == target).cpu().numpy())
        loss, hit = np.concatenate(losses), np.concatenate(right)
        if not np.isfinite(loss).all():
            raise UserError("the loss of an evaluated text is not finite; check the weights and the adapter")
        rows = batch.scored.row.numpy()
        for row, text in enumerate(batch.texts):
            found[text] = loss[rows == row], hit[rows == row]
    return found


def _logits(decoder: Decoder, ids: Tensor, scored: Positions) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [c, V] and targets [c], a chunk at a time."""
    hidden = decoder.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    chosen = hidden[scored.row, scored.position]
    head, count = decoder.unembedding, rows_at_a_time(decoder)
    for rows, target in zip(torch.split(chosen, count), torch.split(scored.target, count), strict=True):
        yield head.logits(rows, torch.float32), target


def exercise_readings(decoder: Decoder, exercises: Sequence[Exercise], batch_tokens: int) -> Arrays:
    """`nll`, the mean loss on the digits of results, and `accuracy`, 1 where every token is right [exercise]."""
    read = target_readings(decoder, [exercise.text for exercise in exercises], batch_tokens)
    nll, accuracy = [], []
    for exercise, (losses, right) in zip(exercises, read, strict=True):
        nll.append(losses[np.isin(exercise.solution, exercise.results)].mean())
        accuracy.append(float(right.all()))
    return {"nll": np.array(nll), "accuracy": np.array(accuracy)}
