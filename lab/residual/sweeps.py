"""Losses of many layer programs on a sample of the corpus: one number per program and prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.corpora.batches import TokenBatch, TokenText, positions, prefix_apart, token_batches
from lab.corpora.corpus import Corpus, token_text, user_text
from lab.errors import UserError
from lab.residual.ahead import in_order
from lab.residual.executor import Executor
from lab.residual.programs import Program
from lab.residual.readouts import CompletionLoss
from lab.residual.results import Started
from lab.residual.streams import beside, mark
from lab.store import Arrays, Sweep

HEAD_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
#: Batches that a CUDA device has queued while an earlier one is waited for. A CPU has none: a killed run would lose it.
AHEAD = {"cuda": 1}


@dataclass(frozen=True)
class Sample:
    """Texts of a corpus and what is scored in them.

    Attributes:
        prompts: ids of the prompts.
        texts: token ids with the scored completion targets.
        user_targets: per text, indices of the user's own words (system message and template are context, not text).
    """

    prompts: tuple[str, ...]
    texts: tuple[TokenText, ...]
    user_targets: tuple[tuple[int, ...], ...]

    @property
    def scored_tokens(self) -> np.ndarray:
        """Scored completion tokens per prompt [prompt]."""
        return np.array([len(text.targets) for text in self.texts], dtype=np.int64)

    @property
    def user_tokens(self) -> np.ndarray:
        """Scored tokens of the user's own words per prompt [prompt]."""
        return np.array([len(targets) for targets in self.user_targets], dtype=np.int64)


def sample(corpus: Corpus, prompts: int | None, tokens: int | None) -> Sample:
    """The first `prompts` texts of the corpus (a balanced prefix), at most `tokens` completion tokens of each.

    None takes all. A text of which nothing is scored (every token repeats an earlier 8-gram) is left out.
    """
    chosen = corpus if prompts is None else corpus.prefix(prompts)
    pairs = [(text, token_text(text, max_tokens=tokens)) for text in chosen.texts]
    kept = [(text, tokens_of) for text, tokens_of in pairs if tokens_of.targets]
    if not kept:
        raise UserError(
            f"the corpus of {corpus.subject} has no scored token; make it anew: python -m lab complete {corpus.subject}"
        )
    return Sample(
        tuple(text.id for text, _ in kept),
        tuple(scored for _, scored in kept),
        tuple(tuple(user_text(text)) for text, _ in kept),
    )


@dataclass(frozen=True)
class ProgramLosses:
    """Runs layer programs on a sample; results are means per prompt.

    Attributes:
        executor: of the subject under study.
        sweep: keeps every batch's result, so that an interrupted sweep resumes, and reports progress.
        batch_tokens: padded tokens per batch of texts.
        head_dtype: `bfloat16` or `float32`, the precision of the vocabulary projection; log-softmax is always float32.
    """

    executor: Executor
    sweep: Sweep
    batch_tokens: int
    head_dtype: str

    def __call__(
        self,
        what: str,
        sample: Sample,
        programs: Mapping[str, Program],
        *,
        compare: bool = False,
        user_words: bool = False,
    ) -> dict[str, np.ndarray]:
        """Losses of every program.

        Args:
            what: names the part of the sweep, in progress and in errors.
            sample: the texts.
            programs: by label.
            compare: also KL divergence and top-1 agreement with the intact model.
            user_words: also the loss on the user's words.

        Returns:
            float64 arrays [program, prompt]: `loss` [nat/token]; with `compare` also `kl` [nat], `agreement` and
            `target_probability`; with `user_words` also `user_loss` [nat/token].

        Raises:
            UserError: a loss is NaN or infinite; names program and prompt.
        """
        batches = self.batches(sample, programs, user_words)
        total = float(sum(batch.ids.numel() for batch in batches) * len(programs))
        results: dict[str, np.ndarray] = {}
        done = 0.0
        shards = self._shards(what, batches, sample, programs, compare, user_words)
        for batch, arrays in zip(batches, shards, strict=True):
            for name, sums in arrays.items():
                tokens = sample.user_tokens if name == "user_loss" else sample.scored_tokens
                target = results.setdefault(name, np.full((len(programs), len(sample.texts)), np.nan))
                target[:, list(batch.texts)] = sums / tokens[list(batch.texts)]
            _require_finite(
                results["loss"][:, list(batch.texts)], what, list(programs), [sample.prompts[i] for i in batch.texts]
            )
            done += batch.ids.numel() * len(programs)
            self.sweep.progress(done, total, what)
        return results

    def batches(self, sample: Sample, programs: Mapping[str, Program], user_words: bool) -> list[TokenBatch]:
        """The sample's texts in batches; a beginning that all texts of one share is put apart where that may be."""
        batches = token_batches(sample.texts, self.batch_tokens)
        if not self.executor.splits_prefix(list(programs.values())):
            return batches
        return [prefix_apart(batch, positions(batch, sample.user_targets) if user_words else None) for batch in batches]

    def _shards(self, what: str, batches: Sequence[TokenBatch], *about: Any) -> Iterator[Arrays]:
        """Sums of one batch after the other, read back or computed."""
        device = self.executor.decoder.device
        depth, queue = AHEAD.get(device.type, 0), mark(device)
        work = {f"{what} {index}": partial(self._sums, batch, *about) for index, batch in enumerate(batches)}
        if not depth:
            return itertools.starmap(self.sweep.shard, work.items())
        begins = (
            partial(self.sweep.begin, name, compute, partial(self._start, queue, *compute.args))
            for name, compute in work.items()
        )
        return in_order(begins, depth)

    def _sums(
        self, batch: TokenBatch, sample: Sample, programs: Mapping[str, Program], compare: bool, user_words: bool
    ) -> Arrays:
        queue = mark(self.executor.decoder.device)
        return self._start(queue, batch, sample, programs, compare, user_words)()

    def _start(
        self,
        queue: torch.cuda.Event | None,
        batch: TokenBatch,
        sample: Sample,
        programs: Mapping[str, Program],
        compare: bool,
        user_words: bool,
    ) -> Callable[[], Arrays]:
        """Begin the work on a batch, which is prepared beside what is queued after `queue`; what is returned waits."""
        device = self.executor.decoder.device
        with beside(device, queue):
            user_positions = positions(batch, sample.user_targets).to(device) if user_words else None
            batch = batch.to(device)
            self.executor.capture(batch)
        dtype = HEAD_DTYPES[self.head_dtype]
        reference = self.executor.intact(batch) if compare else None
        loss = partial(CompletionLoss, self.executor.decoder, batch, head_dtype=dtype, compiler=self.executor.compiler)
        completion = loss(reference=reference, target_probability=compare)
        user = loss(positions=user_positions) if user_words else None

        def read(states: Tensor) -> dict[str, Tensor]:
            return completion(states) | ({"user_loss": user(states)["loss"]} if user else {})

        return partial(_sums_of, self.executor.start(batch, list(programs.values()), read))


def _sums_of(started: Started) -> Arrays:
    return {name: sums.double().numpy() for name, sums in started.results().items()}


def token_mean(per_prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Means over all tokens [...] from means per prompt [..., prompt] and token counts [prompt]."""
    mean: np.ndarray = per_prompt @ tokens / tokens.sum()
    return mean


def _require_finite(losses: np.ndarray, what: str, programs: Sequence[str], prompts: Sequence[str]) -> None:
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        program, prompt = bad[0]
        raise UserError(
            f"{what}: the loss of {programs[program]} on prompt {prompts[prompt]} is {losses[program, prompt]}; "
            "check the weights, or measure with --dtype float32"
        )
