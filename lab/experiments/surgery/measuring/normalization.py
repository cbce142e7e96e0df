"""How T-15 measures: constants from one part of the corpus, replacements scored on the other, and what norms see."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.corpora.corpus import Corpus
from lab.errors import UserError
from lab.experiments.surgery.measuring import (
    normalization_activations,
    normalization_latency,
    normalization_layers,
    normalization_recovery,
    normalization_whole,
)
from lab.experiments.surgery.measuring.normalization_losses import Scorer
from lab.experiments.surgery.normalization import Budget
from lab.normalization.sites import norms_of
from lab.records import variable
from lab.residual.sweeps import Sample, sample
from lab.store import Sweep
from lab.subjects.loading import LoadedSubject

#: Of four texts in a row the last one calibrates, the others are scored as far as the budget goes. Texts are balanced
#: over seven categories in turn, so that both parts meet all of them.
CALIBRATE, EVERY = 3, 4


@dataclass(frozen=True)
class Parts:
    """Texts that are scored, and others: those on which constants are collected, and all on which norms are trained."""

    scored: Sample
    calibration: Sample
    training: Sample

    @property
    def calibration_texts(self) -> list[TokenText]:
        """The calibration texts, completions cut as those of the scored texts are."""
        return list(self.calibration.texts)

    def batch(self, texts: list[TokenText]) -> TokenBatch:
        """Texts as one batch, however long."""
        (batch,) = token_batches(texts, sum(len(text.ids) for text in texts) * len(texts))
        return batch


def parts(corpus: Corpus, budget: Budget) -> Parts:
    """Split the corpus into texts to be scored and texts to calibrate on.

    Raises:
        UserError: the corpus has fewer than four texts.
    """
    if len(corpus.texts) < EVERY:
        raise UserError(
            f"the corpus of {corpus.subject} has {len(corpus.texts)} texts; {EVERY} at least are needed to calibrate "
            "norms on some and score them on others"
        )
    held = [text for index, text in enumerate(corpus.texts) if index % EVERY == CALIBRATE]
    others = [text for index, text in enumerate(corpus.texts) if index % EVERY != CALIBRATE]
    scored = sample(replace(corpus, texts=tuple(others)), budget.prompts, budget.tokens)
    unscored = tuple(text for text in corpus.texts if text.id not in scored.prompts)
    return Parts(
        scored,
        sample(replace(corpus, texts=tuple(held)), budget.calibration_prompts, budget.tokens),
        sample(replace(corpus, texts=unscored), None, budget.tokens),
    )


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.surgery.normalization.measure`."""
    decoder = subject.decoder
    norms, texts = norms_of(decoder), parts(corpus, budget)
    scorer = Scorer(decoder, norms, texts.scored, sweep, budget)
    calibration = texts.batch(texts.calibration_texts)
    baseline = scorer.intact()
    rules = normalization_whole.rules(decoder, norms, calibration, texts.calibration_texts, budget)
    variables = normalization_activations.measured(decoder, norms, texts.scored, sweep, budget)
    variables |= normalization_whole.measured(scorer, rules)
    variables |= normalization_layers.measured(scorer, rules)
    variables |= normalization_recovery.measured(scorer, rules, texts.training.texts)
    variables |= normalization_latency.measured(decoder.device, decoder.dtype, budget.bench, sweep)
    variables |= {
        "scored_tokens": variable("prompt", texts.scored.scored_tokens, "token", "completion tokens scored"),
        "text_weight": variable("prompt", np.ones(len(baseline)), "1", "equal weights of the texts"),
        "baseline_loss": variable("prompt", baseline, "nat/token", "loss of the intact model"),
        "restored_loss": variable("prompt", scorer.intact(), "nat/token", "the same after all replacements"),
        "uniform_loss": variable((), math.log(decoder.vocabulary), "nat/token", "loss of a uniform guess, ln V"),
    }
    coords = {
        "layer": np.arange(decoder.n_layers),
        "site": list(norms.block_roles),
        "variant": list(rules.whole),
        "condition": list(normalization_activations.CONDITIONS),
        "prompt_id": ("prompt", list(texts.scored.prompts)),
        **normalization_latency.coords(decoder.device, budget.bench),
        **normalization_recovery.coords(budget.training, rules),
    }
    return xr.Dataset(variables, coords, {"settings": json.dumps({"hidden_size": decoder.width})})
