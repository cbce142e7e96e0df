"""Arithmetic exercises: right answers by an independent reading, and splits that hold out what they say."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.corpora import arithmetic, thinking
from lab.corpora.arithmetic import ALL, HELD_OUT, LEARNED, NARROW, REST, TEST_NAMES, TRAINING_NAMES, splits, written
from lab.corpora.byte_tokenizer import CHAT, END, byte_tokenizer
from lab.corpora.exercises import thinking_exercises, worked_exercises
from lab.corpora.rendering import render

pytestmark = pytest.mark.calibration

REGIMES = ("novel", "competent")
EVERY_SPLIT = [(regime, split) for regime in REGIMES for split in splits(regime)]
#: the answer as a reader would work it out, from the numbers in the order in which the story names them
READ = {
    "gain_loss": lambda a, b, c: a + b - c,
    "times": lambda a, b, k: k * b,
    "pack": lambda k, a, b: k * a + b,
    "remainder": lambda t, a: t - a,
    "shop_days": lambda a, b, c: a + b - c,
    "three_step": lambda k, a, b, c: k * a + b - c,
}


def families_of(regime):
    return {name: {problem.family for problem in split.problems} for name, split in splits(regime).items()}


@pytest.mark.parametrize(("regime", "split"), EVERY_SPLIT)
def test_answers_are_what_the_stories_ask_for(regime, split):
    for problem in splits(regime)[split].problems:
        numbers = map(int, re.findall(r"\d+", problem.question))
        assert problem.answer == READ[problem.family](*numbers) > 0


@pytest.mark.parametrize(("regime", "split"), EVERY_SPLIT)
def test_every_written_equation_is_true_and_leads_to_the_answer(regime, split):
    exercises = splits(regime)[split]
    for problem, worked in zip(exercises.problems, exercises.worked, strict=True):
        solution = worked.text[worked.solution_start :]
        assert worked.text[: worked.solution_start].endswith("\nAnswer:")
        pattern = r"<<(\d+)([-+*])(\d+)=(\d+)>>\4" if exercises.style == "annotated" else r"(\d+) ([-+*]) (\d+) = (\d+)"
        lines, _, answer = solution.strip().partition(" #### ")
        equations = [re.fullmatch(pattern, line) for line in lines.split(". ")]
        assert all(equations)
        for left, sign, right, result in (found.groups() for found in equations):
            assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)) == int(result)
        assert int(answer) == int(equations[-1][4]) == problem.answer


@pytest.mark.parametrize(("regime", "split"), EVERY_SPLIT)
def test_results_are_the_numbers_behind_equality_signs_and_the_answer(regime, split):
    for worked in splits(regime)[split].worked:
        marked = [worked.text[start:stop] for start, stop in worked.results]
        assert marked == [*re.findall(r"= ?(\d+)", worked.text), worked.text.rpartition("#### ")[2].strip()]


def test_splits_have_the_stated_sizes_families_and_styles():
    sizes = {regime: {name: len(split.problems) for name, split in splits(regime).items()} for regime in REGIMES}
    assert sizes["novel"] == {"id": 200, "ood_numbers": 200, "ood_template": 200, "ood_steps": 200, "train": 3000}
    assert sizes["competent"] == {"id": 200, "ood": 200, "competence": 3200, "train": 3000}
    families = families_of("novel")
    assert families["train"] == families["id"] == families["ood_numbers"] == set(LEARNED)
    assert families["ood_template"] | families["ood_steps"] == set(HELD_OUT)
    families = {
        name: {problem.family for problem in splits("competent")[name].problems} for name in splits("competent")
    }
    assert families["train"] == families["id"] == set(NARROW)
    assert families["ood"] == set(REST)
    assert families["competence"] == set(ALL)
    assert {name: split.style for name, split in splits("competent").items()} == {
        "id": "annotated",
        "ood": "plain",
        "competence": "plain",
        "train": "annotated",
    }


@pytest.mark.parametrize("regime", REGIMES)
def test_no_problem_is_dealt_twice(regime):
    dealt = [(p.family, p.numbers) for split in splits(regime).values() for p in split.problems]
    assert len(dealt) == len(set(dealt))


@pytest.mark.parametrize("regime", REGIMES)
def test_names_of_the_test_are_held_out(regime):
    names = {name: {problem.name for problem in split.problems} for name, split in splits(regime).items()}
    for name, found in names.items():
        assert found == set(TRAINING_NAMES if name in ("train", "competence") else TEST_NAMES)
    texts = " ".join(worked.text for worked in splits(regime)["train"].worked)
    assert not any(name in texts for name in TEST_NAMES)


def test_numbers_out_of_distribution_lie_beyond_all_that_is_trained_on():
    low, high = arithmetic.NUMBERS
    for problem in splits("novel")["train"].problems:
        assert all(low <= number <= high for number in problem.numbers)
    for problem in splits("novel")["ood_numbers"].problems:
        operands = problem.numbers[:2] if problem.family in ("times", "pack") else problem.numbers
        assert min(operands) > high


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ALL))
def test_a_seed_is_all_that_decides(seed, family):
    deal = [arithmetic._Dealer("novel", seed).deal("x", (family,), 30) for _ in range(2)]
    other = arithmetic._Dealer("novel", seed + 1).deal("x", (family,), 30)
    assert deal[0] == deal[1] != other
    assert all(problem.answer > 0 for problem in deal[0])


@pytest.mark.parametrize("style", ["plain", "annotated"])
def test_tokens_of_solution_and_results_are_found(style):
    problem = splits("novel")["ood_steps"].problems[0]
    worked = written(problem, style)
    (exercise,) = worked_exercises(byte_tokenizer(), [worked])
    text = worked.text
    assert len(exercise.ids) == len(text)  # one token per byte
    assert exercise.solution == tuple(range(worked.solution_start, len(text)))
    assert "".join(text[i] for i in exercise.results) == "".join(text[a:b] for a, b in worked.results)


def test_thoughts_compute_what_is_answered():
    for item in (*thinking.items("train"), *thinking.items("test")):
        if item.kind == "sum":
            left, sign, right = re.fullmatch(r"(\d+)([-+])(\d+)", item.key).groups()
            value = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert str(value) == item.result
            assert item.thought.endswith(f"= {value}.")
            assert {left, right} <= set(re.findall(r"\d+", item.question))
        assert item.result in item.answer
        assert item.completion == f"<think>\n{item.thought}\n</think>\n{item.answer}"


def test_wrong_steps_are_a_quarter_and_always_corrected():
    sums = [item for item in thinking.items("train") if item.kind == "sum"]
    wrong = [item for item in sums if "No, that is wrong" in item.thought]
    assert 0.2 < len(wrong) / len(sums) < 0.3
    for item in wrong:
        first, second = re.findall(r"= (-?\d+)\.(?= No|$)", item.thought)
        assert first != second == item.result


def test_completions_are_judged_by_what_they_answer():
    for item in thinking.items("test"):
        assert thinking.judged(item, item.completion) == (True, True)
        assert thinking.judged(item, item.completion.replace("</think>", "")) == (False, False)
        assert thinking.judged(item, item.completion + "</think>")[0] is False
        wrong = item.answer.replace(item.result, "0" if item.kind == "sum" else "nothing")
        assert thinking.judged(item, f"<think>\n{item.thought}\n</think>\n{wrong}") == (True, False)


def test_test_items_of_thinking_are_held_out():
    train, test = ({item.key for item in thinking.items(split)} for split in ("train", "test"))
    assert not train & test
    assert [len(thinking.items(split)) for split in ("train", "test")] == [thinking.TRAINED, thinking.EVALUATED]
    kinds = [item.kind for item in thinking.items("test")]
    assert kinds.count("copy") == len(kinds) // thinking.SUM_EVERY
    assert max(len(item.thought.split()) for item in thinking.items("train")) < 40


def test_completions_of_thinking_items_are_learned_to_the_end_token():
    tokenizer = byte_tokenizer(CHAT)
    item = thinking.items("test")[0]
    (exercise,) = thinking_exercises(tokenizer, "Be brief.", [item])
    learned = [exercise.ids[i] for i in exercise.solution]
    assert tokenizer.decode(learned) == item.completion + END
    assert exercise.ids[: exercise.solution[0]] == render(tokenizer, "chat", "Be brief.", item.question).ids
