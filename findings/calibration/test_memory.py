"""Freed memory stays with the process while a sweep runs, and is handed back after loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lab.memory import _glibc, keep_freed_memory, release_freed_memory

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


def resident() -> int:
    """Bytes of this process's own memory that are in RAM."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads /proc, which only Linux has")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def test_released_memory_leaves_the_process():
    """A hundred megabytes in small freed blocks, below one that is still in use, go back to the kernel."""
    if _glibc("malloc_trim") is None:
        pytest.skip("this C library has no malloc_trim; its allocator is left as it is")
    blocks = [bytearray(20_000) for _ in range(5000)]
    held = resident()
    del blocks[:-1]
    release_freed_memory()
    assert resident() <= held - 80e6
