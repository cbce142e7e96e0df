"""Freed memory: kept within the process while a sweep runs, handed back after loading."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
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
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    accepted = [mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT), mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT)]
    return all(accepted)


def release_freed_memory() -> None:
    """Hand freed memory back to the kernel, where glibc holds it.

    Loading a model leaves two thirds of its size behind in freed blocks (170 MB of SmolLM2's 270),
    which a sweep would add its own to.
    """
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's; None on other systems and with other C libraries."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
