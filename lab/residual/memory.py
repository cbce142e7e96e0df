"""Keeping freed memory within the process."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD = -1  # names and values of glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next allocation; returns whether it does.

    By default glibc hands every block above some 32 MiB back to the kernel, which must then map and
    zero it again: states of a batch are of that size, and a third of a CPU sweep goes into page
    faults. Only glibc on Linux has `mallopt`; elsewhere this does nothing, since other allocators
    keep freed blocks by themselves.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT), mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT)]
    return all(accepted)
