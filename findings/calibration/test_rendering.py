"""Prompts are rendered to the ids that the subject's template means, and the user's words are found in them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.corpora.byte_tokenizer import CHAT, END, START, byte_tokenizer
from lab.corpora.rendering import render
from lab.errors import UserError

pytestmark = pytest.mark.calibration

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_system_message_and_header_frame_the_users_words(tokenizer):
    """The prompt's ids are those of the template's text, and the span holds exactly the user's words."""
    rendering = render(tokenizer, "chat", SYSTEM, "Why?")
    assert rendering.text == f"{START}system\n{SYSTEM}{END}\n{START}user\nWhy?{END}\n{START}assistant\n"
    assert tokenizer.decode(rendering.ids) == rendering.text
    assert tokenizer.decode(rendering.ids[slice(*rendering.user_span)]) == "Why?"


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip))
def test_any_words_are_found_again(words):
    """The span covers the words whatever bytes they take, also where the system message says the same."""
    tokenizer = byte_tokenizer()
    for frame in ("chat", "plain"):
        rendering = render(tokenizer, frame, f"Answer: {words}", words)
        # one token per byte: nothing is merged, so the span decodes to the words themselves
        assert tokenizer.decode(rendering.ids[slice(*rendering.user_span)]) == words.strip()


def test_a_template_without_system_role_gets_the_message_in_front():
    """Gemma's template refuses the role; the message then opens the user's turn, behind it an empty line."""
    rendering = render(byte_tokenizer(NO_SYSTEM), "chat", SYSTEM, "Why?")
    assert rendering.text == f"{START}user\n{SYSTEM}\n\nWhy?{END}\n{START}assistant\n"


def test_a_template_that_drops_the_system_message_gets_it_in_front():
    """A template that silently leaves the system turn out must not lose our message."""
    dropping = CHAT.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert f"{SYSTEM}\n\nWhy?" in render(byte_tokenizer(dropping), "chat", SYSTEM, "Why?").text


def test_reasoning_is_switched_off_where_the_template_knows_how():
    """`enable_thinking` reaches the template as False."""
    thinking = CHAT + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    assert not render(byte_tokenizer(thinking), "chat", SYSTEM, "Why?").opens_reasoning


def test_the_plain_frame_ends_without_blank(tokenizer):
    """A frame that ends in a blank would take the blank of the answer's first word away."""
    assert render(tokenizer, "plain", SYSTEM, "Why?").text == f"{SYSTEM}\n\nQuestion: Why?\nAnswer:"


def test_a_doubled_start_token_is_refused():
    """A template that writes the start token twice is told by name."""
    doubled = byte_tokenizer(START + CHAT, bos_token=START)
    with pytest.raises(UserError, match="start token twice"):
        render(doubled, "chat", SYSTEM, "Why?")


def test_a_missing_template_is_refused():
    """Without its template an instruct model mostly answers with the bare end token."""
    with pytest.raises(UserError, match="no chat template"):
        render(byte_tokenizer(""), "chat", SYSTEM, "Why?")
