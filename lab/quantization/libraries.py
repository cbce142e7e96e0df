"""Whole-model quantizers of other libraries: bitsandbytes, torchao and GGUF.

Weight-only methods are used through what they do to a matrix: quantize with the library, dequantize with the library,
multiply as the model does. That is what their own forward computes (calibrated on tiny models), at the speed of
ordinary products. LLM.int8 also quantizes activations, so its layers run the library's own modules.

GPTQ, which needs texts, is in `lab.quantization.gptq`, the k-quants of GGUF are in `lab.quantization.ggml`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gguf.quants import quantize
from torch import Tensor, nn

from lab.quantization.ggml import coded
from lab.quantization.layers import matrices
from lab.quantization.whole_models import LIBRARIES

NF4_BLOCK = 64
#: bits per weight: a code, 8 bits for a block's scale, 32 per 256 of these for their own (Dettmers et al. 2023)
NF4_STORED = 4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * 256)
OUTLIER_THRESHOLD = 6.0  #: LLM.int8: activations beyond it keep 16 bits (Dettmers et al. 2022)


def installed_libraries() -> dict[str, str]:
    """Versions of those of the quantization libraries that are installed; a warning names the others, and the remedy.

    They are an extra of this project, and machines with a CUDA device often lack them: everything that does not need
    them is measured all the same.
    """
    found: dict[str, str] = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    missing = [name for name in LIBRARIES if name not in found]
    if missing:
        warnings.warn(
            f"not installed: {', '.join(missing)}; the record lacks their quantization methods. To have them, install "
            'them with `pip install -c constraints.txt -e ".[quantization]"` and measure with --fresh',
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def library_of(method: str) -> str | None:
    """The library that a method is of, by its name; None for methods of this project's own."""
    return next((name for name, methods in LIBRARIES.items() if method.startswith(methods)), None)


@dataclass(frozen=True)
class NormalFloat4:
    """bitsandbytes' 4-bit NormalFloat in blocks of 64, scales quantized once more (Dettmers et al. 2023)."""

    block: int = NF4_BLOCK

    @property
    def name(self) -> str:
        """`bitsandbytes_nf4`."""
        return "bitsandbytes_nf4"

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The matrix [out, in], quantized and dequantized."""
        with _quiet():
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            codes, state = quantize_4bit(
                weight.contiguous(), blocksize=self.block, quant_type="nf4", compress_statistics=True
            )
            restored: Tensor = dequantize_4bit(codes, state)
        return restored.reshape(weight.shape).to(weight.dtype)


@dataclass(frozen=True)
class TorchAO:
    """A weight-only configuration of torchao.

    Attributes:
        bits: 8 (`Int8WeightOnlyConfig`: a symmetric scale per output channel) or 4 (`IntxWeightOnlyConfig`:
            symmetric in groups; `Int4WeightOnlyConfig` has no kernel for CPUs).
        group: group size at 4 bits.
    """

    bits: int
    group: int | None = None

    @property
    def name(self) -> str:
        """`torchao_int8_weight_only` or `torchao_intx4_weight_only`."""
        return "torchao_int8_weight_only" if self.bits == 8 else "torchao_intx4_weight_only"

    def configuration(self) -> Any:
        """torchao's configuration object."""
        with _quiet():
            from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
            from torchao.quantization.granularity import PerGroup

            if self.bits == 8:
                return Int8WeightOnlyConfig()
            return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(self.group))  # type: ignore[attr-defined]

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The matrix [out, in], quantized and dequantized."""
        with _quiet():
            from torchao.quantization import quantize_

            holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
            holder[0].weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            quantize_(holder, self.configuration())
            restored: Tensor = holder[0].weight.dequantize()
        return restored.to(weight.dtype)


@dataclass(frozen=True)
class GGUF:
    """A block format of GGUF files, encoded and decoded by the `gguf` package.

    Attributes:
        kind: `Q8_0`, `Q5_0`, `Q5_1`, `Q4_0` or `Q4_1`: blocks of 32 weights, `_0` with a scale, `_1` also with an
            offset.
    """

    kind: str

    @property
    def name(self) -> str:
        """E.g. `gguf_q4_0`."""
        return f"gguf_{self.kind.lower()}"

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The matrix [out, in], quantized and dequantized."""
        return coded(weight, self.kind, quantize)


def int8_layer(layer: nn.Module) -> nn.Module:
    """A copy of a decoder layer whose linear maps are bitsandbytes' LLM.int8 modules."""
    return QuietInt8(to_int8_(copy.deepcopy(layer)))


def to_int8_(layer: nn.Module) -> nn.Module:
    """Put bitsandbytes' LLM.int8 modules in the place of a decoder layer's linear maps."""
    with _quiet():
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        for path, module in matrices(layer).items():
            replaced = Linear8bitLt(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                has_fp16_weights=False,
                threshold=OUTLIER_THRESHOLD,
                device="meta",
            )
            # Int8Params quantizes on its way from the CPU, wherever it goes.
            replaced.weight = Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            replaced.bias = module.bias
            _put(layer, path, replaced.to(module.weight.device))
    return layer


def to_nf4_(layer: nn.Module) -> nn.Module:
    """Put bitsandbytes' 4-bit modules in the place of a decoder layer's linear maps."""
    with _quiet():
        from bitsandbytes.nn import Linear4bit, Params4bit

        for path, module in matrices(layer).items():
            bias = module.bias is not None
            replaced = Linear4bit(module.in_features, module.out_features, bias=bias, quant_type="nf4", device="meta")
            replaced.weight = Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            replaced.bias = module.bias
            _put(layer, path, replaced.to(module.weight.device))
    return layer


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)


class QuietInt8(nn.Module):
    """Runs an LLM.int8 layer without its warning that bfloat16 activations are cast to float16."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        with _quiet():
            return self.layer(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    # Both libraries warn at import of kernels that they do not find, which says nothing about what is run here.
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
