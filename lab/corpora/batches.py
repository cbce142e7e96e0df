"""Token batches: right-padded, sorted by length, with the positions whose loss counts.

A causal model cannot look to the right, so padding on the right never reaches a real token and no
attention mask is needed. Sorting by length keeps the padding small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    texts: tuple[int, ...]
    ids: Tensor
    lengths: Tensor
    scored: Positions

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(self.texts, self.ids.to(device), self.lengths.to(device), self.scored.to(device))


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
    """
    ids = batch.ids.tolist()  # all at once, since every look at a device waits for what it is at
    scored = [(row, t - 1, ids[row][t]) for row, text in enumerate(batch.texts) for t in targets[text]]
    return _positions(scored)


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
