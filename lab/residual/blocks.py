"""Blocks of states that fit into memory, found by trying."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from lab.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_blocks(
    items: Sequence[Item], size: int, function: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Blocks of at most `size` items with the function's result; halves the size when memory runs out."""
    start = 0
    while start < len(items):
        block = items[start : start + size]
        try:
            result = function(block)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(block) == 1:
                raise UserError("out of memory with a single state; measure fewer tokens per batch") from error
            size = max(1, min(size, len(block)) // 2)
            warnings.warn(f"out of memory; going on with {size} states at a time", RuntimeWarning, stacklevel=2)
            continue
        yield block, result
        start += len(block)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a class of its own for accelerators only; a failed allocation on the CPU is a bare RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
