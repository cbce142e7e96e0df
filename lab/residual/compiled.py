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

Layer = Callable[..., Any]


def layer_compiler(layers: Sequence[nn.Module], device: torch.device, wanted: bool) -> str | None:
    """The backend of `torch.compile` for these layers: `inductor` for large ones on a CUDA device, if it is wanted."""
    parameters = sum(parameter.numel() for parameter in layers[0].parameters())
    return "inductor" if wanted and device.type == "cuda" and parameters >= LEAST_PARAMETERS else None


class CompiledLayers:
    """Layers that are compiled when they are first called, once for all of them, for any number and length of texts.

    A layer with hooks runs as it is, since compiled code may not know hooks that came later. If the compiler fails, all
    layers run as they are from then on, and a warning says so.

    Args:
        layers: of a decoder.
        backend: of `torch.compile`: `inductor`, or for calibration `eager`, which traces and needs no compiler.
    """

    def __init__(self, layers: Sequence[nn.Module], backend: str):
        self.backend = backend
        self._compiled: list[Layer] | None = [torch.compile(layer, dynamic=True, backend=backend) for layer in layers]
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> Layer:
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import, and most runs need none of it

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._compiled is None or _has_hooks(self._layers[index]):
                return self._layers[index](*args, **kwargs)
            try:
                return self._compiled[index](*args, **kwargs)
            except TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                warnings.warn(
                    f"torch.compile fails on these layers ({first_line(cause)}); they run as they are",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._compiled = None
                return self._layers[index](*args, **kwargs)

        return call


def _has_hooks(layer: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
