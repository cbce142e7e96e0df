"""Which of PyTorch's attention kernels a sweep may take."""

from __future__ import annotations

import torch


def avoid_plans_per_shape() -> None:
    """Keep cuDNN's attention out, for this process.

    It plans anew for every shape that it has not seen, 28 ms on an H200, and a sweep stacks its states in hundreds of
    shapes: plans took 17 of a first sweep's 45 seconds. Flash attention has none, and is nearly as fast.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
