"""How far a layer's update is from its derivative: gaps, gains and Jacobian products at single tokens.

For token t with state x_t and a unit direction u_t, all chosen tokens are moved together, d_t = eps |x_t| u_t, and

    D+ = g(x + d) - g(x),   gap = |D+ - J d| / |D+|,

with J d exact (forward mode). The published form takes the central difference for J d, so that its numerator
(g(x + d) + g(x - d) - 2 g(x)) / 2 is the even part of the response and blind to x^3 or tanh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lab.residual.replay import LayerReplay, OwnTokenBlocks, Response

#: added to denominators, as published
TINY = 1e-10
#: size of the perturbation, relative to the token's norm, at which gaps are compared
EPS = 0.05


@dataclass(frozen=True)
class Tokens:
    """A layer's input on one batch, and the m tokens of it that are moved and read.

    Attributes:
        states: input of the layer [B, T, d].
        row, position: of the m tokens.
    """

    states: Tensor
    row: Tensor
    position: Tensor

    @property
    def chosen(self) -> Tensor:
        """States of the m tokens [m, d], float32."""
        return self.at(self.states).float()

    @property
    def norms(self) -> Tensor:
        """Norms of the m tokens [m, 1]."""
        norms: Tensor = self.chosen.norm(dim=-1, keepdim=True)
        return norms

    def at(self, values: Tensor) -> Tensor:
        """The m tokens of values [..., B, T, d] -> [..., m, d]."""
        chosen: Tensor = values[..., self.row, self.position, :]
        return chosen

    def moves(self, units: Tensor) -> Tensor:
        """Directions u [k, m, d] as moves |x_t| u_t of the whole batch [k, B, T, d], 0 at all other tokens."""
        moves = torch.zeros((len(units), *self.states.shape), dtype=torch.float32, device=self.states.device)
        moves[:, self.row, self.position] = units * self.norms
        return moves

    def random(self, k: int, generator: torch.Generator, *, shared: bool = False) -> Tensor:
        """k random unit directions [k, m, d], each token's own or the same for all tokens."""
        drawn = torch.randn(k, 1 if shared else len(self.row), self.states.shape[-1], generator=generator)
        units = drawn / drawn.norm(dim=-1, keepdim=True)
        everywhere: Tensor = units.to(self.states.device).expand(-1, len(self.row), -1)
        return everywhere


def gap(response: Tensor, linear: Tensor) -> Tensor:
    """|D+ - J d| / |D+| [..., m] of responses and their linear part [..., m, d]."""
    response, linear = response.float(), linear.float()
    relative: Tensor = (response - linear).norm(dim=-1) / (response.norm(dim=-1) + TINY)
    return relative


class LocalReadings:
    """Readings of one layer at single tokens.

    Args:
        replay: the layer on the tokens' batch, in float32.
        tokens: its input there.
        units: directions by kind [k, m, d]; `independent` ones are wanted by most readings, `shared` and
            `principal` ones are the same for all tokens.
    """

    def __init__(self, replay: LayerReplay, tokens: Tokens, units: dict[str, Tensor]):
        self.replay, self.tokens, self.units = replay, tokens, units
        self.base = self._at(replay(tokens.states))
        radial = {"radial": (tokens.chosen / tokens.norms)[None]}
        self.slopes = self._derivatives(units | radial)

    def gaps(self, kind: str, eps: float) -> dict[str, Tensor]:
        """Gap [m] of update and branches, mean over the directions of a kind."""
        response, slope = self._response(kind, eps), self.slopes[kind].parts()
        return {name: gap(value, eps * slope[name]).mean(0) for name, value in response.items() if name in slope}

    def even_gap(self, eps: float) -> Tensor:
        """Published form of the gap [m]: even part of the response over the response, in float32."""
        forth, back = (self._response("independent", sign * eps)["update"] for sign in (1, -1))
        return gap(forth, (forth - back) / 2).mean(0)

    def gains(self) -> dict[str, Tensor]:
        """How long random unit vectors become [m]: under J, under I + J, and the cosine that I + J leaves."""
        units = self.units["independent"]
        pushed = self.slopes["independent"].update / self.tokens.norms
        whole = units + pushed
        return {
            "mean_amplification": pushed.norm(dim=-1).mean(0),
            "layer_gain_squared": whole.square().sum(-1).mean(0),
            "direction_kept": torch.cosine_similarity(whole, units, dim=-1).mean(0),
        }

    def sizes(self) -> dict[str, Tensor]:
        """Norms of input and update, and what the update makes of a longer input [m]."""
        update, stretch = self.base.update, self.slopes["radial"].update[0]
        size = update.norm(dim=-1)
        return {
            "input_norm": self.tokens.norms[:, 0],
            "update_norm": size,
            "scale_response": stretch.norm(dim=-1) / (size + TINY),
            "homogeneity_gap": (update - stretch).norm(dim=-1) / (size + TINY),
        }

    def _response(self, kind: str, eps: float) -> dict[str, Tensor]:
        moved = self.tokens.states.float() + eps * self.tokens.moves(self.units[kind])
        return (self._at(self.replay(moved)) - self.base).parts()

    def _derivatives(self, units: dict[str, Tensor]) -> dict[str, Response]:
        joined = self._at(self.replay.jvp(self.tokens.states, self.tokens.moves(torch.cat(list(units.values())))))
        sizes = [len(unit) for unit in units.values()]
        pieces = {name: torch.split(value, sizes) for name, value in joined.parts().items()}
        return {kind: Response(**{n: p[place] for n, p in pieces.items()}) for place, kind in enumerate(units)}

    def _at(self, response: Response) -> Response:
        return Response(**{name: self.tokens.at(value) for name, value in response.parts().items()})


