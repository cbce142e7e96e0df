"""What the parts of the T-11 measurement share: tools for one subject, and the texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from lab.corpora.batches import TokenText
from lab.corpora.corpus import Corpus, Text
from lab.errors import UserError
from lab.experiments.systems.measuring.quantization_methods import LAW_ROWS
from lab.experiments.systems.quantization import Budget
from lab.quantization.layers import WeightMap, Workshop, label, matrices
from lab.quantization.libraries import library_of
from lab.quantization.rounding import (
    Rounding,
    gaussian_error,
    largest_group,
)
from lab.residual.executor import Executor
from lab.residual.programs import Program
from lab.residual.sweeps import ProgramLosses, Sample
from lab.store import Sweep
from lab.subjects.loading import LoadedSubject

Variables = dict[str, xr.Variable]


@dataclass(frozen=True)
class Workbench:
    """What every part of the measurement works with."""

    workshop: Workshop
    losses: ProgramLosses
    budget: Budget
    group: int
    labels: dict[str, list[str] | list[int]]
    libraries: Collection[str]

    @classmethod
    def of(cls, subject: LoadedSubject, budget: Budget, sweep: Sweep, libraries: Collection[str]) -> Workbench:
        """The tools for one subject; `libraries` are the quantization libraries that are installed."""
        workshop = Workshop(subject.decoder)
        executor = Executor(subject.decoder)
        executor.variants = workshop.variants  # filled as programs are written
        columns = {m.in_features for layer in subject.decoder.layers for m in matrices(layer).values()}
        losses = ProgramLosses(executor, sweep, budget.batch_tokens, budget.head_dtype)
        return cls(workshop, losses, budget, largest_group(columns, budget.group_sizes), {}, libraries)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.workshop.decoder.n_layers

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.workshop.decoder.dtype

    def has_library_of(self, method: str) -> bool:
        """Whether the library that a method is of, if it is of one, is installed."""
        return library_of(method) in (None, *self.libraries)

    def rounding(self, bits: int, scheme: str = "symmetric_amax") -> Rounding:
        """Round-to-nearest with this subject's group size."""
        return Rounding(bits, self.group, scheme)

    def uniform(self, bits: int) -> Program:
        """Every layer at one width."""
        return self.layerwise([bits] * self.n_layers)

    def layerwise(self, bits: Sequence[int] | np.ndarray) -> Program:
        """Every layer at its own width."""
        return self.workshop.program([self.workshop.all(self.rounding(int(width))) for width in bits])

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        """Weights of each matrix type [layer]."""
        layers = self.workshop.decoder.layers
        return {
            matrix: np.array(
                [
                    sum(m.weight.numel() for path, m in matrices(layer).items() if label(path) == matrix)
                    for layer in layers
                ]
            )
            for matrix in self.workshop.types
        }


@dataclass(frozen=True)
class Texts:
    """What is read.

    Attributes:
        layers: texts of the layer sweep.
        methods: texts of methods and recipes, none of them in the layer sweep.
        matrices: the first texts of the layer sweep, on which single matrices are tried.
        calibration: every text that `methods` lacks, whole: what calibrated methods see.
    """

    layers: Sample
    methods: Sample
    matrices: Sample
    calibration: tuple[TokenText, ...]


def samples(corpus: Corpus, subject: LoadedSubject, budget: Budget) -> Texts:
    """Deal out the corpus.

    A text is one completion without its prompt, as running text; each is a block of correlated tokens, at most
    `block_tokens` long, and the unit of the bootstrap. Recipes are judged on texts that the layer sweep, from which
    some of them are made, has not seen. Where the corpus is too short for both, it is divided in proportion.
    """
    start = _start_token(corpus, subject)
    texts = [(text.id, _running(text, start, budget.block_tokens)) for text in corpus.texts]
    usable = [(name, text) for name, text in texts if text.targets]
    total = sum(len(text.ids) for _, text in usable)
    wanted = budget.layer_tokens, budget.method_tokens
    scale = 1.0 if None in wanted else min(1.0, total / (wanted[0] + wanted[1]))  # type: ignore[operator]
    if wanted[0] is None:  # everything: every second text, so that both halves are balanced
        halves = usable[::2], usable[1::2]
    else:
        first = _prefix(usable, wanted[0] * scale)
        halves = first, _prefix(usable[len(first) :], (wanted[1] or total) * scale)
    if not all(halves):
        raise UserError(f"the completions of {corpus.subject} are too few for two samples; make more of them")
    matrix = halves[0] if budget.matrix_tokens is None else _prefix(halves[0], budget.matrix_tokens)
    scored = {name for name, _ in halves[1]}
    calibration = tuple(_running(text, start, None) for text in corpus.texts if text.id not in scored)
    return Texts(_sample(halves[0]), _sample(halves[1]), _sample(matrix), calibration)


def _start_token(corpus: Corpus, subject: LoadedSubject) -> tuple[int, ...]:
    """The start token, where the subject's prompts begin with it: its attention sinks need one."""
    begin = getattr(subject.decoder.config, "bos_token_id", None)
    return (begin,) if begin is not None and all(text.prompt_ids[:1] == (begin,) for text in corpus.texts) else ()


def _running(text: Text, start: tuple[int, ...], longest: int | None) -> TokenText:
    body = text.completion_ids[:longest]
    first = len(start)
    targets = (index + first for index in range(len(body)) if text.novel[index] and index + first > 0)
    return TokenText(start + body, tuple(targets))


def _prefix(texts: Sequence[tuple[str, TokenText]], tokens: float) -> list[tuple[str, TokenText]]:
    lengths = np.cumsum([len(text.ids) for _, text in texts])
    return list(texts[: int(np.searchsorted(lengths, tokens)) + 1])


def _sample(texts: Sequence[tuple[str, TokenText]]) -> Sample:
    return Sample(tuple(name for name, _ in texts), tuple(text for _, text in texts), ((),) * len(texts))


def law(work: Workbench, weights: WeightMap | None) -> float:
    """Relative error of a weight-only method on Gaussian weights in the dtype of the model; NaN without one."""
    return float("nan") if weights is None else gaussian_error(weights, work.group * LAW_ROWS, work.dtype)
