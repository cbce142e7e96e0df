"""Texts and layer programs that the executor is calibrated on."""

from __future__ import annotations

import torch

from lab.corpora.batches import TokenText
from lab.residual.executor import Executor
from lab.residual.programs import identity, skip
from lab.subjects.tiny import LAYERS, VOCABULARY

N = LAYERS
KNOCKOUTS = [identity(N), *(skip(N, [layer]) for layer in range(N))]
ALL_PAIRS = [identity(N), *(skip(N, {i, j}) for i in range(N) for j in range(i, N))]
#: float32 rounding differs between stackings and threads, and tiny decoders with wide weights amplify it, to 3e-4 in
#: qwen3_next; another layer's mask, or rotary tables one position off, move states by 0.4 and more
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def texts(*lengths: int) -> list[TokenText]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]
    return [TokenText(row, tuple(range(len(row) // 2, len(row)))) for row in ids]


def final_states(executor: Executor, batch, programs):
    return executor.run(batch, programs, lambda states: {"final": states})["final"]


def pairs_cost(n: int) -> int:
    """Layer applications of the intact model, all single and all pair knockouts."""
    return n + n * (n - 1) // 2 + n * (n - 1) * (n - 2) // 6
