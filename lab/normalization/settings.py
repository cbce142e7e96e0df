"""Settings of the optional parts of T-15, apart from torch so that budgets can name them."""

from __future__ import annotations

from dataclasses import dataclass

#: the norms that the source timed
NORM_TYPES = (
    "rms_norm_eager",
    "rms_norm_compiled",
    "layer_norm",
    "batch_norm",
    "group_norm_32",
    "instance_norm",
    "identity",
)


@dataclass(frozen=True)
class Training:
    """How norms are trained: Adam on the completion loss of one batch per step.

    Attributes:
        steps: after how many steps the loss is read, rising.
        learning_rate: of scales and shifts.
        clip: largest norm of the gradient.
        batch_tokens: padded tokens per step.
    """

    steps: tuple[int, ...]
    learning_rate: float
    clip: float = 1.0
    batch_tokens: int = 512


@dataclass(frozen=True)
class Bench:
    """How timings are taken.

    Attributes:
        calls: timed calls, of which the median counts.
        warmup: calls before them.
        compiled_warmup: the same where a compiler works on the first call.
        widths, lengths: width h of the norm and tokens s per sequence.
        norm_types: see `NORM_TYPES`.
    """

    calls: int = 50
    warmup: int = 10
    compiled_warmup: int = 30
    widths: tuple[int, ...] = (2048, 2560, 4096)
    lengths: tuple[int, ...] = (512, 2048, 8192)
    norm_types: tuple[str, ...] = NORM_TYPES
