"""The logit lens on pairs: how far two states' distributions diverge, and which of two tokens a state prefers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lab.residual.lens import ACCELERATOR_CHUNK_BYTES, CHUNK_BYTES, LensHead
from lab.store import Arrays
from lab.subjects.anatomy import Decoder


@dataclass(frozen=True)
class PairRows:
    """n pairs of states, as indices into a list of states; each [n], int.

    Attributes:
        a, b: the states at the pivot.
        before: the state before it, which both sequences share.
        token_a, token_b: the tokens at the pivot, which `before` could predict.
    """

    a: np.ndarray
    b: np.ndarray
    before: np.ndarray
    token_a: np.ndarray
    token_b: np.ndarray

    def __len__(self) -> int:
        return len(self.a)


def divergences(log_a: Tensor, log_b: Tensor) -> dict[str, Tensor]:
    """Divergences [...] of distributions p_a and p_b, from ln p [..., V]; nat.

    `kl_divergence` is KL(p_b || p_a), `reverse_kl_divergence` KL(p_a || p_b), `js_divergence` the Jensen-Shannon
    divergence KL(p_a || m)/2 + KL(p_b || m)/2 with m the mean of both, at most ln 2.
    """
    a, b = log_a.exp(), log_b.exp()
    difference = log_b - log_a
    # ln(2 m) - ln p_a = ln(1 + p_b / p_a), so that neither logarithm meets a 0
    to_mean = (a * _softplus(difference)).sum(-1) + (b * _softplus(-difference)).sum(-1)
    return {
        "kl_divergence": (b * difference).sum(-1),
        "reverse_kl_divergence": -(a * difference).sum(-1),
        "js_divergence": np.log(2) - to_mean / 2,
    }


def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


class PairLens:
    """Reads pairs of residual states through the final norm and the head.

    Args:
        decoder: the subject's decoder.
        dtype: precision of norm and head; float32 is the sound one, for bfloat16 logits near 40 lie 0.25 apart.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype = torch.float32):
        self.head = LensHead(decoder, dtype)
        self.device = decoder.device
        chunk_bytes = CHUNK_BYTES if decoder.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
        self.chunk_rows = max(2, chunk_bytes // (4 * self.head.vocabulary))

    @torch.no_grad()
    def read(self, states: Tensor, pairs: PairRows) -> Arrays:
        """Readings at one depth, each [n], float32.

        Args:
            states: residual streams [m, d] at one depth, before the final norm.
            pairs: which of them belong together.

        Returns:
            `kl_divergence`, `reverse_kl_divergence`, `js_divergence`, see `divergences`; `entropy_a`, `entropy_b` of
            p_a and p_b; and of the distribution before the pivot `preference_margin` = ln p(token_a) - ln p(token_b),
            and the mid-ranks `rank_a`, `rank_b` of both tokens.
        """
        found: dict[str, np.ndarray] = {}
        for chunk, rows in self._chunks(np.stack([pairs.a, pairs.b])):
            self._keep(found, chunk, len(pairs), self._at_pivot(states, rows, pairs.a[chunk], pairs.b[chunk]))
        for chunk, rows in self._chunks(pairs.before[None]):
            tokens = (torch.from_numpy(ids[chunk]).to(self.device) for ids in (pairs.token_a, pairs.token_b))
            self._keep(found, chunk, len(pairs), self._before(states, rows, pairs.before[chunk], *tokens))
        return found

    def _at_pivot(self, states: Tensor, rows: np.ndarray, a: np.ndarray, b: np.ndarray) -> list[dict[str, Tensor]]:
        log_p = torch.log_softmax(self._logits(states, rows), dim=-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        readings = []
        # pair by pair: two rows stay in the cache, a chunk of pairs would not
        for i, j in zip(np.searchsorted(rows, a), np.searchsorted(rows, b), strict=True):
            own = {"entropy_a": entropy[i], "entropy_b": entropy[j]}
            readings.append(divergences(log_p[i], log_p[j]) | own)
        return readings

    def _before(
        self, states: Tensor, rows: np.ndarray, before: np.ndarray, token_a: Tensor, token_b: Tensor
    ) -> list[dict[str, Tensor]]:
        logits = self._logits(states, rows)
        readings = []
        for row, a, b in zip(np.searchsorted(rows, before), token_a, token_b, strict=True):
            z = logits[row]
            # logits differ by the same constant from log-probabilities
            margin = {"preference_margin": z[a] - z[b]}
            readings.append(margin | {"rank_a": _mid_rank(z, a), "rank_b": _mid_rank(z, b)})
        return readings

    def _logits(self, states: Tensor, rows: np.ndarray) -> Tensor:
        out = torch.empty(len(rows), self.head.vocabulary, device=self.device)
        return self.head(states[torch.from_numpy(rows)].to(self.device), out)

    def _chunks(self, needed: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Consecutive pairs, by index, and the distinct rows [r] that they need, at most as many as a chunk holds."""
        start, held = 0, set[int]()
        for pair, own in enumerate(needed.T.tolist()):
            if held and len(held | set(own)) > self.chunk_rows:
                yield np.arange(start, pair), np.array(sorted(held))
                start, held = pair, set()
            held |= set(own)
        if held:
            yield np.arange(start, needed.shape[1]), np.array(sorted(held))

    @staticmethod
    def _keep(found: Arrays, chunk: np.ndarray, n: int, readings: list[dict[str, Tensor]]) -> None:
        for name in readings[0]:
            values = torch.stack([reading[name] for reading in readings]).float().cpu().numpy()
            found.setdefault(name, np.empty(n, np.float32))[chunk] = values


def _mid_rank(logits: Tensor, token: Tensor) -> Tensor:
    """Rank of a token, 0 = best: strictly greater logits plus half of the ties."""
    greater, equal = (logits > logits[token]).sum(), (logits == logits[token]).sum() - 1
    return greater + equal / 2
