"""Whether a corpus is fit to be measured on: the limits, each of which is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.corpora.corpus import Corpus, Text
from lab.corpora.degeneration import novel

pytestmark = pytest.mark.calibration

SYSTEM = "Be brief."


def corpus_of(*lengths: int, rejected: int = 0, agreement: float = 0.99, loss: float = 0.5, repeat: int = 1) -> Corpus:
    """Texts of these many tokens in 3 categories; each token sequence is given `repeat` times over."""
    texts = []
    for index, length in enumerate(lengths):
        ids = tuple(range(10, 10 + length // repeat)) * repeat
        texts.append(
            Text(f"t{index}", "abc"[index % 3], (1, 2), ids, (0, 1), novel(ids), greedy_agreement=agreement, loss=loss)
        )
    unfit = {f"r{index}": ("loop",) for index in range(rejected)}
    return Corpus("toy", tuple(texts), SYSTEM, {"completion_source": "greedy"}, unfit, ("a", "b", "c"))


def test_a_good_corpus_has_no_problems():
    """50 answers of 60 tokens."""
    assert corpus_of(*[60] * 50).problems() == []


@pytest.mark.parametrize(
    ("corpus", "problem"),
    [
        (corpus_of(*[60] * 39, rejected=11), "only 39 of 50 completions are fit to be measured on (11 loop)"),
        (corpus_of(*[900] * 7), "only 2 completions of category b are fit, fewer than 3"),
        (corpus_of(*[29] * 50), "only 1450 tokens can be scored, fewer than 1500"),
        (corpus_of(*[2000] * 5, *[20] * 45), "the tokens weigh like 6 prompts, fewer than 15"),
        (corpus_of(*[2000] * 5, *[20] * 45), "the 5 longest completions hold 92% of the tokens"),
        (corpus_of(*[60] * 50, agreement=0.9), "only 90.0% of the tokens are the model's argmax"),
        (corpus_of(*[60] * 50, loss=1.2), "the completions cost the model 1.20 nat/token: not its own text"),
    ],
)
def test_each_limit_is_told(corpus, problem):
    """One corpus per limit that it fails."""
    assert problem in corpus.problems()


def test_repetition_counts_only_where_it_is_scored():
    """The mask takes repeated tokens away, so they are no fault then."""
    repeated = corpus_of(*[120] * 50, repeat=2)
    assert repeated.problems() == []
    assert repeated.problems(score_repeated=True) == ["44% of the tokens repeat 8-grams"]


def test_reference_answers_are_not_held_to_the_models_own_text():
    """Loss and argmax say nothing where the text is ours."""
    corpus = corpus_of(*[60] * 50, agreement=0.3, loss=3.0)
    assert replace(corpus, settings={"completion_source": "reference"}).problems() == []


def test_a_prefix_is_balanced():
    """The first n texts of a corpus, categories within one of each other."""
    prefix = corpus_of(*[60] * 50).prefix(7)
    assert sorted(sum(text.category == category for text in prefix.texts) for category in "abc") == [2, 2, 3]
