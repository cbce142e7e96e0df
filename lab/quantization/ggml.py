"""llama.cpp's k-quants: GGUF formats whose blocks of 256 weights hold 8 or 16 small blocks with 6- or 8-bit scales.

The `gguf` package decodes them but has no encoder. llama.cpp's own, `ggml_quantize_chunk` of its C interface, is in the
library that `xllamacpp` brings as a wheel. What it encodes is decoded by the `gguf` package, an implementation apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from lab.errors import UserError

SYMBOL = "ggml_quantize_chunk"
#: What llama.cpp writes where a row is no whole number of 256-weight blocks: the next larger format with blocks of 32.
FALLBACKS: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class KQuant:
    """A k-quant, encoded by llama.cpp without an importance matrix and decoded by the `gguf` package.

    Attributes:
        kind: one of `FALLBACKS`.
    """

    kind: str

    @property
    def name(self) -> str:
        """E.g. `gguf_q4_k`."""
        return f"gguf_{self.kind.lower()}"

    def format_of(self, columns: int) -> str:
        """The format of a matrix with rows of so many weights: this one, or llama.cpp's fallback."""
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return FALLBACKS[self.kind] if columns % block else self.kind

    def stored_bits(self, columns: int) -> float:
        """Bits per weight in rows of so many, scales included."""
        return stored_bits(self.format_of(columns))

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The matrix [out, in], quantized and dequantized.

        Raises:
            UserError: the encoder cannot be had, or rows hold no whole number of 32-weight blocks either.
        """
        return coded(weight, self.format_of(weight.shape[-1]), encode)


def coded(weight: Tensor, kind: str, encoder: Callable[[np.ndarray, GGMLQuantizationType], np.ndarray]) -> Tensor:
    """A matrix [out, in] encoded by one implementation and decoded by the `gguf` package, in its own dtype."""
    found = GGMLQuantizationType[kind]
    codes = encoder(np.ascontiguousarray(weight.float().cpu().numpy()), found)
    restored = torch.from_numpy(np.ascontiguousarray(dequantize(codes, found)))
    return restored.reshape(weight.shape).to(device=weight.device, dtype=weight.dtype)


def stored_bits(kind: str) -> float:
    """Bits per weight of a GGUF format, scales included."""
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return float(8 * size / weights)


def encode(weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Codes [rows, bytes] of float32 weights [rows, columns], in as many threads as PyTorch uses.

    Raises:
        UserError: rows hold no whole number of blocks.
    """
    (rows, columns), (block, size) = weight.shape, GGML_QUANT_SIZES[kind]
    if columns % block:
        raise UserError(f"rows of {columns} weights are no whole number of {kind.name}'s blocks of {block} weights")
    codes = np.zeros((rows, columns // block * size), np.uint8)
    function = _encoder()

    def part(start: int, stop: int) -> None:
        # Rows are encoded one by one, so that a part of them is a matrix of its own.
        source, target = weight[start:stop], codes[start:stop]
        written = function(kind, source.ctypes.data, target.ctypes.data, 0, stop - start, columns, None)
        if written != target.nbytes:
            raise UserError(f"llama.cpp wrote {written} bytes of {kind.name} where {target.nbytes} were expected")

    bounds = np.linspace(0, rows, min(rows, torch.get_num_threads()) + 1).astype(int).tolist()
    with ThreadPoolExecutor() as pool:
        list(pool.map(part, bounds[:-1], bounds[1:]))
    return codes


@cache
def _encoder() -> Callable[..., int]:
    """`size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)` of ggml.h."""
    found = find_spec("xllamacpp")
    places = (found.submodule_search_locations if found else None) or ()
    libraries = [path for place in places for path in Path(place).glob("xllamacpp*.so")]
    if not libraries:
        raise UserError(
            'no encoder of k-quants: install llama.cpp\'s with `pip install -c constraints.txt -e ".[quantization]"`'
        )
    function = getattr(ctypes.CDLL(str(libraries[0])), SYMBOL, None)
    if function is None:
        raise UserError(f"{libraries[0].name} does not export {SYMBOL}; install the xllamacpp of constraints.txt")
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    encoder: Callable[..., int] = function
    return encoder
