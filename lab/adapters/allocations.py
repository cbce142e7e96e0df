"""Rank allocations: how many directions each weight matrix of each layer may change.

A low-rank update W' = W + s B A with A [r, in] and B [out, r] has r (in + out) parameters. An allocation is an array of
ranks [layer, matrix], 0 where nothing is adapted; the matrices are the seven of a Llama layer. Ranges of layers are
those of the source's 36, carried over to other depths: layer l of L lies in [a, b) of 36 when
a/36 <= (l + 1/2)/L < b/36.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PUBLISHED_LAYERS = 36
PUBLISHED_RANK = 16
LATE = (17, 36)  #: B's border: the plateau lies before it
BOTTLENECK = (15, 25)  #: the layers that F leaves out
LAST = (25, 36)  #: the layers that H adapts
#: ranks of B on the plateau and in the late layers, in the order of `MATRICES`
PHASE_AWARE = np.array([[8, 24], [8, 24], [24, 24], [12, 24], [12, 48], [24, 24], [24, 24]])
EQUAL = 0.005  #: budgets that differ by less count as equal
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Shape:
    """What an allocation is made for.

    Attributes:
        cost: parameters per unit of rank, in + out [layer, matrix].
        effective_rank_ratio: of the weights [layer, matrix], see T-9; None where no allocation asks for it.
        scale: of all ranks, relative to the source's 16.
    """

    cost: np.ndarray
    effective_rank_ratio: np.ndarray | None = None
    scale: float = 1.0

    @property
    def n_layers(self) -> int:
        """Number of layers L."""
        return len(self.cost)

    @property
    def rank(self) -> int:
        """Rank of the uniform allocation."""
        return max(1, round(PUBLISHED_RANK * self.scale))


def layers_between(first: int, stop: int, n_layers: int) -> list[int]:
    """Layers of a model whose middle lies at the depth of the source's layers first .. stop - 1, in whole numbers."""
    return [
        layer
        for layer in range(n_layers)
        if 2 * first * n_layers <= (2 * layer + 1) * PUBLISHED_LAYERS < 2 * stop * n_layers
    ]


def parameters(ranks: np.ndarray, cost: np.ndarray) -> int:
    """Number of trainable parameters: the sum of r (in + out) over adapted matrices."""
    return int((ranks * cost).sum())


def allocation(configuration: str, shape: Shape) -> np.ndarray:
    """Ranks [layer, matrix] of a configuration, integers; `ALLOCATIONS` has their names."""
    return ALLOCATIONS[configuration](shape)


def uniform(shape: Shape) -> np.ndarray:
    """A: the same rank everywhere."""
    return np.full(shape.cost.shape, shape.rank)


def phase_aware(shape: Shape) -> np.ndarray:
    """B: ranks by matrix, higher in the late layers; not of A's budget."""
    ranks: np.ndarray = np.maximum(1, np.rint(_phase_aware(shape))).astype(int)
    return ranks


def uniform_matched(shape: Shape) -> np.ndarray:
    """A_matched: one rank everywhere, or two neighbouring ones, at B's budget."""
    budget = parameters(phase_aware(shape), shape.cost)
    return matched(np.full(shape.cost.shape, budget / shape.cost.sum()), shape.cost, budget)


def phase_aware_matched(shape: Shape) -> np.ndarray:
    """B_matched: B's proportions at A's budget."""
    return _at_budget_of_uniform(_phase_aware(shape), shape)


def spectral(shape: Shape) -> np.ndarray:
    """Ranks proportional to the weights' own effective rank ratio, at A's budget."""
    return _at_budget_of_uniform(_effective(shape), shape)


def inverse(shape: Shape) -> np.ndarray:
    """The ranks of `spectral` dealt in reversed order of the effective rank ratio, at A's budget."""
    order = np.argsort(_effective(shape), axis=None, kind="stable")
    dealt = np.empty(shape.cost.size)
    dealt[order] = np.sort(spectral(shape), axis=None)[::-1]
    return _at_budget_of_uniform(dealt.reshape(shape.cost.shape), shape)


def without(shape: Shape, layers: list[int]) -> np.ndarray:
    """A without some layers."""
    ranks = uniform(shape)
    ranks[layers] = 0
    return ranks


def only(shape: Shape, layers: list[int]) -> np.ndarray:
    """A in some layers alone."""
    return without(shape, [layer for layer in range(shape.n_layers) if layer not in layers])


def bottleneck(shape: Shape) -> list[int]:
    """The layers that F leaves out."""
    return layers_between(*BOTTLENECK, shape.n_layers)


def last(shape: Shape) -> list[int]:
    """The layers that H adapts."""
    return layers_between(*LAST, shape.n_layers)


def _first(count: int) -> list[int]:
    return list(range(count))


def _centre(count: int, n_layers: int) -> list[int]:
    start = (n_layers - count) // 2
    return list(range(start, start + count))


ALLOCATIONS: Mapping[str, Callable[[Shape], np.ndarray]] = MappingProxyType(
    {
        "A": uniform,
        "B": phase_aware,
        "F": lambda shape: without(shape, bottleneck(shape)),
        "H": lambda shape: only(shape, last(shape)),
        "A_matched": uniform_matched,
        "B_matched": phase_aware_matched,
        "spectral": spectral,
        "inverse": inverse,
        "skip_early": lambda shape: without(shape, _first(len(bottleneck(shape)))),
        "skip_late": lambda shape: without(shape, list(range(shape.n_layers))[-len(bottleneck(shape)) :]),
        "early": lambda shape: only(shape, _first(len(last(shape)))),
        "middle": lambda shape: only(shape, _centre(len(last(shape)), shape.n_layers)),
    }
)


def matched(wanted: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """Integers of at least 1 near the wanted ranks [layer, matrix], whose parameters meet the budget within 0.5 %.

    Ranks are rounded, then moved up or down by one, that of the smallest rounding error first. Equal errors are taken
    in an order that scatters over depth, or a whole end of the model would be favoured.

    Raises:
        ValueError: the budget is less than rank 1 everywhere costs.
    """
    ranks = np.maximum(1, np.rint(wanted)).astype(int).ravel()
    goal, each = np.asarray(wanted, dtype=float).ravel(), np.asarray(cost).ravel()
    scattered = (np.arange(len(ranks)) * _GOLDEN) % 1
    while abs(missing := budget - float(ranks @ each)) > EQUAL * budget:
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(ranks + step >= 1)
        if not len(movable):
            raise ValueError(f"a budget of {budget:.0f} parameters is less than rank 1 everywhere costs")
        error = np.round(step * (ranks - goal), 9)[movable]  # how far a move would overshoot
        ranks[movable[np.lexsort((scattered[movable], error))[0]]] += step
    found: np.ndarray = ranks.reshape(cost.shape)
    return found


def _at_budget_of_uniform(proportions: np.ndarray, shape: Shape) -> np.ndarray:
    budget = parameters(uniform(shape), shape.cost)
    return matched(proportions * budget / float((proportions * shape.cost).sum()), shape.cost, budget)


def _phase_aware(shape: Shape) -> np.ndarray:
    late = np.isin(np.arange(shape.n_layers), layers_between(*LATE, shape.n_layers))
    ranks: np.ndarray = PHASE_AWARE.T[late.astype(int)] * shape.scale
    return ranks


def _effective(shape: Shape) -> np.ndarray:
    if shape.effective_rank_ratio is None:
        raise ValueError("an allocation by effective rank needs the weights' effective rank ratios")
    return shape.effective_rank_ratio
