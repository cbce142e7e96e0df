"""The whole-model methods that T-11 compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lab.corpora.batches import TokenText
from lab.quantization.ggml import KQuant, stored_bits
from lab.quantization.gptq import GPTQ
from lab.quantization.layers import WeightMap, Workshop, matrices
from lab.quantization.libraries import GGUF, NF4_BLOCK, NF4_STORED, NormalFloat4, TorchAO, int8_layer
from lab.quantization.rounding import GaussianNoise, Rounding, gaussian_error
from lab.residual.programs import Program

RTN_WIDTHS = (8, 6, 4, 3, 2)
TRUE_TWO_BITS = "mse_optimal"  #: the rule of a 2-bit format with four levels
NOISE_SEED = 1  #: one is enough: hundreds of matrices average over their noise
NUMBER_BITS = 16  #: a scale or an offset in bfloat16 or float16
GPTQ_WIDTHS = (8, 4)
LAW_ROWS = 64  #: groups per row of the Gaussian matrix whose rounding error is the law


@dataclass(frozen=True)
class Method:
    """One way to quantize all linear maps of all layers; embedding and head stay as they are.

    Attributes:
        name: as in the record.
        bits: nominal width of a weight; NaN for noise.
        weights: what becomes of a matrix; None for LLM.int8, which replaces whole layers.
        stored: bits that are stored per weight in rows of so many weights, scales included; NaN for noise.
        calibrated: what becomes of a matrix depends on texts, and on which matrix of the model it is.
    """

    name: str
    bits: float
    weights: WeightMap | None
    stored: Callable[[int], float]
    calibrated: bool = False

    def program(self, workshop: Workshop) -> Program:
        """Every layer under this method."""
        layers = workshop.decoder.layers
        if self.weights is not None:
            return workshop.program([workshop.all(self.weights)] * len(layers))
        return tuple(
            workshop.module_step(index, self.name, partial(int8_layer, layer)) for index, layer in enumerate(layers)
        )


def methods(workshop: Workshop, group: int, texts: Sequence[TokenText]) -> tuple[Method, ...]:
    """All methods, in the order of the record.

    Args:
        workshop: of the subject.
        group: weights per scale of round-to-nearest; 64 is compared too, to be fair to methods with blocks of 64.
        texts: what GPTQ is calibrated on.
    """
    return (
        *_roundings(workshop, group),
        Method("bitsandbytes_nf4", 4, NormalFloat4(), lambda _: NF4_STORED),
        Method("bitsandbytes_int8", 8, None, lambda columns: 8 + 2 * NUMBER_BITS / columns),  # a scale in float32
        Method("torchao_int8_weight_only", 8, TorchAO(8), lambda columns: 8 + NUMBER_BITS / columns),
        Method("torchao_intx4_weight_only", 4, TorchAO(4, group), _in_groups(4, group)),
        *_gptq(workshop, group, texts),
        *_gguf(),
        *_noises(group),
    )


def _in_groups(bits: int, group: int, numbers: int = 1) -> Callable[[int], float]:
    """Codes and so many 16-bit numbers per group."""
    return lambda _: bits + numbers * NUMBER_BITS / group


def _roundings(workshop: Workshop, group: int) -> Iterator[Method]:
    for bits in RTN_WIDTHS:
        yield Method(f"rtn_{bits}", bits, Rounding(bits, group), _in_groups(bits, group))
    columns = {linear.in_features for linear in matrices(workshop.decoder.layers[0]).values()}
    if all(length % NF4_BLOCK == 0 for length in columns):
        yield Method("rtn_4_g64", 4, Rounding(4, NF4_BLOCK), _in_groups(4, NF4_BLOCK))
    for bits in (3, 2):
        yield Method(f"minmax_{bits}", bits, Rounding(bits, group, "asymmetric_minmax"), _in_groups(bits, group, 2))
    yield Method("mse_2", 2, Rounding(2, group, TRUE_TWO_BITS), _in_groups(2, group))


def _gptq(workshop: Workshop, group: int, texts: Sequence[TokenText]) -> Iterator[Method]:
    for bits in GPTQ_WIDTHS:
        made = GPTQ(bits, group, workshop.decoder, texts)
        yield Method(made.name, bits, made, _in_groups(bits, group), calibrated=True)


def _gguf() -> Iterator[Method]:
    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        yield Method(f"gguf_{kind.lower()}", int(kind[1]), GGUF(kind), partial(_of_format, kind))
    for kind in ("Q6_K", "Q4_K"):
        made = KQuant(kind)
        yield Method(made.name, int(kind[1]), made, made.stored_bits)


def _of_format(kind: str, _columns: int) -> float:
    return stored_bits(kind)


def _noises(group: int) -> Iterator[Method]:
    """Unbiased noise as large as the rounding error of Gaussian weights."""
    for bits in (4, 3):
        size = gaussian_error(Rounding(bits, group), group * LAW_ROWS)
        yield Method(f"noise_{bits}", float("nan"), GaussianNoise(size, NOISE_SEED), lambda _: float("nan"))
