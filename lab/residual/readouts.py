"""Readouts: what a program's final states say about the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from lab.corpora.batches import Positions, TokenBatch
from lab.residual.compiled import compiled_function
from lab.subjects.anatomy import Decoder
from lab.subjects.head import Head

#: Logits at a time. On a CPU 128 rows of SmolLM2's vocabulary: 256 rows take no less time in a sweep and 106 MB more,
#: with 64 the product with the vocabulary matrix takes a fifth longer. Accelerators have the memory, and need it to be
#: busy.
CPU_CHUNK_LOGITS = 128 * 49_152
ACCELERATOR_CHUNK_LOGITS = 2**27
MIN_CHUNK_ROWS = 32
#: Rows of logits that are normalized at a time on a CPU. An accelerator would wait for its launches, and holds a second
#: copy of a chunk with ease.
SOFTMAX_ROWS = 16


class CompletionLoss:
    """Per-prompt sums of the loss over scored positions, and of the distance to the intact model.

    Each scored position i of row r adds to the sums of prompt r

        loss                 -ln p(x_i)                       [nat]
        kl                   sum_v q(v) (ln q(v) - ln p(v))   [nat], q the intact model's distribution
        agreement            1 if the intact model's top token is a top token of the program, else 0
        target_probability   p(x_i)

    Dividing by the number of scored positions gives means. Only scored positions pass the norm and the
    head, in chunks: positions outermost, so that the intact model's distribution is computed once for
    all programs. Log-softmax is taken in float32, sums in float64.

    Args:
        decoder: the model under study.
        batch: the batch whose states are read.
        head_dtype: precision of the product with the vocabulary matrix: bfloat16 rounds logits to 8 bits
            (up to 0.06 at a logit of 20), float32 does not; the matrix is cast once.
        chunk_rows: rows of logits at a time, positions times programs; None takes as many as memory suggests.
        reference: the intact model's final states [B, T, d], before the final norm; with it `kl` and
            `agreement` are read.
        positions: other positions than the batch's scored ones.
        target_probability: whether to read it.
        compiler: backend of `torch.compile` for reading nothing but the loss: the sums run over the logits as the
            product leaves them, without a copy in float32; see `lab.residual.compiled`.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: TokenBatch,
        *,
        head_dtype: torch.dtype = torch.bfloat16,
        chunk_rows: int | None = None,
        reference: Tensor | None = None,
        positions: Positions | None = None,
        target_probability: bool = False,
        compiler: str | None = None,
    ):
        scored = batch.scored if positions is None else positions
        self.decoder = decoder
        self.positions = scored.to(decoder.device)
        self.n_rows = len(batch.lengths)
        self.head_dtype = head_dtype
        self.chunk_rows = chunk_rows or rows_at_a_time(decoder)
        self.target_probability = target_probability
        self.reference = None if reference is None else self._scored(reference[None])[0]
        alone = compiler if reference is None and not target_probability else None
        self._compiled = compiled_function(_target_log_probability, alone) if alone else None
        # Sums over a mask have a fixed order, which adding by index has not on a CUDA device.
        self._of_row = self.positions.row[:, None] == torch.arange(self.n_rows, device=decoder.device)

    @torch.no_grad()
    def __call__(self, states: Tensor) -> dict[str, Tensor]:
        """Sums [k, B] in float64 for final states [k, B, T, d]."""
        hidden = self._scored(states)
        width = max(1, min(self.chunk_rows, len(self.positions)))
        at_once = max(1, self.chunk_rows // width)
        sums: dict[str, Tensor] = {}
        for start in range(0, max(1, len(self.positions)), width):
            chosen = slice(start, start + width)
            intact = None if self.reference is None else _Intact(self._log_probabilities(self.reference[chosen]))
            for first in range(0, len(hidden), at_once):
                programs = slice(first, first + at_once)
                for name, values in self._measured(hidden[programs, chosen], chosen, intact).items():
                    total = sums.setdefault(name, values.new_zeros((len(hidden), self.n_rows)))
                    total[programs] += torch.where(self._of_row[chosen], values[..., None], 0).sum(1)
        return sums

    def _measured(self, hidden: Tensor, chosen: slice, intact: _Intact | None) -> dict[str, Tensor]:
        """Values [k, c] in float64 of k programs at c positions."""
        if self._compiled is not None:
            head = self.decoder.unembedding
            product = head.product(self.decoder.final_norm(hidden), self.head_dtype)
            return {"loss": -self._compiled(head, product, self.positions.target[chosen]).double()}
        log_p = self._log_probabilities(hidden)
        target = log_p.gather(-1, self.positions.target[chosen].expand(len(hidden), -1)[..., None])[..., 0].double()
        values = {"loss": -target}
        if self.target_probability:
            values["target_probability"] = target.exp()
        if intact is not None:
            values["agreement"] = intact.agreement(log_p)
            values["kl"] = intact.kl_(log_p)
        return values

    def _scored(self, states: Tensor) -> Tensor:
        return states[:, self.positions.row, self.positions.position]

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """ln p [..., V] in float32 of residual streams [..., d]."""
        return log_softmax_(self.decoder.unembedding.logits(self.decoder.final_norm(hidden), self.head_dtype))


def _target_log_probability(head: Head, product: Tensor, target: Tensor) -> Tensor:
    """ln p(x) [k, c] in float32 of targets [c], for the head's products [k, c, V]."""
    logits = head.shape_logits_(product.float())
    top = logits.amax(-1, keepdim=True)
    total = (logits - top).exp().sum(-1).log() + top[..., 0]
    return logits.gather(-1, target.expand(len(logits), -1)[..., None])[..., 0] - total


def log_softmax_(logits: Tensor) -> Tensor:
    """ln softmax(z) over the last axis of contiguous z [..., V]; on a CPU over z itself, a few rows at a time."""
    if logits.device.type != "cpu":
        return torch.log_softmax(logits, dim=-1)
    for rows in torch.split(logits.view(-1, logits.shape[-1]), SOFTMAX_ROWS):
        rows.copy_(torch.log_softmax(rows, dim=-1))
    return logits


def rows_at_a_time(decoder: Decoder) -> int:
    """Rows of logits that a readout holds at once: fewer the larger the vocabulary, many on an accelerator."""
    logits = CPU_CHUNK_LOGITS if decoder.device.type == "cpu" else ACCELERATOR_CHUNK_LOGITS
    return max(MIN_CHUNK_ROWS, logits // decoder.vocabulary)


class _Intact:
    """The intact model's distributions at c positions; log_q [c, V] in float32."""

    def __init__(self, log_q: Tensor):
        self.log_q = log_q
        self.q = log_q.exp()
        self.top = log_q.argmax(-1)

    def agreement(self, log_p: Tensor) -> Tensor:
        """1 where the intact model's top token is a top token of log_p [k, c, V] too, else 0 [k, c]."""
        top = log_p.gather(-1, self.top.expand(len(log_p), -1)[..., None])[..., 0]
        return (top == log_p.amax(-1)).double()

    def kl_(self, log_p: Tensor) -> Tensor:
        """KL(q || p) [k, c] for log_p [k, c, V], which is overwritten: vocabularies are too large for copies."""
        return log_p.neg_().add_(self.log_q).mul_(self.q).sum(-1).double()
