"""Which of PyTorch's attention kernels a sweep may take."""

from __future__ import annotations

import torch


def avoid_plans_per_shape() -> None:
    """Keep cuDNN's attention out, for this process.

    It plans anew for every shape that it has not seen, and a sweep stacks its states in hundreds of shapes. On an H200
    the first sweep in batches of another size took a second more per batch, which has 36 shapes: 28 ms each. Flash
    attention has no plans; how fast it is beside cuDNN's was not measured.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
