"""Classes of target tokens on strings whose class is plain."""

import pytest

from lab.corpora.token_classes import FUNCTION_WORDS, TOKEN_TYPES, token_type

pytestmark = pytest.mark.calibration

EXAMPLES = {
    "other": ["", " ", "\n", "\n\n", "\t "],
    "function_word": [" the", "The", "not", " WHICH ", " ought"],
    "number": ["7", " 42", "3.14", "5.", ".5"],
    "punctuation": [".", ",", " (", "...", "**", "):", "`"],
    "content_word": [" cat", "Paris", "ing", "I", " you", "_", "__init__", "x1", "1.2.3", "é", "10%", "don't"],
}


@pytest.mark.parametrize(("expected", "text"), [(kind, text) for kind, texts in EXAMPLES.items() for text in texts])
def test_each_rule(expected, text):
    assert token_type(text) == expected


def test_the_published_list_has_96_words_and_none_of_the_missing():
    assert len(FUNCTION_WORDS) == 96
    assert not FUNCTION_WORDS & {"i", "we", "you", "what", "how", "then", "about", "am"}


def test_every_class_has_a_code():
    assert set(EXAMPLES) == set(TOKEN_TYPES)
