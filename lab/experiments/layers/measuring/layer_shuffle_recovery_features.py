"""What a layer tells of its place without any text: its parameters, and its response to random input.

All features are taken per layer; a shuffle renames the layers and changes nothing in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lab.corpora.batches import Positions, TokenBatch
from lab.errors import NotApplicable
from lab.residual.executor import Edit, Executor
from lab.residual.programs import Step
from lab.residual.replay import LayerReplay
from lab.statistics.spectra import singular_values
from lab.subjects.anatomy import Decoder

SPECTRUM_OF = ("q_proj", "k_proj", "v_proj", "gate_proj")
TOP_SINGULAR_VALUES = 32
PROBE_SCALES = (0.05, 0.1, 0.5, 1.0)
PROBE_ROWS, PROBE_TOKENS = 2, 32
PAIR_SCALE = 0.1
COLUMNS_AT_ONCE = 2**18  #: entries of a parameter, of all layers, that are in float64 at a time
_INPUT = "random input"


@dataclass(frozen=True)
class WeightFeatures:
    """What the parameters of the L layers say.

    Attributes:
        statistics: Euclidean norm, mean, standard deviation (ddof 1), largest absolute value of all parameters [L, 4].
        gains: all parameters of norms [L, n].
        spectrum: the largest singular values of some matrices [L, m].
        spectrum_of: which matrices.
        query_values: of these the part of the first matrix; columns of `spectrum`.
        products: inner products of all parameters of two layers [L, L], float64.
        gain_energy: squared norm of the gains [L].
        matrix_energy: squared Frobenius norm of the matrices [L].
        parameters: number of parameters of a layer.
    """

    statistics: np.ndarray
    gains: np.ndarray
    spectrum: np.ndarray
    spectrum_of: tuple[str, ...]
    query_values: slice
    products: np.ndarray
    gain_energy: np.ndarray
    matrix_energy: np.ndarray
    parameters: int

    @property
    def norms(self) -> np.ndarray:
        """Euclidean norm of all parameters [L]."""
        norms: np.ndarray = self.statistics[:, 0]
        return norms


def weight_features(decoder: Decoder) -> WeightFeatures:
    """Features of the parameters as they are loaded, read one tensor at a time.

    Raises:
        NotApplicable: the layers differ in their parameters, so that they cannot be compared entry by entry.
    """
    layers = [dict(layer.named_parameters()) for layer in decoder.layers]
    _require_alike(layers)
    n, count = len(layers), 0
    products, sums, largest = np.zeros((n, n)), np.zeros(n), np.zeros(n)
    gain_energy, matrix_energy, gains = np.zeros(n), np.zeros(n), []
    gain_names = _gain_names(decoder.layers[0])
    for name, parameter in layers[0].items():
        own = np.zeros((n, n))
        for values in _in_parts([layer[name] for layer in layers]):
            own += values @ values.T
            sums += values.sum(1)
            largest = np.maximum(largest, np.abs(values).max(1))
            if name in gain_names:
                gains.append(values)
        products += own
        count += parameter.numel()
        gain_energy += own.diagonal() * (name in gain_names)
        matrix_energy += own.diagonal() * (parameter.dim() == 2)
    energy, mean = products.diagonal(), sums / count
    deviation = np.sqrt((energy - count * mean**2) / (count - 1))
    names = [name for name, parameter in layers[0].items() if parameter.dim() == 2]
    read = [name for wanted in SPECTRUM_OF for name in names if name.split(".")[-2] == wanted] or names
    spectra = [[_top_values(layer[name]) for name in read] for layer in layers]
    return WeightFeatures(
        statistics=np.stack([np.sqrt(energy), mean, deviation, largest], axis=1),
        gains=np.concatenate(gains, axis=1) if gains else np.zeros((n, 0)),
        spectrum=np.array([np.concatenate(own) for own in spectra]),
        spectrum_of=tuple(name.split(".")[-2] for name in read),
        query_values=slice(0, len(spectra[0][0])),
        products=products,
        gain_energy=gain_energy,
        matrix_energy=matrix_energy,
        parameters=count,
    )


def _require_alike(layers: Sequence[dict[str, nn.Parameter]]) -> None:
    shapes = [{name: parameter.shape for name, parameter in layer.items()} for layer in layers]
    other = next((index for index, own in enumerate(shapes) if own != shapes[0]), None)
    if other is not None:
        raise NotApplicable(
            f"layers 0 and {other} have different parameters: a shuffle of layers of several kinds is not recovered"
        )


def _gain_names(layer: nn.Module) -> set[str]:
    """Parameters of norms: those whose name says so, or whose module's class does."""
    kinds = {path: type(module).__name__.lower() for path, module in layer.named_modules()}
    names = [name for name, _ in layer.named_parameters()]
    return {name for name in names if "norm" in name.lower() or "norm" in kinds[name.rpartition(".")[0]]}


