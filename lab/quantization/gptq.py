"""GPTQ (Frantar et al. 2023) through llm-compressor: rounding that makes up for its error with what is left to round.

Column after column of a matrix is rounded, and its error is spread over the columns still to come so that the outputs
on calibration texts change least, ||(W - W_hat) X||. Layer after layer: each sees what the quantized ones before it
give. The library works on a copy of the model in memory; what is taken from it are the dequantized matrices.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lab.quantization.layers import matrices
from lab.subjects.anatomy import Decoder


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with symmetric integers, made when the first matrix is asked for.

    A group's levels are k s for k = -2^(b-1) .. 2^(b-1) - 1 with s = max |w| / (2^b - 1) * 2. Columns come in their
    order, in blocks of 128; the Hessian's damping is 0.01 of its mean diagonal (the library's defaults).

    Attributes:
        bits: width of a code.
        group: weights that share a scale; must divide the length of a row.
        decoder: the model under study; it is not written to.
        texts: token ids of the calibration texts.
    """

    bits: int
    group: int
    decoder: Decoder
    texts: Sequence[Sequence[int]]

    @property
    def name(self) -> str:
        """E.g. `gptq_w4a16`: llm-compressor's name of the scheme, which has groups of 128 there."""
        return f"gptq_w{self.bits}a16"

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The matrix [out, in] at a place `layer.path`, quantized and dequantized."""
        return self._matrices[place].to(weight)

    @cached_property
    def _matrices(self) -> Mapping[str, Tensor]:
        names = {id(module): name for name, module in self.decoder.model.named_modules()}
        quantized = copy.deepcopy(self.decoder.model)
        # The library draws random numbers, if only for the order of the texts, which it then keeps.
        with torch.random.fork_rng(devices=[]), _quiet(), TemporaryDirectory() as folder:
            # The library reads the configuration again where the model says that it came from.
            quantized.config.save_pretrained(folder)
            quantized.name_or_path = quantized.config._name_or_path = folder
            _quantize(quantized, self.bits, self.group, self.texts)
        return {
            f"{index}.{path}": quantized.get_submodule(names[id(linear)]).weight.detach()
            for index, layer in enumerate(self.decoder.layers)
            for path, linear in matrices(layer).items()
        }


def _quantize(model: Any, bits: int, group: int, texts: Sequence[Sequence[int]]) -> None:
    """Quantize the linear maps of a model's layers in place."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import LoggerConfig, configure_logger
    from llmcompressor.entrypoints import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    configure_logger(LoggerConfig(disabled=True))
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    ids = [list(text) for text in texts]
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(text) for text in ids]}),
        recipe=GPTQModifier(config_groups={"weights": scheme}, ignore=["lm_head"]),
        processor=object(),  # the texts are tokens already; without one the library would look for a tokenizer
        num_calibration_samples=len(ids),
        max_seq_length=max(map(len, ids)),
        shuffle_calibration_samples=False,
        clear_sparse_session=True,
        pipeline="sequential",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The library logs every matrix, and its progress bars know nothing of ours."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
