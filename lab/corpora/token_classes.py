"""Classes of target tokens, by the surface of the decoded token: content, function, punctuation, number, other."""

from __future__ import annotations

import string

#: In the order of the codes that records hold.
TOKEN_TYPES = ("content_word", "function_word", "punctuation", "number", "other")

_ARTICLES = "a an the"
_AUXILIARIES = (
    "is are was were be been being have has had do does did will would could should may might shall can need dare ought"
)
_PREPOSITIONS = "to of in for on with at by from as into through during before after above below between under"
_CONJUNCTIONS = "and but or nor so yet because if when while than not no"
_DETERMINERS = "both either neither each every all any few more most other some such only own same too very just"
_PRONOUNS = "that which who whom this these those it its he she they them his her their my your"

#: The 96 words of the published classification; I, we, you, what, how, then, about are missing and count as content.
FUNCTION_WORDS = frozenset(
    " ".join((_ARTICLES, _AUXILIARIES, _PREPOSITIONS, _CONJUNCTIONS, _DETERMINERS, _PRONOUNS)).split()
)

# The published rule leaves the underscore out, so that names in code count as words.
_PUNCTUATION = frozenset(string.punctuation) - {"_"}


def token_type(text: str) -> str:
    """Class of a decoded token, one of `TOKEN_TYPES`; the first rule that fits decides.

    Nothing but white space is `other`; then function words, numbers (digits with at most one dot), punctuation;
    the rest, word pieces included, are content words.
    """
    word = text.strip().lower()
    if not word:
        return "other"
    if word in FUNCTION_WORDS:
        return "function_word"
    if word.replace(".", "", 1).isdigit():
        return "number"
    if set(word) <= _PUNCTUATION:
        return "punctuation"
    return "content_word"
