"""Searches for the order of lowest loss: construction, swaps, insertions, annealing, and exchanges of blocks.

A search sees items and losses only. What a loss is, and how much of it must be read before a trial is given up, is
the business of the `Losses` that it is handed. Trials that do not depend on each other are handed over together, so
that they can share work; where a trial is accepted, those that were tried ahead of time are tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Protocol

import numpy as np

Order = tuple[int, ...]
#: an order made from another by moving what stands at certain positions
Move = Callable[[Order], Order]
#: two neighbouring blocks: where the first starts, how many items it has, how many the second
Span = tuple[int, int, int]
#: what stands in them
Blocks = tuple[Order, Order]

EPSILON = 1e-6  #: an improvement counts from here on, as published
#: trials handed over together: few where the next may be accepted, for what is ahead of it then was tried in vain
SMALLEST_WINDOW, LARGEST_WINDOW = 2, 64


class Losses(Protocol):
    """Losses of orders, as far as a search needs to know them."""

    def differences(self, base: Order, trials: Sequence[Order], margins: np.ndarray | float = 0.0) -> np.ndarray:
        """Loss of each trial minus that of the base [trial].

        A trial that is clearly above its margin may be judged on a part of the text.
        """

    def lowest(self, trials: Sequence[Order]) -> tuple[int, np.ndarray]:
        """Which trial has the lowest loss (the first of equals), and the losses as far as they were read [trial]."""


def swapped(i: int, j: int) -> Move:
    """Exchange what stands at positions i < j."""
    return lambda order: (*order[:i], order[j], *order[i + 1 : j], order[i], *order[j + 1 :])


def moved(i: int, j: int) -> Move:
    """Take out what stands at position i and put it in at position j."""

    def move(order: Order) -> Order:
        rest = order[:i] + order[i + 1 :]
        return (*rest[:j], order[i], *rest[j:])

    return move


def blocks_exchanged(start: int, first: int, second: int) -> Move:
    """Exchange two neighbouring blocks, of `first` and `second` items from position `start` on."""
    middle, stop = start + first, start + first + second
    return lambda order: order[:start] + order[middle:stop] + order[start:middle] + order[stop:]


# ---- the published searches


def greedy_construction(losses: Losses, items: Sequence[int]) -> Order:
    """From the beginning on, append the unused item of lowest loss."""
    order: Order = ()
    left = list(items)
    while left:
        best, _ = losses.lowest([(*order, item) for item in left])
        order = (*order, left.pop(best))
    return order


def bubble(
    losses: Losses, order: Order, *, passes: int = 5, sweeps: int | None = None, reach: int | None = None
) -> Order:
    """Adjacent swaps from left to right, then swaps of all other pairs, each as soon as it lowers the loss.

    Args:
        losses: of orders.
        order: to begin with.
        passes: over neighbours, at most; the first without a swap is the last.
        sweeps: over pairs that are not neighbours, at most; None goes on until nothing improves.
        reach: how far apart these pairs may be; None is any distance.
    """
    n, done = len(order), 0
    for _ in range(passes):
        order, swaps = descend(losses, order, [swapped(i, j) for i, j in pairwise(range(n))])
        if not swaps:
            break
    apart = [swapped(i, j) for i, j in combinations(range(n), 2) if 1 < j - i <= (reach or n)]
    while sweeps is None or done < sweeps:
        order, swaps = descend(losses, order, apart)
        done += 1
        if not swaps:
            break
    return order


def descend(losses: Losses, order: Order, moves: Sequence[Move]) -> tuple[Order, int]:
    """Try moves in turn and make each that lowers the loss; the order reached, and how many were made.

    The next few moves are tried together, twice as many after each few that all failed.
    """
    place, made, window = 0, 0, SMALLEST_WINDOW
    while place < len(moves):
        trials = [move(order) for move in moves[place : place + window]]
        better = np.flatnonzero(losses.differences(order, trials) < -EPSILON)
        if len(better):
            order, made = trials[better[0]], made + 1
            place, window = place + int(better[0]) + 1, SMALLEST_WINDOW
        else:
            place, window = place + len(trials), min(2 * window, LARGEST_WINDOW)
    return order, made


def reinsertion(losses: Losses, order: Order, *, passes: int = 3, reach: int | None = None) -> Order:
    """For each position, put its item where the loss is lowest; until a pass changes nothing, at most `passes`.

    An item moves by at most `reach` positions; None is any distance.
    """
    n = len(order)
    for _ in range(passes):
        before = order
        for position in range(n):
            others = [other for other in range(n) if 0 < abs(other - position) <= (reach or n)]
            trials = [moved(position, other)(order) for other in others]
            differences = losses.differences(order, trials)
            if differences.min(initial=0.0) < -EPSILON:
                order = trials[int(differences.argmin())]
        if order == before:
            break
    return order


def annealing(
    losses: Losses,
    order: Order,
    *,
    proposals: int = 1500,
    temperature: float = 0.3,
    near: float = 0.75,
    seed: int = 42,
    window: int = 4,
) -> Order:
    """Simulated annealing by swaps; the order of lowest loss that was met.

    Proposal t is accepted if the loss rises by less than -T ln(u), T = temperature (1 - t / proposals), u uniform: the
    Metropolis rule. Positions and u do not depend on the order, so the next few proposals are tried together.

    Args:
        losses: of orders.
        order: to begin with.
        proposals: swaps that are proposed.
        temperature: at the beginning [nat/token].
        near: chance that the second position is at most two from the first, around the ends; else it is uniform.
        seed: of the proposals.
        window: proposals tried together.
    """
    swaps, margins = _proposals(len(order), proposals, temperature, near, seed)
    best, level, lowest, step = order, 0.0, 0.0, 0
    while step < proposals:
        ahead = slice(step, step + window)
        trials = [swap(order) for swap in swaps[ahead]]
        differences = losses.differences(order, trials, margins[ahead])
        taken = np.flatnonzero((differences < 0) | (differences < margins[ahead]))
        if not len(taken):
            step += len(trials)
            continue
        chosen = int(taken[0])
        order, level, step = trials[chosen], level + float(differences[chosen]), step + chosen + 1
        if level < lowest - EPSILON:
            best, lowest = order, level
    return best


def _proposals(n: int, count: int, temperature: float, near: float, seed: int) -> tuple[list[Move], np.ndarray]:
    generator = np.random.RandomState(seed)
    swaps = []
    for _ in range(count):
        i = int(generator.randint(n))
        if generator.rand() < near:
            j = (i + int(generator.choice([-2, -1, 1, 2]))) % n
        else:
            j = (i + int(generator.randint(1, n))) % n
        swaps.append(swapped(min(i, j), max(i, j)))
    falling = temperature * (1 - np.arange(count) / count)
    return swaps, -falling * np.log(generator.uniform(np.finfo(float).tiny, 1, count))


# ---- a search of our own


def block_descent(losses: Losses, order: Order, *, largest_block: int = 3, rounds: int = 100) -> Order:
    """Exchanges of neighbouring blocks: of single items first, of up to three where those no longer help.

    All exchanges of one kind are tried at once. Of those that lower the loss, the ones that do not overlap are made
    together, the most helpful first, if that is better than the most helpful alone. What was exchanged in vain is left
    out from then on, but for single items: before larger blocks are tried, all neighbours have been tried in the order
    as it is. Exchanging blocks of one and r moves an item by r; blocks of two or three undo what single items cannot,
    where two runs of layers are interleaved.

    Args:
        losses: of orders.
        order: to begin with.
        largest_block: items in a block, at most.
        rounds: exchanges of several blocks at once, at most.
    """
    n, size = len(order), 1
    in_vain: set[Blocks] = set()
    for _ in range(rounds):
        spans = [span for span in _spans(n, size) if _blocks(order, span) not in in_vain]
        helpful = _helpful(losses, order, spans)
        in_vain |= {_blocks(order, span) for span in spans if span not in helpful}
        if helpful:
            in_vain |= {_blocks(order, span)[::-1] for span in helpful}  # to undo them
            order, size = _together(losses, order, helpful), 1
        elif size == 1 and len(spans) < n - 1:
            in_vain = {blocks for blocks in in_vain if len(blocks[0]) + len(blocks[1]) > 2}
        elif size < min(largest_block, n - 1):
            size += 1
        else:
            break
    return order


def _spans(n: int, size: int) -> list[Span]:
    """Neighbouring blocks among n items, the larger of which has `size`."""
    return [
        (start, first, second)
        for first in range(1, size + 1)
        for second in range(1, size + 1)
        if max(first, second) == size
        for start in range(n - first - second + 1)
    ]


def _blocks(order: Order, span: Span) -> Blocks:
    """What stands in two neighbouring blocks."""
    start, first, second = span
    return order[start : start + first], order[start + first : start + first + second]


def _helpful(losses: Losses, order: Order, spans: Sequence[Span]) -> list[Span]:
    """Exchanges that lower the loss, the most helpful first."""
    if not spans:
        return []
    differences = losses.differences(order, [blocks_exchanged(*span)(order) for span in spans])
    return [spans[index] for index in np.argsort(differences, kind="stable") if differences[index] < -EPSILON]


def _together(losses: Losses, order: Order, helpful: Sequence[Span]) -> Order:
    """The order after those of these exchanges that do not overlap, if better than after the first; else after it."""
    alone = together = blocks_exchanged(*helpful[0])(order)
    chosen = [helpful[0]]
    for span in helpful[1:]:
        if all(_apart(span, other) for other in chosen):
            chosen.append(span)
            together = blocks_exchanged(*span)(together)
    if len(chosen) == 1:
        return alone
    best, _ = losses.lowest([together, alone])
    return (together, alone)[best]


def _apart(one: Span, other: Span) -> bool:
    return sum(one) <= other[0] or sum(other) <= one[0]
