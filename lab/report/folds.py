"""A claim's verdicts folded to one: over layers, matrices or pairs, for the atlas and for the terminal alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

HOLDS, REFUTED, NOT_APPLICABLE, NOT_JUDGED = "holds", "refuted", "not applicable", "not judged"


class Judged(Protocol):
    """A claim's verdict at one place; None where there was nothing to judge it by. Recorded, or of a run."""

    @property
    def where(self) -> str | None:
        """Layer, matrix or pair (`L07`), or None."""

    @property
    def verdict(self) -> str | None:
        """`holds`, `refuted` or `not applicable`."""

    @property
    def measured(self) -> Any:
        """What the claim compared."""

    @property
    def threshold(self) -> str | None:
        """What it needed."""

    @property
    def support(self) -> float | None:
        """Share of resamples in which it holds."""

    @property
    def fragile(self) -> bool:
        """Whether it holds, but not on most of them."""


Place = TypeVar("Place", bound=Judged)


def folded(verdicts: Iterable[str | None]) -> str:
    """One verdict for all places: not judged or refuted if it is at any; not applicable only if it is at all."""
    found = {verdict or NOT_JUDGED for verdict in verdicts}
    return next(one for one in (NOT_JUDGED, REFUTED, HOLDS, NOT_APPLICABLE) if one in found)


@dataclass(frozen=True)
class Fold(Generic[Place]):
    """The verdicts of one claim on one subject: one, or one per layer, matrix or pair."""

    verdicts: tuple[Place, ...]

    @cached_property
    def judged(self) -> list[Place]:
        """Those that hold or are refuted."""
        return [verdict for verdict in self.verdicts if verdict.verdict in (HOLDS, REFUTED)]

    @cached_property
    def failing(self) -> list[Place]:
        """Those that are refuted."""
        return [verdict for verdict in self.judged if verdict.verdict == REFUTED]

    @cached_property
    def fragile_places(self) -> list[Place]:
        """Those that hold, but not on most resamples of the prompts."""
        return [verdict for verdict in self.judged if verdict.fragile]

    @property
    def fragile(self) -> bool:
        """Whether the claim holds, but at some place not on most resamples of the prompts."""
        return self.verdict == HOLDS and bool(self.fragile_places)

    @property
    def repeated(self) -> bool:
        """Whether the claim was judged at more than one place."""
        return len(self.verdicts) > 1 or self.verdicts[0].where is not None

    @property
    def verdict(self) -> str:
        """That of all places; see `folded`."""
        return folded(verdict.verdict for verdict in self.verdicts)

    @property
    def support(self) -> float | None:
        """The least support of all places: the claim as a whole has no more."""
        return min((verdict.support for verdict in self.judged if verdict.support is not None), default=None)

    @property
    def threshold(self) -> str | None:
        """What was needed, if it is the same everywhere."""
        found = {verdict.threshold for verdict in self.judged if verdict.threshold}
        return next(iter(found)) if len(found) == 1 else None

    @property
    def measured(self) -> Any:
        """What was measured; for many places the least and the greatest number."""
        values = [verdict.measured for verdict in self.judged if verdict.measured is not None]
        if len(self.verdicts) == 1:
            return values[0] if values else None
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        return Range(min(numbers), max(numbers)) if numbers else None


@dataclass(frozen=True)
class Range:
    """The least and the greatest of many measured numbers."""

    low: float
    high: float
