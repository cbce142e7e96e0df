"""Token batches: right-padded, sorted by length, with the positions whose loss counts.

A causal model cannot look to the right, so padding on the right never reaches a real token and no
attention mask is needed. Sorting by length keeps the padding small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

#: Share of a batch's tokens that a common prefix must save to be worth a second call per layer. What fills it up in
#: narrow dtypes is not counted. A call with 27 tokens takes 5 ms, one with 450 takes 41 (SmolLM2, one AVX2 core).
LEAST_SAVED = 0.1


@dataclass(frozen=True)
class TokenText:
    """Token ids of one text and the targets in it that are scored.

    Attributes:
        ids: all token ids: prompt and completion, without the end token.
        targets: indices into `ids` of the scored targets, rising, each at least 1; the target at
            index t is predicted from position t - 1.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Positions:
    """n scored positions of a batch: row [n], position [n] that predicts, target token id [n]."""

    row: Tensor
    position: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device | str) -> Positions:
        """The same positions on another device."""
        return Positions(self.row.to(device), self.position.to(device), self.target.to(device))


@dataclass(frozen=True)
class TokenBatch:
    """Some texts of a corpus as one right-padded matrix.

    Attributes:
        texts: index of each row in the corpus, length B.
        ids: token ids [B, T], int64, padded on the right with each row's last id (any id would do).
        lengths: number of real tokens per row [B].
        scored: the positions whose loss counts, ordered by row.
        prefix: token ids [P] with which every row begins, left out of all that is above; mostly none.
    """

    texts: tuple[int, ...]
    ids: Tensor
    lengths: Tensor
    scored: Positions
    prefix: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        scored, prefix = self.scored.to(device), self.prefix.to(device)
        return TokenBatch(self.texts, self.ids.to(device), self.lengths.to(device), scored, prefix)


def token_batches(texts: Sequence[TokenText], max_tokens: int) -> list[TokenBatch]:
    """Pack texts, sorted by length, into batches of at most `max_tokens` padded tokens.

    A single text longer than that forms a batch of its own.
    """
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index].ids), index))
    return [_batch(group, texts) for group in _groups(order, texts, max_tokens)]


def positions(batch: TokenBatch, targets: Sequence[Sequence[int]]) -> Positions:
    """Positions of other targets in the same batch.

    Args:
        batch: a batch of some texts.
        targets: for every text of the corpus (not only this batch's) indices of targets, each at least 1.

    Raises:
        ValueError: a target is predicted from within the batch's prefix, whose states nobody reads.
    """
    ids, first = batch.ids.tolist(), len(batch.prefix)  # all at once: every look at a device waits for what it is at
    wanted = [(row, t - first) for row, text in enumerate(batch.texts) for t in targets[text]]
    if any(t < 1 for _, t in wanted):
        raise ValueError("a target is predicted from before the batch's first position")
    return _positions([(row, t - 1, ids[row][t]) for row, t in wanted])


def prefix_apart(batch: TokenBatch, read: Positions | None = None) -> TokenBatch:
    """The same batch with what all of its rows begin with put apart, where that saves enough.

    Args:
        batch: several texts with their beginnings.
        read: positions that are read besides the scored ones; the prefix ends before all of them.
    """
    found = [places.position for places in (batch.scored, read) if places is not None]
    first = int(torch.cat([batch.lengths - 1, *found]).min())  # a row keeps its last token in any case
    alike = (batch.ids == batch.ids[:1]).all(0)[:first]
    length = int(alike.long().cumprod(0).sum())
    if length * (len(batch.ids) - 1) < LEAST_SAVED * batch.ids.numel():
        return batch
    scored = replace(batch.scored, position=batch.scored.position - length)
    return TokenBatch(batch.texts, batch.ids[:, length:], batch.lengths - length, scored, batch.ids[0, :length])


def _positions(scored: Sequence[tuple[int, int, int]]) -> Positions:
    row, position, target = torch.tensor(scored, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Positions(row, position, target)


def _groups(order: Iterable[int], texts: Sequence[TokenText], max_tokens: int) -> Iterable[list[int]]:
    group: list[int] = []
    for index in order:  # lengths rise, so the newest text is the widest
        if group and (len(group) + 1) * len(texts[index].ids) > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _batch(group: Sequence[int], texts: Sequence[TokenText]) -> TokenBatch:
    width = max(len(texts[index].ids) for index in group)
    rows = [texts[index].ids + texts[index].ids[-1:] * (width - len(texts[index].ids)) for index in group]
    scored = [(row, t - 1, texts[index].ids[t]) for row, index in enumerate(group) for t in texts[index].targets]
    lengths = torch.tensor([len(texts[index].ids) for index in group])
    return TokenBatch(tuple(group), torch.tensor(rows, dtype=torch.int64), lengths, _positions(scored))
