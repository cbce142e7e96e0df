"""Arithmetic word problems with worked solutions: a narrow task that is quickly learned and precisely left.

Problems come from a seed. Each belongs to a family, which fixes its story and its steps:

    Question: Mia fills 3 bags with 4 apples each, adds 5 more, and gives away 2. How many apples are left?
    Answer: 3 * 4 = 12. 12 + 5 = 17. 17 - 2 = 15 #### 15

What a model learns on some families, numbers and names can be tested on others. Two regimes differ in what is known
beforehand. `novel`: four families are learned from nothing. `competent`: all six are known in a plain style
(`competence`), then two of them are learned in another, annotated one (`<<3*4=12>>12`): narrow data in a foreign style,
so that what happens to the rest can be seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

Style = Literal["plain", "annotated"]
Regime = Literal["novel", "competent"]
Range = tuple[int, int]

TRAINING_NAMES = ("Mia", "Tom", "Anna", "Ben", "Lucy", "Sam", "Nora", "Paul", "Ella", "Max", "Rosa", "Jack")
TEST_NAMES = ("Clara", "Hugo", "Vera", "Finn")
NOUNS = ("apples", "books", "cards", "coins", "eggs", "pens", "rings", "shells", "stones", "toys")
NUMBERS: Range = (2, 30)  #: the operands a, b, c
LARGE_NUMBERS: Range = (31, 99)  #: the same where numbers are out of distribution
FACTORS: Range = (2, 6)  #: the factor k, everywhere
SEED = 20260704
EVALUATED = 200  #: problems of each split that is not trained on


@dataclass(frozen=True)
class Step:
    """One line of a solution: `left sign right = result`."""

    left: int
    sign: Literal["+", "-", "*"]
    right: int

    @property
    def result(self) -> int:
        """What the line comes to."""
        match self.sign:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case "*":
                return self.left * self.right


@dataclass(frozen=True)
class Problem:
    """A story with a question, and its solution.

    Attributes:
        family: key of `FAMILIES`.
        numbers: operands as they were drawn; with the family they identify the problem.
        name: who the story is about.
        question: the story and the question.
        steps: of the solution, in order.
    """

    family: str
    numbers: tuple[int, ...]
    name: str
    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        """The result of the last step."""
        return self.steps[-1].result


@dataclass(frozen=True)
class Worked:
    """A problem written out.

    Attributes:
        text: question and solution.
        solution_start: character at which the solution begins; what stands before it is given.
        results: start and stop, in characters, of every number right of an equality sign, and of the final answer.
    """

    text: str
    solution_start: int
    results: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """Problems of one kind, all written in one style."""

    problems: tuple[Problem, ...]
    style: Style = "plain"

    @property
    def worked(self) -> list[Worked]:
        """The problems written out."""
        return [written(problem, self.style) for problem in self.problems]


@dataclass(frozen=True)
class _Family:
    """How numbers are drawn from a range, what is computed with them, and the story around them."""

    draw: Callable[[random.Random, Range], tuple[int, ...]]
    steps: Callable[..., tuple[Step, ...]]
    story: Callable[..., str]


def _sum_less(generator: random.Random, span: Range) -> tuple[int, ...]:
    """a, b, and c below their sum."""
    a, b = generator.randint(*span), generator.randint(*span)
    return a, b, generator.randint(span[0], min(span[1], a + b - 1))


def _pair(generator: random.Random, span: Range) -> tuple[int, ...]:
    return generator.randint(*span), generator.randint(*span)


def _with_factor(generator: random.Random, span: Range) -> tuple[int, ...]:
    return *_pair(generator, span), generator.randint(*FACTORS)


def _product_less(generator: random.Random, span: Range) -> tuple[int, ...]:
    """a, b, k, and c below k a + b."""
    a, b, k = _with_factor(generator, span)
    return a, b, k, generator.randint(span[0], min(span[1], k * a + b - 1))


#: the families, in a fixed order; the last two are held out of what is learned
FAMILIES: MappingProxyType[str, _Family] = MappingProxyType(
    {
        "gain_loss": _Family(
            _sum_less,
            lambda a, b, c: (Step(a, "+", b), Step(a + b, "-", c)),
            lambda name, noun, a, b, c: (
                f"{name} has {a} {noun}, receives {b} more and loses {c}. How many {noun} does {name} have now?"
            ),
        ),
        "times": _Family(
            _with_factor,
            lambda a, b, k: (Step(b, "*", k),),
            lambda name, noun, a, b, k: (
                f"There are {a} {noun} in the first box and {b} in the second. {name} buys {k} times as many {noun} "
                f"as are in the second box. How many {noun} does {name} buy?"
            ),
        ),
        "pack": _Family(
            _with_factor,
            lambda a, b, k: (Step(k, "*", a), Step(k * a, "+", b)),
            lambda name, noun, a, b, k: (
                f"{name} buys {k} packs of {a} {noun} each and finds {b} more. How many {noun} does {name} have?"
            ),
        ),
        "remainder": _Family(
            _pair,
            lambda a, b: (Step(a + b, "-", a),),
            lambda name, noun, a, b: (
                f"{name} and a friend have {a + b} {noun} together. {name} has {a} of them. "
                f"How many {noun} does the friend have?"
            ),
        ),
        "shop_days": _Family(
            _sum_less,
            lambda a, b, c: (Step(a, "+", b), Step(a + b, "-", c)),
            lambda name, noun, a, b, c: (
                f"{name} sells {a} {noun} on Monday, {b} on Tuesday, and on Wednesday {c} fewer than on both days "
                f"together. How many {noun} does {name} sell on Wednesday?"
            ),
        ),
        "three_step": _Family(
            _product_less,
            lambda a, b, k, c: (Step(k, "*", a), Step(k * a, "+", b), Step(k * a + b, "-", c)),
            lambda name, noun, a, b, k, c: (
                f"{name} fills {k} bags with {a} {noun} each, adds {b} more, and gives away {c}. "
                f"How many {noun} are left?"
            ),
        ),
    }
)
ALL = tuple(FAMILIES)
LEARNED, HELD_OUT = ALL[:4], ALL[4:]
NARROW, REST = ALL[:2], ALL[2:]


@cache
def splits(regime: Regime, seed: int = SEED) -> MappingProxyType[str, Split]:
    """All splits of a regime; what is tested is drawn first and never trained on.

    novel: `train` 3,000 of four families; `id` 200 of these with unseen numbers and names; out of distribution
    `ood_numbers`, `ood_template` (shop_days) and `ood_steps` (three_step), 200 each.

    competent: `competence` 3,200 of all families, `train` 3,000 of the two narrow ones, annotated; `id` 200 of these,
    annotated; `ood` 200 of the other four, plain.
    """
    dealer = _Dealer(regime, seed)
    if regime == "novel":
        found = {
            "id": Split(dealer.deal("id", LEARNED, EVALUATED)),
            "ood_numbers": Split(dealer.deal("ood_numbers", LEARNED, EVALUATED, LARGE_NUMBERS)),
            "ood_template": Split(dealer.deal("ood_template", ("shop_days",), EVALUATED)),
            "ood_steps": Split(dealer.deal("ood_steps", ("three_step",), EVALUATED)),
            "train": Split(dealer.deal("train", LEARNED, 3000, names=TRAINING_NAMES)),
        }
    else:
        found = {
            "id": Split(dealer.deal("id", NARROW, EVALUATED), "annotated"),
            "ood": Split(dealer.deal("ood", REST, EVALUATED)),
            "competence": Split(dealer.deal("competence", ALL, 3200, names=TRAINING_NAMES)),
            "train": Split(dealer.deal("train", NARROW, 3000, names=TRAINING_NAMES), "annotated"),
        }
    return MappingProxyType(found)


def written(problem: Problem, style: Style) -> Worked:
    """A problem with its solution in a style."""
    text = f"Question: {problem.question}\nAnswer:"
    start, results = len(text), []
    for index, step in enumerate(problem.steps):
        separator = ". " if index else " "
        head, tail = _line(step, style)
        text += separator + head
        results.append((len(text), len(text) + len(str(step.result))))
        text += str(step.result) + tail
    text += " #### "
    results.append((len(text), len(text) + len(str(problem.answer))))
    return Worked(f"{text}{problem.answer}\n", start, tuple(results))


def _line(step: Step, style: Style) -> tuple[str, str]:
    """What stands before and behind the result of a step; the annotated style repeats it."""
    if style == "annotated":
        return f"<<{step.left}{step.sign}{step.right}=", f">>{step.result}"
    return f"{step.left} {step.sign} {step.right} = ", ""


class _Dealer:
    """Deals problems of a regime, each pair of family and numbers at most once."""

    def __init__(self, regime: Regime, seed: int):
        self._key = f"{seed} {regime}"
        self._dealt: set[tuple[str, tuple[int, ...]]] = set()

    def deal(
        self,
        split: str,
        families: Sequence[str],
        count: int,
        span: Range = NUMBERS,
        names: Sequence[str] = TEST_NAMES,
    ) -> tuple[Problem, ...]:
        """As many problems, the families in turn; each split has a generator of its own."""
        generator = random.Random(f"{self._key} {split}")
        return tuple(self._one(generator, families[index % len(families)], span, names) for index in range(count))

    def _one(self, generator: random.Random, family: str, span: Range, names: Sequence[str]) -> Problem:
        about = FAMILIES[family]
        numbers = about.draw(generator, span)
        while (family, numbers) in self._dealt:
            numbers = about.draw(generator, span)
        self._dealt.add((family, numbers))
        name, noun = generator.choice(names), generator.choice(NOUNS)
        return Problem(family, numbers, name, about.story(name, noun, *numbers), about.steps(*numbers))
