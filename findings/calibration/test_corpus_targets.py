"""What of a text is scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.corpora.corpus import Text, completion_slice, token_text, user_text
from lab.corpora.degeneration import novel

pytestmark = pytest.mark.calibration


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=8))
def test_completion_slice_covers_each_completion_token_once(lengths):
    """For any P and T the targets are P .. T - 1."""
    for prompt, completion in lengths:
        total = prompt + completion
        assert list(range(total))[completion_slice(prompt, total)] == list(range(prompt, total))


def text_of(completion: tuple[int, ...], end_id: int | None = 2, **fields) -> Text:
    return Text("t", "rare", (1, 5, 6, 7), completion, (1, 3), novel(completion), end_id=end_id, **fields)


@settings(deadline=None)
@given(st.lists(st.integers(3, 5), min_size=1, max_size=60), st.integers(1, 70), st.integers(1, 5))
def test_targets_are_novel_completion_tokens(completion, max_tokens, stride):
    """Cut first, then masked, then thinned out; never a prompt token, never the end token."""
    text = text_of(tuple(completion))
    scored = token_text(text, max_tokens=max_tokens, stride=stride)
    kept = [4 + index for index, new in enumerate(text.novel[:max_tokens]) if new]
    assert scored.ids == text.prompt_ids + text.completion_ids[:max_tokens]
    assert scored.targets == tuple(kept[::stride])


def test_repeated_tokens_and_the_end_token_are_scored_on_request():
    """The published runs scored repeated tokens; the end token is reported apart."""
    text = text_of((8, 9) * 8)
    assert len(token_text(text).targets) < 16
    assert token_text(text, score_repeated=True).targets == tuple(range(4, 20))
    with_end = token_text(text, score_repeated=True, score_end_token=True)
    assert (with_end.ids[-1], with_end.targets[-1]) == (2, 20)


@pytest.mark.parametrize(("text", "max_tokens"), [(text_of((8, 9), end_id=None), None), (text_of((8, 9)), 1)])
def test_an_end_token_that_the_model_did_not_set_is_not_scored(text, max_tokens):
    """A completion that was cut, by the limit or by us, has no end."""
    assert 2 not in token_text(text, max_tokens=max_tokens, score_end_token=True).ids


def test_only_the_answer_behind_reasoning_is_scored():
    """Reasoning stays in the context and out of the targets."""
    assert token_text(text_of((8, 9, 10, 11), answer_start=3)).targets == (7,)


def test_the_users_words_are_targets_with_a_predecessor():
    """A span that begins the sequence starts at its second token."""
    assert user_text(text_of((8,))) == (1, 2)
    assert user_text(replace(text_of((8,)), user_span=(0, 3))) == (1, 2)
