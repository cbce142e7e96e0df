"""Losses of layer programs on layers that are compiled where it pays."""

from __future__ import annotations

from typing import Protocol

from lab.residual.compiled import layer_compiler
from lab.residual.executor import Executor
from lab.residual.sweeps import ProgramLosses
from lab.store import Sweep
from lab.subjects.anatomy import Decoder


class Settings(Protocol):
    """What an experiment's budget says of its layer programs."""

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per batch of texts."""

    @property
    def head_dtype(self) -> str:
        """Precision of the vocabulary projection."""

    @property
    def compiled(self) -> bool:
        """Whether large layers are compiled on a CUDA device."""


def compiled_losses(decoder: Decoder, budget: Settings, sweep: Sweep) -> ProgramLosses:
    """Losses of layer programs on a decoder, with an executor of its own; see `layer_compiler` for when it compiles."""
    compiler = layer_compiler(decoder.layers, decoder.device, budget.compiled)
    return ProgramLosses(Executor(decoder, compiler=compiler), sweep, budget.batch_tokens, budget.head_dtype)
