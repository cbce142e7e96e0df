"""The rules for degenerate completions find what was planted, and nothing in healthy text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.corpora import degeneration
from lab.corpora.degeneration import GRAM, LONGEST_PERIOD, novel, repeated_share, terminal_loop, text_flags

pytestmark = pytest.mark.calibration

#: distinct ids that no planted loop uses, so that a healthy beginning repeats nothing
HEALTHY = st.integers(0, 120).map(lambda length: tuple(range(1000, 1000 + length)))
SEQUENCES = st.lists(st.integers(0, 3), max_size=80)


@st.composite
def planted_loops(draw) -> tuple[tuple[int, ...], int]:
    """A healthy beginning and a loop behind it that covers at least 30 %; the ids and the period."""
    beginning = draw(HEALTHY)
    period = draw(st.integers(1, LONGEST_PERIOD))
    shortest = max(3 * period, 12, -(-3 * len(beginning) // 7))
    length = draw(st.integers(shortest, shortest + 2 * LONGEST_PERIOD))
    return beginning + tuple(index % period for index in range(length)), period


@settings(deadline=None)
@given(planted_loops())
def test_planted_loops_are_found(planted):
    """Any period up to 64, any start: period and length are those that were planted."""
    ids, period = planted
    length = sum(token < LONGEST_PERIOD for token in ids)
    assert terminal_loop(ids) == (period, length)


@settings(deadline=None)
@given(SEQUENCES)
def test_no_loop_without_repeated_8_grams(ids):
    """Three periods and 12 tokens hold some 8-gram twice, so a loop is never seen where nothing repeats."""
    if repeated_share(ids) == 0:
        assert terminal_loop(ids) is None


@settings(deadline=None)
@given(SEQUENCES)
def test_novel_marks_first_occurrences(ids):
    """A token is novel if the 8-gram that ends at it starts nowhere earlier; the first seven always are."""
    mask = novel(ids)
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    assert len(mask) == len(ids)
    assert all(mask[: GRAM - 1])
    assert list(mask[GRAM - 1 :]) == [gram not in grams[:start] for start, gram in enumerate(grams)]


@settings(deadline=None)
@given(SEQUENCES)
def test_repeated_share_is_one_minus_distinct_over_all(ids):
    """The share that `novel` implies is the spec's formula."""
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    expected = 1 - len(set(grams)) / len(grams) if grams else 0
    assert repeated_share(ids) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "text", "flag"),
    [
        ((), "", "empty"),
        ((7,), " \n", "empty"),
        ((5, 6) * 10, "yes no " * 10, "loop"),
        (tuple(range(20)) * 2, "words", "repetitive"),
        (tuple(range(100)), "All work and no play. " * 10, "compressible"),
        (tuple(range(9)), "Paris.\nUser: and Spain?", "leak"),
        (tuple(range(9)), "Paris<|im_end|>", "leak"),
        (tuple(range(9)), "Certainly: name the three longest rivers of the old world again", "echo"),
    ],
)
def test_each_fault_raises_its_flag(ids, text, flag):
    """One example of each rule; the faults are chosen so that no other rule sees them."""
    prompt = "Please name the three longest rivers of the old world"
    assert text_flags(ids, text, prompt) == {flag}


def test_healthy_text_raises_no_flag():
    """A plain answer with a list, a colon and a question is let through."""
    text = "The answer: rivers.\n- Nile\n- Niger\nQuestion: which user: knows the Congo as Zaire?"
    assert text_flags(range(60), text, "Name three rivers") == set()


@pytest.mark.parametrize(
    ("tokens", "missed", "raised"), [(10, 1, False), (10, 2, True), (100, 5, False), (100, 6, True)]
)
def test_one_miss_or_five_percent_is_forgiven(tokens, missed, raised):
    """Generator and forward pass run different kernels, so a near tie may fall the other way."""
    assert degeneration.misses_greedy(round(1 - missed / tokens, 4), tokens) is raised


def test_periods_of_loops_have_a_limit():
    assert terminal_loop(list(range(64)) * 4) == (64, 256)
    assert terminal_loop(list(range(65)) * 4) is None
