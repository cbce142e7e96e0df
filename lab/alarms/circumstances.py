"""Circumstances that change how numbers are computed and not what they are: none may raise an alarm."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from lab.alarms.trial import Trial, Variation
from lab.subjects import products

SEED = 20260704


def threads(count: int) -> Variation:
    """So many threads: sums are cut into other parts."""

    @contextmanager
    def vary(trial: Trial) -> Iterator[Trial]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield trial
        finally:
            torch.set_num_threads(before)

    return vary


def batches(factor: float) -> Variation:
    """Other batches: products of other shapes, other padding, other blocks of the executor."""

    @contextmanager
    def vary(trial: Trial) -> Iterator[Trial]:
        budgets = {
            name: replace(budget, batch_tokens=round(budget.batch_tokens * factor))
            for name, budget in trial.budgets.items()
        }
        yield replace(trial, budgets=budgets)

    return vary


@contextmanager
def shuffled(trial: Trial) -> Iterator[Trial]:
    """The same prompts in another order. Every budget still reads the prompts that it read."""
    texts = list(trial.corpus.texts)
    order = random.Random(SEED)
    shuffled_texts = []
    for start, stop in _between_cuts(trial.budgets, len(texts)):
        part = texts[start:stop]
        order.shuffle(part)
        shuffled_texts += part
    yield replace(trial, corpus=replace(trial.corpus, texts=tuple(shuffled_texts)))


@contextmanager
def native_products(trial: Trial) -> Iterator[Trial]:
    """Half-precision products by PyTorch's own kernels, be they slow; see `lab.subjects.products`."""
    narrow = {wide: plain for plain, wide in products.WIDE.items()}
    widened = [module for module in trial.subject.model.modules() if type(module) in narrow]
    with patch.object(products, "is_native", lambda dtype: True):
        _become(widened, narrow)
        try:
            yield trial
        finally:
            _become(widened, products.WIDE)


def _become(modules: list[nn.Module], classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    for module in modules:
        module.__class__ = classes[type(module)]


def _between_cuts(budgets: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
    """Ranges of texts between which a budget stops reading."""
    limits = (getattr(budget, name, None) for budget in budgets.values() for name in ("prompts", "pair_prompts"))
    cuts = sorted({0, count, *(limit for limit in limits if limit is not None and limit < count)})
    return list(pairwise(cuts))
