"""The whole-model methods that T-11 compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from lab.quantization.layers import WeightMap, Workshop, matrices
from lab.quantization.libraries import GGUF, NF4_BLOCK, NormalFloat4, TorchAO, int8_layer
from lab.quantization.rounding import GaussianNoise, Rounding, gaussian_error
from lab.residual.programs import Program

RTN_WIDTHS = (8, 6, 4, 3, 2)
TRUE_TWO_BITS = "mse_optimal"  #: the rule of a 2-bit format with four levels
NOISE_SEED = 1  #: one is enough: hundreds of matrices average over their noise
LAW_ROWS = 64  #: groups per row of the Gaussian matrix whose rounding error is the law


@dataclass(frozen=True)
class Method:
    """One way to quantize all linear maps of all layers; embedding and head stay as they are.

    Attributes:
        name: as in the record.
        bits: nominal width of a weight; NaN for noise.
        weights: what becomes of a matrix; None for LLM.int8, which replaces whole layers.
    """

    name: str
    bits: float
    weights: WeightMap | None

    def program(self, workshop: Workshop) -> Program:
        """Every layer under this method."""
        layers = workshop.decoder.layers
        if self.weights is not None:
            return workshop.program([workshop.all(self.weights)] * len(layers))
        return tuple(
            workshop.module_step(index, self.name, partial(int8_layer, layer)) for index, layer in enumerate(layers)
        )


def methods(workshop: Workshop, group: int) -> tuple[Method, ...]:
    """All methods, in the order of the record.

    Args:
        workshop: of the subject.
        group: weights per scale of round-to-nearest; 64 is compared too, to be fair to methods with blocks of 64.
    """
    return (
        *_roundings(workshop, group),
        Method("bitsandbytes_nf4", 4, NormalFloat4()),
        Method("bitsandbytes_int8", 8, None),
        Method("torchao_int8_weight_only", 8, TorchAO(8)),
        Method("torchao_intx4_weight_only", 4, TorchAO(4, group)),
        *(Method(f"gguf_{kind.lower()}", int(kind[1]), GGUF(kind)) for kind in ("Q8_0", "Q4_0", "Q4_1")),
        *_noises(group),
    )


def _roundings(workshop: Workshop, group: int) -> Iterator[Method]:
    for bits in RTN_WIDTHS:
        yield Method(f"rtn_{bits}", bits, Rounding(bits, group))
    columns = {linear.in_features for linear in matrices(workshop.decoder.layers[0]).values()}
    if all(length % NF4_BLOCK == 0 for length in columns):
        yield Method("rtn_4_g64", 4, Rounding(4, NF4_BLOCK))
    yield Method("minmax_3", 3, Rounding(3, group, "asymmetric_minmax"))
    yield Method("minmax_2", 2, Rounding(2, group, "asymmetric_minmax"))
    yield Method("mse_2", 2, Rounding(2, group, TRUE_TWO_BITS))


def _noises(group: int) -> Iterator[Method]:
    """Unbiased noise as large as the rounding error of Gaussian weights."""
    for bits in (4, 3):
        size = gaussian_error(Rounding(bits, group), group * LAW_ROWS)
        yield Method(f"noise_{bits}", float("nan"), GaussianNoise(size, NOISE_SEED))
