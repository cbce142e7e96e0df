"""Whether a model is what it was, or what another process has."""

from __future__ import annotations

from typing import Any

import torch


def state(model: torch.nn.Module) -> tuple[Any, ...]:
    """What changes when someone replaces a module, hooks into one, or writes to a weight."""
    modules = [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks), module.__dict__.get("forward"))
        for name, module in model.named_modules()
    ]
    weights = [
        (name, id(weight), weight.data_ptr(), weight._version, weight.requires_grad, bits(weight))
        for name, weight in model.named_parameters()
    ]
    return *modules, *weights


def bits(weight: torch.Tensor) -> int:
    """The sum of a weight's bits as whole numbers, in which no change is rounded away; 10 GB/s on one core.

    PyTorch counts what is written to a tensor, but not what is written through its `.data`.
    """
    flat = weight.detach().reshape(-1)
    size = flat.element_size()
    aligned = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    return int(flat.view(torch.int64 if aligned else torch.uint8).sum(dtype=torch.int64))
