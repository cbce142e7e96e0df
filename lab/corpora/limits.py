"""Is a corpus good enough for claims? What it fails at is the reason for which claims are skipped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lab.corpora import degeneration

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus

SURVIVING_SHARE = 0.80  #: of the prompts
FEWEST_PER_CATEGORY = 3
FEWEST_SCORED = 1500  #: tokens; fewer leave thresholds to chance
FEWEST_EFFECTIVE = 15  #: prompts, by Kish
LARGEST_TOP_SHARE = 0.35  #: of the tokens, in the 5 longest answers
LARGEST_REPEATED_SHARE = 0.05  #: of the tokens, where repeated tokens are scored; more bends ratios
LEAST_AGREEMENT = 0.97  #: with the model's argmax
LARGEST_LOSS = 1.0  #: nat/token; greedy text costs 0.1 to 0.6


def problems(corpus: Corpus, score_repeated: bool) -> list[str]:
    """What the corpus fails at, one line each; see `Corpus.problems`."""
    from lab.corpora.corpus import scored_targets

    total = len(corpus.texts) + len(corpus.rejected)
    if len(corpus.texts) < SURVIVING_SHARE * total:
        return [f"only {len(corpus.texts)} of {total} completions are fit to be measured on ({_reasons(corpus)})"]
    lengths = np.array([len(scored_targets(text, score_repeated)) for text in corpus.texts], dtype=float)
    return _category_problems(corpus) + _length_problems(lengths) + _own_text_problems(corpus, score_repeated)


def effective_number(lengths: np.ndarray) -> float:
    """Kish's effective number of texts of these many tokens [n]: (sum n)^2 / sum n^2."""
    return float(lengths.sum() ** 2 / (lengths**2).sum()) if lengths.any() else 0.0


def _category_problems(corpus: Corpus) -> list[str]:
    counts = Counter(text.category for text in corpus.texts)
    return [
        f"only {counts[category]} completions of category {category} are fit, fewer than {FEWEST_PER_CATEGORY}"
        for category in corpus.categories
        if counts[category] < FEWEST_PER_CATEGORY
    ]


def _length_problems(lengths: np.ndarray) -> list[str]:
    total, effective = lengths.sum(), effective_number(lengths)
    top = np.sort(lengths)[-5:].sum() / total if total else 1.0
    tests = [
        (total < FEWEST_SCORED, f"only {total:.0f} tokens can be scored, fewer than {FEWEST_SCORED}"),
        (effective < FEWEST_EFFECTIVE, f"the tokens weigh like {effective:.0f} prompts, fewer than {FEWEST_EFFECTIVE}"),
        (top > LARGEST_TOP_SHARE, f"the 5 longest completions hold {top:.0%} of the tokens"),
    ]
    return [message for failed, message in tests if failed]


def _own_text_problems(corpus: Corpus, score_repeated: bool) -> list[str]:
    tokens = [len(text.completion_ids) for text in corpus.texts]
    repeated = sum(text.novel.count(False) for text in corpus.texts) / sum(tokens)
    own = corpus.settings.get("completion_source") == "greedy"  # reference answers are not the model's own text
    agreement = _mean([text.greedy_agreement for text in corpus.texts], tokens)
    loss = _mean([text.loss for text in corpus.texts], tokens)
    tests = [
        (score_repeated and repeated > LARGEST_REPEATED_SHARE, f"{repeated:.0%} of the tokens repeat 8-grams"),
        (own and agreement < LEAST_AGREEMENT, f"only {agreement:.1%} of the tokens are the model's argmax"),
        (own and loss > LARGEST_LOSS, f"the completions cost the model {loss:.2f} nat/token: not its own text"),
    ]
    return [message for failed, message in tests if failed]


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float:
    """Weighted mean of the values that were determined; NaN, which no limit catches, if none was."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else math.nan


def _reasons(corpus: Corpus) -> str:
    counts = Counter(flag for flags in corpus.rejected.values() for flag in flags if flag in degeneration.REJECTING)
    return ", ".join(f"{n} {flag}" for flag, n in counts.most_common())
