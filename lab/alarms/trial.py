"""What is tried: a subject, a text and budgets, and how one of them is varied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.subjects.loading import LoadedSubject


@dataclass(frozen=True)
class Trial:
    """What is measured, on which text and on how much of it.

    Attributes:
        subject: the subject; a change may have edited its weights for as long as the trial lasts.
        corpus: the texts.
        budgets: experiment name -> its budget.
    """

    subject: LoadedSubject
    corpus: Corpus
    budgets: Mapping[str, Any]


#: puts something of a trial aside for as long as it lasts: a circumstance, or a change
Variation = Callable[[Trial], AbstractContextManager[Trial]]
