"""Decoder layers compiled for a CUDA device, where norms, rotary embeddings and activations would else move the memory.

A layer of Qwen3-4B reads and writes some 0.7 MB per token between its matrix products, one operation of Transformers'
code after the other; compiled, a fifth of that. Rounding differs: what is fused stays in float32 in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lab.errors import first_line

#: Parameters per layer from which compiling is worth its time: a smaller layer waits for its launches, not for memory.
LEAST_PARAMETERS = 30_000_000

Function = Callable[..., Any]


def layer_compiler(layers: Sequence[nn.Module], device: torch.device, wanted: bool) -> str | None:
    """The backend of `torch.compile` for these layers: `inductor` for large ones on a CUDA device, if it is wanted."""
    parameters = sum(parameter.numel() for parameter in layers[0].parameters())
    return "inductor" if wanted and device.type == "cuda" and parameters >= LEAST_PARAMETERS else None


class Compiled:
    """A function or layer that is compiled when it is first called, for any number and length of texts.

    A layer with hooks runs as it is, since compiled code may not know hooks that came later. If the compiler fails, the
    function runs as it is from then on, and a warning says so.

    Args:
        function: layers of one class share what was compiled for the first of them.
        backend: of `torch.compile`: `inductor`, or for calibration `eager`, which traces and needs no compiler.
    """

    def __init__(self, function: Function, backend: str):
        self.function = function
        self._compiled: Function | None = torch.compile(function, dynamic=True, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import, and most runs need none of it

        if self._compiled is None or _has_hooks(self.function):
            return self.function(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            message = f"torch.compile fails here ({first_line(cause)}); going on without it"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            self._compiled = None
            return self.function(*args, **kwargs)


def _has_hooks(function: Function) -> bool:
    modules = function.modules() if isinstance(function, nn.Module) else ()
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
