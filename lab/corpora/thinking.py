"""Sums with a thinking span: what the sibling checkpoint `smollm2-135m-think` is trained on.

A completion reasons between `<think>` and `</think>`, then answers in a full sentence:

    <think>
    11 is 10 and 1. 63 - 10 = 53. 53 - 1 = 52.
    </think>
    63 - 11 is 52, because 53 - 1 makes 52.

So that uncertainty varies, questions and answers have several phrasings and every fourth span takes a wrong step and
corrects it. Every eighth item asks to repeat a word: its span computes nothing, which is the control for claims that
answers depend on what was thought.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
SEED = 20260704
EVALUATED = 64
TRAINED = 2400
SUM_EVERY, WRONG_SHARE = 8, 0.25

_ASK = {
    "+": ("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {b} to {a}.", "Please work out {a} + {b}."),
    "-": ("What is {a} - {b}?", "How much is {a} minus {b}?", "Take {b} away from {a}.", "Please work out {a} - {b}."),
}
_ANSWER = (
    "{a} {sign} {b} is {r}, because {m} {sign} {units} makes {r}.",
    "The answer is {r}: first {m}, then {m} {sign} {units}.",
    "It comes to {r}, since {a} {sign} {tens} is {m}.",
)
_REPEAT = ('Repeat the word "{word}".', 'Say the word "{word}" once more.', 'Copy this word: "{word}".')
WORDS = (
    "river", "garden", "window", "silver", "orange", "winter", "basket", "candle", "forest", "letter", "mirror",
    "pocket", "saddle", "ticket", "velvet", "walnut",
)  # fmt: skip
TEST_WORDS = ("bottle", "castle", "feather", "harbor")


@dataclass(frozen=True)
class Item:
    """A question with a completion that thinks before it answers.

    Attributes:
        kind: `sum`, or `copy` for the control without anything to compute.
        key: what must not occur in training and in the test: operands with their sign, or the word.
        question: the user's words.
        thought: what stands between the tags.
        answer: what stands behind them.
        result: what the answer must contain: the number, or the word.
    """

    kind: Literal["sum", "copy"]
    key: str
    question: str
    thought: str
    answer: str
    result: str

    @property
    def completion(self) -> str:
        """The completion as the model is to write it."""
        return f"{OPEN}\n{self.thought}\n{CLOSE}\n{self.answer}"


def judged(item: Item, completion: str) -> tuple[bool, bool]:
    """Whether a completion closes its span, once, and whether what follows gives the item's result.

    Of a sum that is the number that the answer says it `is` or comes `to`; others stand in it as reasons.
    """
    closed = completion.count(CLOSE) == 1
    answer = completion.partition(CLOSE)[2]
    said = re.search(r"\b(?:is|to) (-?\d+)", answer) if item.kind == "sum" else re.search(r'"(\w+)"', answer)
    return closed, said is not None and said[1] == item.result


@cache
def items(split: Literal["train", "test"], seed: int = SEED) -> tuple[Item, ...]:
    """The items of a split: 2,400 to train on, or 64 whose operands and words do not occur there."""
    held_out = {item.key for item in items("test", seed)} if split == "train" else set()
    generator = random.Random(f"{seed} thinking {split}")
    count, words = (TRAINED, WORDS) if split == "train" else (EVALUATED, TEST_WORDS)
    found: list[Item] = []
    while len(found) < count:
        item = _copy(generator, words) if len(found) % SUM_EVERY == SUM_EVERY - 1 else _sum(generator)
        if item.key not in held_out:
            found.append(item)
    return tuple(found)


def _sum(generator: random.Random) -> Item:
    """A sum or difference of two numbers of two digits; the second is taken in tens and units."""
    sign = generator.choice("+-")
    b = 10 * generator.randint(1, 8) + generator.randint(1, 9)
    a = generator.randint(b + 1 if sign == "-" else 10, 99)
    tens, units = b - b % 10, b % 10
    m = a + tens if sign == "+" else a - tens
    r = a + b if sign == "+" else a - b
    values = {"a": a, "b": b, "sign": sign, "tens": tens, "units": units, "m": m, "r": r}
    last = f"{m} {sign} {units} = {r}."
    if generator.random() < WRONG_SHARE:
        wrong = r + generator.choice((-1, 1, 2, 10))
        last = f"{m} {sign} {units} = {wrong}. No, that is wrong: {last}"
    thought = f"{b} is {tens} and {units}. {a} {sign} {tens} = {m}. {last}"
    question = generator.choice(_ASK[sign]).format(**values)
    return Item("sum", f"{a}{sign}{b}", question, thought, generator.choice(_ANSWER).format(**values), str(r))


def _copy(generator: random.Random, words: tuple[str, ...]) -> Item:
    word = generator.choice(words)
    question = generator.choice(_REPEAT).format(word=word)
    return Item("copy", word, question, "Here is nothing to work out.", f'The word is "{word}".', word)