def _in_parts(tensors: Sequence[Tensor]) -> Iterable[np.ndarray]:
    """One parameter of all layers, some columns at a time [layer, column], float64."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    width = max(1, COLUMNS_AT_ONCE // len(flat))
    for start in range(0, len(flat[0]), width):
        yield torch.stack([tensor[start : start + width] for tensor in flat]).double().cpu().numpy()


def _top_values(matrix: Tensor) -> np.ndarray:
    return singular_values(matrix.detach().float().cpu().numpy())[:TOP_SINGULAR_VALUES]


# ---- random input


def noise(decoder: Decoder, scale: float, seed: int) -> Tensor:
    """Random residual streams [2, 32, d]: `scale` times standard normal numbers, rounded to the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    drawn = scale * torch.randn(PROBE_ROWS, PROBE_TOKENS, decoder.width, generator=generator)
    return drawn.to(decoder.dtype).to(decoder.device)


def fingerprints(decoder: Decoder, seed: int) -> np.ndarray:
    """How each layer answers four random inputs [L, 4 * 2 * d]: mean and deviation of its update, channel by channel.

    The inputs, one per scale, are the same for all layers. Updates are formed in float32 with float32 weights: a
    bfloat16 output rounds them to 8 bits of the input's size. Positions are 0..31, attention is the layer's own.
    """
    ids = torch.zeros(PROBE_ROWS, PROBE_TOKENS, dtype=torch.int64)
    captured = decoder.capture(ids)
    probes = torch.stack([noise(decoder, scale, seed + index) for index, scale in enumerate(PROBE_SCALES)])
    found = []
    for index, layer in enumerate(decoder.layers):
        updates = LayerReplay(layer, index, captured)(probes).update.double().flatten(1, 2)
        found.append(torch.stack([updates.mean(1), updates.std(1)], dim=1).flatten().cpu().numpy())
    return np.array(found)


def pair_spreads(decoder: Decoder, seed: int) -> np.ndarray:
    """Standard deviation of all entries after two layers were applied to random input [first, second]; NaN for one."""
    n, start = decoder.n_layers, noise(decoder, PAIR_SCALE, seed)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    programs = [(Step(None, edit=_INPUT), Step(i), Step(j)) for i, j in pairs]
    executor = Executor(decoder, edits={_INPUT: _replace_by(start)})
    values = executor.run(
        _any_text(), programs, lambda states: {"spread": states.double().flatten(1).std(1, correction=0)}
    )
    spreads = np.full((n, n), np.nan)
    spreads[tuple(np.transpose(pairs))] = values["spread"].numpy()
    return spreads


def _replace_by(state: Tensor) -> Edit:
    return lambda states, batch: state.expand_as(states)


def _any_text() -> TokenBatch:
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.zeros(PROBE_ROWS, PROBE_TOKENS, dtype=torch.int64)
    return TokenBatch(
        tuple(range(PROBE_ROWS)), ids, torch.full((PROBE_ROWS,), PROBE_TOKENS), Positions(none, none, none)
    )
