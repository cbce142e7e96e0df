"""Real changes of a subject, its text or an instrument, each small and seeded: every one must raise an alarm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lab.alarms.trial import Trial, Variation
from lab.corpora import batches
from lab.corpora.batches import Positions
from lab.corpora.corpus import Text
from lab.errors import UserError

SEED = 20260704


def noise(layer: int, share: float = 0.01) -> Variation:
    """Gaussian noise on every matrix of a layer, its standard deviation `share` of the matrix's own."""

    def noisy(matrix: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(matrix.shape, generator=generator)
        return matrix.float() + share * matrix.float().std() * drawn

    return _edited(lambda trial: matrices(trial.subject.decoder.layers[layer]), noisy)


def exchanged(layer: int) -> Variation:
    """The weights of a layer and of the next exchanged."""

    @contextmanager
    def vary(trial: Trial) -> Iterator[Trial]:
        pair = trial.subject.decoder.layers[layer : layer + 2]
        _exchange(*pair)
        try:
            yield trial
        finally:
            _exchange(*pair)

    return vary


def scaled_final_norm(factor: float = 1.02) -> Variation:
    """The gain of the final norm times a factor."""
    return _edited(lambda trial: trial.subject.decoder.final_norm.parameters(), lambda gain, _: gain.float() * factor)


def requantized(bits: int, group: int | None = None) -> Variation:
    """Every matrix of every layer rounded to so many bits.

    w -> s round(w / s) with s = max |w| / (2^(bits-1) - 1), per output or per `group` of entries of it.
    """

    def rounded(matrix: Tensor, _: torch.Generator) -> Tensor:
        grouped = matrix.float().reshape(-1, group or matrix.shape[-1])
        scale = grouped.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        result: Tensor = ((grouped / scale).round() * scale).reshape(matrix.shape)
        return result

    return _edited(lambda trial: (m for layer in trial.subject.decoder.layers for m in matrices(layer)), rounded)


@contextmanager
def own_position(trial: Trial) -> Iterator[Trial]:
    """Scored positions off by one: a target is looked up at its own position, not at the one that predicts it."""
    made = batches._positions

    def late(scored: Iterable[tuple[int, int, int]]) -> Positions:
        return made([(row, position + 1, target) for row, position, target in scored])

    with patch.object(batches, "_positions", late):
        yield trial


@contextmanager
def late_completions(trial: Trial) -> Iterator[Trial]:
    """Scored range off by one: the first token of every completion counts as part of the prompt."""

    def late(text: Text) -> Text:
        prompt, completion = text.prompt_ids + text.completion_ids[:1], text.completion_ids[1:]
        return replace(text, prompt_ids=prompt, completion_ids=completion, novel=text.novel[1:])

    yield _of_texts(trial, late)


@contextmanager
def without_system_message(trial: Trial) -> Iterator[Trial]:
    """The system turn dropped from every prompt, where a template opens each turn with the same token (ChatML).

    Raises:
        UserError: the prompts have no such turn.
    """

    def dropped(text: Text) -> Text:
        ids = text.prompt_ids
        opens = [index for index, token in enumerate(ids) if token == ids[0]]
        if len(opens) < 3 or opens[1] >= text.user_span[0]:
            raise UserError(f"prompt {text.id} of {trial.corpus.subject} does not open with a system turn of its own")
        start, stop = text.user_span
        return replace(text, prompt_ids=ids[opens[1] :], user_span=(start - opens[1], stop - opens[1]))

    yield _of_texts(trial, dropped)


def matrices(layer: nn.Module) -> list[nn.Parameter]:
    """The two-dimensional weights of a layer."""
    return [parameter for parameter in layer.parameters() if parameter.ndim == 2]


def _of_texts(trial: Trial, change: Callable[[Text], Text]) -> Trial:
    return replace(trial, corpus=replace(trial.corpus, texts=tuple(map(change, trial.corpus.texts))))


def _edited(
    which: Callable[[Trial], Iterable[nn.Parameter]], edit: Callable[[Tensor, torch.Generator], Tensor]
) -> Variation:
    """A variation that replaces some parameters by `edit(parameter, generator)` and puts them back."""

    @contextmanager
    def vary(trial: Trial) -> Iterator[Trial]:
        parameters = list(which(trial))
        saved = [parameter.detach().clone() for parameter in parameters]
        generator = torch.Generator().manual_seed(SEED)
        try:
            for parameter in parameters:
                parameter.data.copy_(edit(parameter.detach(), generator))
            yield trial
        finally:
            for parameter, own in zip(parameters, saved, strict=True):
                parameter.data.copy_(own)

    return vary


def _exchange(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        one.data, other.data = other.data, one.data
