"""GPTQ (Frantar et al. 2023): rounding that makes up for its error with what is left to round.

Column after column of a matrix is rounded, and its error is spread over the columns still to come so that the outputs
on calibration texts change least, ||(W - W_hat) X||. That is Intel's neural-compressor's part. Layer after layer is
walked here: each sees what the quantized ones before it give, with the arguments of its own call (its mask, its rotary
embedding), which the library would take from the first layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lab import leftovers
from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.normalization.surgery import real_positions
from lab.quantization.layers import WithWeights, matrices
from lab.subjects.anatomy import Decoder

BATCH_TOKENS = 2048
DAMPING = 0.01  #: of the Hessian's mean diagonal (Frantar et al. 2023, section 3.3)


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with symmetric integers, made when the first matrix is asked for.

    A group's levels are k s for k = -2^(b-1) .. 2^(b-1) - 1 with s = 2 max |w| / (2^b - 1), w being the group's weights
    when its first column comes. Columns come in their order.

    Attributes:
        bits: width of a code.
        group: weights that share a scale; must divide the length of a row.
        decoder: the model under study; it is not written to.
        texts: calibration texts.
    """

    bits: int
    group: int
    decoder: Decoder
    texts: Sequence[TokenText]

    @property
    def name(self) -> str:
        """E.g. `gptq_w4a16`, as in llm-compressor's names of schemes, which have groups of 128."""
        return f"gptq_w{self.bits}a16"

    def __call__(self, weight: Tensor, place: str = "") -> Tensor:
        """The matrix [out, in] at a place `layer.path`, quantized and dequantized."""
        return self._matrices[place].to(weight)

    @cached_property
    def _matrices(self) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, weights in _layers(self.decoder, self.texts, self._rounded):
            found |= {f"{index}.{path}": weight for path, weight in weights.items()}
        return found

    def _rounded(self, weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """A matrix [out, in], quantized and dequantized, given what it sees in each batch [tokens, in]."""
        gptq = _library()
        # Of the layer it is only asked what kind of layer it is.
        kind = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        columns = gptq.GPTQ(kind, weight, device=weight.device)
        columns.quantizer.configure(
            {
                "dtype": "int",
                "bits": self.bits,
                "group_size": self.group,
                "sym": True,
                "perchannel": True,
                "mse": False,
                "use_double_quant": False,
                "double_quant_sym": True,
            }
        )
        for seen in inputs:
            columns.add_batch(seen, None)
        # It writes to what it is given, and takes a group's step from weights that are up to date where blocks begin.
        *_, rounded = columns.fasterquant(weight.clone(), self.group, DAMPING, self.group)
        result: Tensor = rounded
        return result


@torch.no_grad()
def _layers(
    decoder: Decoder, texts: Sequence[TokenText], rounded: Callable[[Tensor, Sequence[Tensor]], Tensor]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Index and new matrices by path of one layer after the other."""
    batches = [batch.to(decoder.device) for batch in token_batches(list(texts), BATCH_TOKENS)]
    calls = [decoder.capture(batch.ids) for batch in batches]
    states = [captured.entry for captured in calls]
    for index, layer in enumerate(decoder.layers):
        inputs: dict[str, list[Tensor]] = {path: [] for path in matrices(layer)}
        for batch, captured, state in zip(batches, calls, states, strict=True):
            with _watched(layer, batch, inputs):
                captured.apply(layer, state, index, 1)
        with _unlogged():
            weights = _together(matrices(layer), inputs, rounded)
        quantized = WithWeights(layer, {f"{path}.weight": weight for path, weight in weights.items()})
        states = [captured.apply(quantized, state, index, 1) for state, captured in zip(states, calls, strict=True)]
        yield index, weights


def _together(
    linears: Mapping[str, nn.Linear],
    inputs: Mapping[str, Sequence[Tensor]],
    rounded: Callable[[Tensor, Sequence[Tensor]], Tensor],
) -> dict[str, Tensor]:
    """New matrices by path; those that see the same are rounded as one matrix.

    Rows of a matrix are rounded apart, all with the Hessian of their inputs, and time goes by columns.
    """
    found: dict[str, Tensor] = {}
    for paths in _alike(inputs):
        weights = [linears[path].weight.detach() for path in paths]
        parts = torch.split(rounded(torch.cat(weights), inputs[paths[0]]), [len(weight) for weight in weights])
        found |= dict(zip(paths, parts, strict=True))
    return {path: found[path] for path in linears}


def _alike(inputs: Mapping[str, Sequence[Tensor]]) -> list[list[str]]:
    """Paths, those together that see equal inputs."""
    groups: list[list[str]] = []
    for path, seen in inputs.items():
        known = (group for group in groups if all(map(torch.equal, seen, inputs[group[0]])))
        if (group := next(known, None)) is not None:
            group.append(path)
        else:
            groups.append([path])
    return groups


def _library() -> Any:
    from neural_compressor.torch.algorithms.weight_only import gptq

    leftovers.remove_workspace()
    return gptq


@contextmanager
def _watched(layer: nn.Module, batch: TokenBatch, inputs: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Append what each matrix sees at the batch's tokens, padding left out."""
    real = real_positions(batch)
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, seen=inputs[path]: seen.append(args[0][real]))
        for path, linear in matrices(layer).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _unlogged() -> Iterator[None]:
    """The library reports which accelerator it has found, and the time and error of every matrix."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
