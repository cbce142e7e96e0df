"""Which learning rate is gentle: the largest of the sweep at which A leaves other text as it was, within 0.02 nat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lab.adapters import lora
from lab.corpora.batches import TokenText
from lab.corpora.corpus import load_corpus, token_text
from lab.subjects.anatomy import Decoder
from lab.subjects.catalog import facts
from lab.subjects.loading import load
from lab.training import recipes, specimens
from lab.training.evaluation import target_readings

LIMIT = 0.02  #: nat/token, see claim T-18.18d
BATCH_TOKENS = 2048


def text_rises(device: str, report: Callable[[str], None]) -> dict[float, float]:
    """Rise of the loss on completions of the subject's own corpus, by learning rate of A [nat/token].

    Raises:
        NotApplicable: an adapter of the sweep is not here.
    """
    family, rates = recipes.family(), recipes.rates()
    names = {rate: recipes.run_name("A", rate, 0) for rate in rates.sweep}
    folders = specimens.require([family["base"], *names.values()])
    subject = load(facts(family["subject"]), "bfloat16", device)
    texts = [token_text(text) for text in load_corpus(subject.facts, subject.tokenizer).texts]
    rises = {}
    with lora.merged(subject.decoder, lora.read_factors(subject.decoder, folders[family["base"]])):
        before = _loss(subject.decoder, texts)
        for rate, name in names.items():
            with lora.attached(subject.decoder, folders[name]):
                rises[rate] = _loss(subject.decoder, texts) - before
            report(f"A at {rate:g}: the loss of other text rises by {rises[rate]:+.4f} nat per token")
    return rises


def gentle(rises: Mapping[float, float]) -> float | None:
    """The largest rate whose rise is within the limit; None if there is none."""
    return max((rate for rate, rise in rises.items() if rise <= LIMIT), default=None)


def verdict(rises: Mapping[float, float]) -> str:
    """What the sweep says about the gentle rate that the recipes name, in one line."""
    found, named = gentle(rises), recipes.rates().gentle
    if found == named:
        return f"the gentle rate of the recipes, {named:g}, is the largest within {LIMIT:g} nat"
    say = "no rate of the sweep is" if found is None else f"{found:g} is the largest"
    return f"the recipes name {named:g} as gentle, but {say} within {LIMIT:g} nat: change [rates] in recipes.toml"


def _loss(decoder: Decoder, texts: Sequence[TokenText]) -> float:
    return float(np.concatenate([losses for losses, _ in target_readings(decoder, texts, BATCH_TOKENS)]).mean())
