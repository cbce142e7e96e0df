"""Losses of layer orders, raced: every order is a layer program, and a hopeless one is given up early.

A search compares orders that differ little from the one it stands at. The states along that order are kept, so that
a trial runs only the layers after the first one that differs; trials that begin alike share the rest as well. The
text is read in stages. After each, a trial whose paired difference from the base is clearly above its margin,

    (mean_t d_t - margin) > z sd_t(d_t) / sqrt(n),    d_t = loss of the trial - loss of the base on token t,

is given up. What is not given up is read on all of the text, so that a descent takes only what lowers the loss of the
whole text, and ends. (Taking what is clearly better on a part would save little, and among many trials something always
is: descents then wander.) Tokens of one text are correlated, so z is no quantile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.corpora.batches import TokenBatch
from lab.errors import UserError
from lab.residual.executor import Edit, Executor
from lab.residual.programs import Program, Step, order
from lab.residual.readouts import rows_at_a_time
from lab.residual.tree import layer_applications, prefix_tree
from lab.statistics.order_search import Order
from lab.subjects.anatomy import Decoder


class TokenLosses:
    """A readout: the loss of every scored token, float64 [k, n] for final states [k, B, T, d]; see `CompletionLoss`."""

    def __init__(self, decoder: Decoder, batch: TokenBatch, head_dtype: torch.dtype):
        batch = batch.to(decoder.device)
        self.decoder, self.scored, self.head_dtype = decoder, batch.scored, head_dtype
        self.rows = rows_at_a_time(decoder)

    @torch.no_grad()
    def __call__(self, states: Tensor) -> dict[str, Tensor]:
        """The losses under the name `loss`."""
        hidden = states[:, self.scored.row, self.scored.position].flatten(0, 1)
        targets = self.scored.target.repeat(len(states))
        chunks = zip(torch.split(hidden, self.rows), torch.split(targets, self.rows), strict=True)
        return {"loss": torch.cat([self._losses(*chunk) for chunk in chunks]).reshape(len(states), -1)}

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.decoder.unembedding.logits(self.decoder.final_norm(hidden), self.head_dtype)
        return F.cross_entropy(logits, targets, reduction="none").double()


class _Stage:
    """One batch of the text: losses of orders, each run once, with the states along a beginning that many share."""

    def __init__(self, decoder: Decoder, batch: TokenBatch, head_dtype: torch.dtype):
        self.batch = batch.to(decoder.device)
        self.executor = Executor(decoder)
        self.readout = TokenLosses(decoder, batch, head_dtype)
        self.kept: Order = ()
        self._states: list[Tensor] = []
        self._known: dict[Order, np.ndarray] = {}
        self.layer_tokens = self.head_tokens = 0

    def losses(self, orders: Sequence[Order], beginning: Order = ()) -> np.ndarray:
        """Losses [order, token] of layers in these orders, of which some begin with all or a part of `beginning`."""
        new = [layers for layers in dict.fromkeys(orders) if layers not in self._known]
        if new:
            self._keep(beginning)
            self.head_tokens += len(new) * len(self.batch.scored)
            found = self._run([self._program(layers) for layers in new], self.readout)["loss"]
            self._known |= zip(new, found.numpy(), strict=True)
        return np.stack([self._known[layers] for layers in orders])

    def _keep(self, layers: Order) -> None:
        """Keep the states along these layers; those of a common beginning are kept already."""
        shared = _common(self.kept, layers)
        if shared == len(layers):
            return
        programs = [self._program(layers[:length]) for length in range(shared + 1, len(layers) + 1)]
        found = self._run(programs, lambda states: {"state": states})["state"]
        self._states = self._states[:shared] + [state.to(self.batch.ids.device) for state in found]
        self.kept = layers
        self.executor.edits = {_after(place + 1): _resume(state) for place, state in enumerate(self._states)}

    def _program(self, layers: Order) -> Program:
        kept = _common(self.kept, layers)
        return ((Step(None, edit=_after(kept)),) if kept else ()) + order(layers[kept:])

    def _run(self, programs: Sequence[Program], readout: Any) -> dict[str, Tensor]:
        self.layer_tokens += layer_applications(prefix_tree(programs)) * self.batch.ids.numel()
        return self.executor.run(self.batch, programs, readout)


class LayerOrderLosses:
    """Losses of orders of slots, each of which holds a layer that the search does not know.

    Args:
        decoder: the model under study.
        stages: the text, read batch by batch; each is scored at its own positions.
        layer_of_slot: the shuffle: slot s holds layer `layer_of_slot[s]`.
        z: how many standard errors above its margin a trial is given up; infinity reads all text for every trial.
        head_dtype: precision of the vocabulary projection.

    Attributes:
        trials: orders that were tried, the base and its beginnings not counted.
    """

    def __init__(
        self,
        decoder: Decoder,
        stages: Sequence[TokenBatch],
        layer_of_slot: Sequence[int],
        *,
        z: float,
        head_dtype: torch.dtype = torch.bfloat16,
    ):
        self.layer_of_slot, self.z = tuple(layer_of_slot), z
        self._stages = [_Stage(decoder, batch, head_dtype) for batch in stages]
        self.trials = 0

    @property
    def layer_tokens(self) -> int:
        """Tokens that passed a layer so far, summed over layers."""
        return sum(stage.layer_tokens for stage in self._stages)

    @property
    def head_tokens(self) -> int:
        """Tokens projected to the vocabulary so far."""
        return sum(stage.head_tokens for stage in self._stages)

    def loss(self, slots: Order) -> float:
        """Mean loss of an order over all of the text [nat/token].

        Raises:
            UserError: it is NaN or infinite.
        """
        losses = np.concatenate([stage.losses([self._layers(slots)])[0] for stage in self._stages])
        return float(_finite(losses, self._layers(slots)).mean())

    def differences(self, base: Order, trials: Sequence[Order], margins: np.ndarray | float = 0.0) -> np.ndarray:
        """See `Losses`; an order of which a loss is not finite is infinitely worse."""
        self.trials += len(trials)
        limits = np.broadcast_to(np.asarray(margins, dtype=float), len(trials))
        layers, others = self._layers(base), [self._layers(trial) for trial in trials]
        shared = layers[: max(_common(layers, other) for other in others)]
        race = _Race(len(trials))
        for stage in self._stages:
            (own,) = stage.losses([layers], shared)
            found = stage.losses([others[int(index)] for index in race.alive], shared)
            race.add(_lost_if_not_finite(found) - _finite(own, layers))
            with np.errstate(invalid="ignore"):  # an infinite z times no error: then nothing is clear
                race.drop(race.mean - limits > self.z * race.error)
            if not len(race.alive):
                break
        return race.mean

    def lowest(self, trials: Sequence[Order]) -> tuple[int, np.ndarray]:
        """See `Losses`; the race is against the best so far, pair by pair."""
        self.trials += len(trials)
        layers = [self._layers(trial) for trial in trials]
        shared = layers[0][: min(_common(layers[0], other) for other in layers)]
        race = _Race(len(trials))
        best, seen = 0, np.empty((len(trials), 0))
        for stage in self._stages:
            if len(trials) > 1 and len(race.alive) == 1:
                break
            found = np.full((len(trials), len(stage.batch.scored)), np.nan)
            found[race.alive] = _lost_if_not_finite(stage.losses([layers[index] for index in race.alive], shared))
            race.add(found[race.alive])
            seen = np.concatenate([seen, found], axis=1)
            best = int(race.alive[race.mean[race.alive].argmin()])
            behind = seen - seen[best]
            with np.errstate(invalid="ignore"):  # what was given up is NaN, and infinity less itself is
                error = behind.std(axis=1, ddof=1) / np.sqrt(seen.shape[1])
                race.drop(behind.mean(axis=1) > self.z * np.nan_to_num(error, nan=0.0))
        return best, race.mean

    def _layers(self, slots: Order) -> Order:
        return tuple(self.layer_of_slot[slot] for slot in slots)


class _Race:
    """Running means of what each of some trials has shown, and who is still in it."""

    def __init__(self, count: int):
        self.alive = np.arange(count)
        self._sum, self._squares, self._tokens = np.zeros((3, count))

    def add(self, values: np.ndarray) -> None:
        """Values [alive, token] of those that are still in it."""
        self._sum[self.alive] += values.sum(1)
        self._squares[self.alive] += (values**2).sum(1)
        self._tokens[self.alive] += values.shape[1]

    def drop(self, lost: np.ndarray) -> None:
        """Leave out those [trial] that have lost."""
        self.alive = self.alive[~lost[self.alive]]

    @property
    def mean(self) -> np.ndarray:
        """Mean over the tokens that each was read on [trial]."""
        mean: np.ndarray = self._sum / self._tokens
        return mean

    @property
    def error(self) -> np.ndarray:
        """Standard error of that mean [trial]; 0 for an infinite one."""
        with np.errstate(invalid="ignore"):
            variance = (self._squares - self._sum * self.mean) / np.maximum(self._tokens - 1, 1)
            error: np.ndarray = np.sqrt(np.maximum(np.nan_to_num(variance, nan=0.0), 0) / self._tokens)
        return error


def _common(one: Order, other: Order) -> int:
    """How many items the two begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _finite(losses: np.ndarray, layers: Order) -> np.ndarray:
    if not np.isfinite(losses).all():
        raise UserError(f"the loss of layers in the order {layers} is not finite; measure with --dtype float32")
    return losses


def _lost_if_not_finite(losses: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(losses), losses, np.inf)


def _after(layers: int) -> str:
    return f"after {layers} layers"


def _resume(state: Tensor) -> Edit:
    """An edit that puts a state [B, T, d] of the base order in the place of whatever came in."""
    return lambda states, batch: state[None]