def rounded_gaps(replay: LayerReplay, tokens: Tokens, eps: Sequence[float], units: Tensor) -> dict[str, Tensor]:
    """The published gap [eps, m] of update and branches: even part over response, in the replay's own dtype.

    In bfloat16 the update is the difference of two rounded states, and its rounding does not shrink with eps.
    """
    base = replay(tokens.states)
    found: dict[str, list[Tensor]] = {}
    for size in eps:
        # Directions are scaled in float32 and rounded once, with the state, as any bfloat16 input is.
        moves = (size * tokens.moves(units)).to(replay.dtype)
        forth, back = (replay(tokens.states + sign * moves) for sign in (1, -1))
        for name, value in (forth - base).parts().items():
            even = (forth.parts()[name] - back.parts()[name]) / 2
            found.setdefault(name, []).append(gap(tokens.at(value), tokens.at(even)).mean(0))
    return {name: torch.stack(values) for name, values in found.items()}


def log_log_fit(eps: Sequence[float], gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the nonlinearity and fit quality [...] for gaps [eps, ...].

    Least squares of ln gap on ln eps: the order is 1 + slope (2 for a quadratic, 3 for a cubic term), the quality
    the squared correlation. Rounding noise gives gaps that grow as eps shrinks, hence orders below 1.
    """
    x, y = np.log(np.asarray(eps)), np.log(gaps)
    x = (x - x.mean()).reshape(-1, *[1] * (y.ndim - 1))
    y = y - y.mean(0)
    slope = (x * y).sum(0) / (x**2).sum(0)
    with np.errstate(invalid="ignore"):  # equal gaps at every eps have no correlation
        quality = (x * y).sum(0) ** 2 / ((x**2).sum(0) * (y**2).sum(0))
    return 1 + slope, quality


def power_iteration_gain(replay: LayerReplay, tokens: Tokens, start: Tensor, steps: int) -> Tensor:
    """Published "spectral norm" [m]: |J v| after `steps` times v <- J v / |J v|, token by token.

    Starts from the unit vectors `start` [1, m, d]. Without J^T this finds an eigenvalue-like gain, not a norm: 0 for
    the nilpotent [[0, a], [0, 0]].
    """
    unit, norms = start, tokens.norms
    for _ in range(steps):
        pushed = tokens.at(replay.jvp(tokens.states, tokens.moves(unit)).update)
        unit = pushed / (pushed.norm(dim=-1, keepdim=True) + TINY)
    pushed = tokens.at(replay.jvp(tokens.states, tokens.moves(unit)).update) / norms
    gain: Tensor = pushed.norm(dim=-1)[0]
    return gain


def spectral_norm(blocks: OwnTokenBlocks, start: Tensor, steps: int) -> Tensor:
    """Largest singular value [B] of Jacobian blocks by Golub-Kahan-Lanczos bidiagonalization.

    It applies J and J^T in turn, as power iteration on J^T J does, and keeps what that forgets: after k steps the
    bidiagonal matrix holds the best estimate within the whole Krylov space (Golub and Kahan 1965). The estimate
    rises with the steps and never exceeds the norm. Vectors are orthogonalised in full.

    Args:
        blocks: of B tokens.
        start: vectors [B, d].
        steps: products with J.
    """
    right = [start / start.norm(dim=-1, keepdim=True)]
    left: list[Tensor] = []
    diagonal, beside = [], []
    for _ in range(min(steps, start.shape[-1])):
        length, vector = _next(blocks.product(right[-1]), left)
        left.append(vector)
        diagonal.append(length)
        length, vector = _next(blocks.transposed_product(vector), right)
        right.append(vector)
        beside.append(length)
    bidiagonal = torch.diag_embed(torch.stack(diagonal, -1).double())
    bidiagonal += torch.diag_embed(torch.stack(beside[:-1], -1).double(), 1) if len(beside) > 1 else 0
    largest: Tensor = torch.linalg.svdvals(bidiagonal)[:, 0]
    return largest


def _next(vector: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    for _ in range(2):  # twice is enough (Kahan)
        for other in before:
            vector = vector - (vector * other).sum(-1, keepdim=True) * other
    length = vector.norm(dim=-1, keepdim=True)
    return length[:, 0], vector / (length + TINY)
