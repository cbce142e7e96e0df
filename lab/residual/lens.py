"""The logit lens: the residual stream at any depth, read out as if the network ended there.

    z = W Norm_final(h),    p = softmax(z)    (nostalgebraist 2020, "interpreting GPT: the logit lens")

Logits of all depths and positions would fill the memory many times over, so they are made in chunks of
rows and reduced at once, in buffers that are allocated one time: on a CPU fresh memory costs more than
the arithmetic.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lab.subjects import products
from lab.subjects.anatomy import Decoder

#: Size of each of the four buffers of logits and probabilities: products of many rows run faster.
CHUNK_BYTES = 48 * 2**20
ACCELERATOR_CHUNK_BYTES = 512 * 2**20
#: Size of the logits that are reduced together on a CPU: small enough to stay in the cache from one pass to the next.
BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Readings:
    """What the lens says at S depths about n positions; each [S, n], float32.

    Attributes:
        greater: entries with a logit strictly greater than the target's; the rank with ties in the target's favour.
        ties: other entries with the very logit of the target.
        target_log_probability: ln p(target), nat.
        entropy: -sum p ln p, nat. (The published eps of 1e-10 inside the logarithm moves it by less than 3e-5.)
        top_probability: largest entry of p.
        kl: KL(p at the last depth || p), nat; NaN if no divergences are read.
        step_kl: KL(p || p one depth before), nat; NaN at the first depth.
    """

    greater: Tensor
    ties: Tensor
    target_log_probability: Tensor
    entropy: Tensor
    top_probability: Tensor
    kl: Tensor
    step_kl: Tensor

    @property
    def mid_rank(self) -> Tensor:
        """Rank of the target [S, n], 0 = best: strictly greater entries plus half of the ties."""
        return self.greater + self.ties / 2


class LensHead:
    """Final norm and head of a decoder in one precision, writing into given memory.

    Args:
        decoder: the subject's decoder.
        dtype: precision of norm and product. float32 is fine enough to rank by; bfloat16 logits lie 0.125
            apart above 16, so that many entries tie.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype):
        self.dtype = dtype
        self._norm = copy.deepcopy(decoder.final_norm).to(dtype)
        self._head = decoder.unembedding
        self._weight, self._bias = self._head.cast(dtype)
        self._product: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """Number of logits, V."""
        return self._head.vocabulary

    def __call__(self, states: Tensor, out: Tensor) -> Tensor:
        """Logits of residual states [n, d], scaled and capped as the model does, in `out` [n, V], float32."""
        normed = self._norm(states.to(self.dtype))
        product = self._buffer(out)[: len(states)]
        products.linear_into(normed, self._weight, product)
        if self._bias is not None:
            product.add_(self._bias)
        shaped = self._head.shape_logits_(product)
        return shaped if shaped.data_ptr() == out.data_ptr() else out.copy_(shaped)

    def _buffer(self, out: Tensor) -> Tensor:
        if self.dtype == out.dtype:
            return out
        if self._product is None or len(self._product) < len(out):
            self._product = torch.empty(out.shape, dtype=self.dtype, device=out.device)
        return self._product


class Lens:
    """Reads states of all depths at the same positions.

    Positions are the outer loop, so that the final distribution of a position is at hand for the
    divergence of all its depths; depths run from last to first, so that it is the first to be made.

    Args:
        decoder: the subject's decoder.
        dtype: precision of norm and product, see `LensHead`; probabilities are float32 in either case.
        divergences: whether to read those.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype = torch.float32, *, divergences: bool = True):
        self.head = LensHead(decoder, dtype)
        self.divergences = divergences
        on_cpu = decoder.device.type == "cpu"
        row_bytes = 4 * self.head.vocabulary
        self.chunk_rows = max(1, (CHUNK_BYTES if on_cpu else ACCELERATOR_CHUNK_BYTES) // row_bytes)
        self.block_rows = max(1, BLOCK_BYTES // row_bytes) if on_cpu else self.chunk_rows

    @torch.no_grad()
    def read(self, states: Tensor, targets: Tensor) -> Readings:
        """Readings of residual states.

        Args:
            states: [S, n, d], from the first depth to the last, before the final norm.
            targets: token ids [n] that follow.
        """
        unread = states.new_full(states.shape[:2], torch.nan, dtype=torch.float32)
        readings = Readings(*(unread.clone() for _ in fields(Readings)))
        rows = min(self.chunk_rows, states.shape[1])
        # Probabilities are kept per row of the chunk: at the last depth, at the depth above, and at this one.
        logits, final, above, here = (torch.empty(rows, self.head.vocabulary, device=states.device) for _ in range(4))
        for start in range(0, states.shape[1], rows):
            chunk = slice(start, min(start + rows, states.shape[1]))
            for depth in reversed(range(len(states))):
                self.head(states[depth, chunk], logits[: chunk.stop - start])
                for first in range(start, chunk.stop, self.block_rows):
                    block = slice(first, min(first + self.block_rows, chunk.stop))
                    inside = slice(first - start, block.stop - start)
                    memory = _Memory(logits[inside], final[inside], above[inside], here[inside])
                    log_sum = _read_block(readings, depth, block, targets[block], memory)
                    if self.divergences:
                        _read_divergences(readings, depth, block, log_sum, memory)
                above, here = here, above
        return readings


@dataclass(frozen=True)
class _Memory:
    """Buffers [r, V] of one block: logits of this depth; probabilities at the last depth, the depth above, this one."""

    logits: Tensor
    final: Tensor
    above: Tensor
    here: Tensor


def _read_block(readings: Readings, depth: int, block: slice, targets: Tensor, memory: _Memory) -> Tensor:
    """Reduce the logits of one depth to readings of r positions.

    Leaves the probabilities in `memory.here`, and in `memory.logits` the logits less the largest one;
    returns ln sum exp of those [r].
    """
    z, p = memory.logits, memory.here
    target = z.gather(1, targets[:, None])
    # p is free until softmax fills it. Comparisons are written as float32, which sums five times faster than bool
    # and counts exactly up to 2^24 entries.
    readings.greater[depth, block] = torch.gt(z, target, out=p).sum(1)
    readings.ties[depth, block] = torch.eq(z, target, out=p).sum(1) - 1
    largest = z.amax(1, keepdim=True)
    # With the largest logit at 0, ln sum exp z is -ln of the largest probability, and differences of nearly equal
    # numbers stay small.
    z.sub_(largest)
    torch.softmax(z, dim=1, out=p)
    top = p.amax(1)
    log_sum = -top.log()
    readings.top_probability[depth, block] = top
    readings.target_log_probability[depth, block] = (target - largest)[:, 0] - log_sum
    readings.entropy[depth, block] = log_sum - torch.linalg.vecdot(p, z)
    return log_sum


def _read_divergences(readings: Readings, depth: int, block: slice, log_sum: Tensor, memory: _Memory) -> None:
    """KL(q || p) = cross entropy of q and p - entropy of q, for q the last depth's distribution and the one above."""
    last = len(readings.kl) - 1
    if depth == last:
        memory.final.copy_(memory.here)
    else:
        cross = log_sum - torch.linalg.vecdot(memory.above, memory.logits)
        readings.step_kl[depth + 1, block] = (cross - readings.entropy[depth + 1, block]).clamp(min=0)
    cross = log_sum - torch.linalg.vecdot(memory.final, memory.logits)
    readings.kl[depth, block] = (cross - readings.entropy[last, block]).clamp(min=0)
