"""Freed memory stays with the process, so that a sweep does not spend its time in page faults."""

from __future__ import annotations

import pytest
import torch

from lab.residual.memory import keep_freed_memory

pytestmark = pytest.mark.calibration

FLOATS = 16 * 2**20  # 64 MiB: 16,384 pages, or 32 huge ones
ROUNDS = 40


def page_faults() -> int:
    """Page faults while a block is allocated, written and freed."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(FLOATS)
    faults: int = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


def test_freed_memory_is_used_again():
    """Once kept, a block of 64 MiB that is freed and allocated again costs next to no page faults.

    The heap may still grow a few times until it has a hole of that size.
    """
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt; its allocator is left as it is")
    fresh = [faults for faults in (page_faults() for _ in range(ROUNDS)) if faults >= 32]
    assert len(fresh) <= ROUNDS // 4, "every round mapped fresh memory"
