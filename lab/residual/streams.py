"""Work beside a CUDA device's queue, so that neither the device nor whoever feeds it waits without need.

PyTorch queues kernels on a stream, and a copy from or to the host's memory waits for all that its stream holds. So does
a model that looks at its own mask while it prepares one. On a stream of their own they wait for nothing but what they
need. Memory is handed out per stream: what is freed may be overwritten by later work of the stream that it came from,
while another stream still reads it. So these rules are kept here and by those who call this:

- What is prepared beside the queue is held until the queued work that reads it is done.
- Work beside the queue comes after a mark that is set when a sweep begins. Memory that an earlier sweep let go, even
  one that failed half-way, is overwritten only then.

On other devices all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream beside the queue of a CUDA device: every stream has workspaces of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def mark(device: torch.device) -> torch.cuda.Event | None:
    """The present end of the device's queue."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def beside(device: torch.device, after: torch.cuda.Event | None) -> Iterator[None]:
    """Work that waits for a mark, not for what was queued after it; what is queued later waits for this work."""
    if after is None:
        yield
        return
    queue, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_event(after)
    with torch.cuda.stream(side):
        yield
    queue.wait_stream(side)
