"""Where the answer of a base model ends: in a plain frame it sets no end token and goes on until the limit.

After its answer such a model asks and answers questions of its own, and sooner or later goes round in
a loop. Stopping at the first further question would leave answers of a few words (Gemma-3-270M: 1,085
tokens in all, too few for claims, against 1,618). Rejecting completions that loop would leave nothing. So each is
cut where it begins to repeat itself: what is left is a prefix of greedy text, and so the model's own.
"""

from __future__ import annotations

from lab.corpora import degeneration

#: the rule, as recorded in the settings of a corpus
CUT = {"before": "first repeated n-gram", "n": degeneration.GRAM, "further_turns": "kept"}


def cut(ids: tuple[int, ...], reason: str) -> tuple[tuple[int, ...], str]:
    """The completion up to where its first repeated 8-gram begins; the reason is then `cut`.

    Args:
        ids: the ids that were generated.
        reason: why generation ended.
    """
    novel = degeneration.novel(ids)
    if all(novel):
        return ids, reason
    last_of_gram = novel.index(False)
    return ids[: last_of_gram - degeneration.GRAM + 1], "cut"
