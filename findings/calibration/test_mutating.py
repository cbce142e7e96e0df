"""Mutants of a toy module: killed, surviving, hanging and unseen ones are told apart, and none reaches the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

pytestmark = pytest.mark.calibration

MUTATING = Path(__file__).with_name("mutating.py")
TOY = '''
    """Three functions."""

    from functools import lru_cache


    def larger(a, b):
        """The larger of two."""
        return a if a > b else b


    @lru_cache
    def zero(n):
        """Zero, the long way."""
        while n > 0:
            n -= 1
        return n


    def unseen(n):
        """No test asks for this."""
        return n + 1
'''
TESTS = """
    import toy

    FOUND_WHEN_COLLECTED = toy.zero(3)


    def test_larger():
        assert toy.larger(2, 1) == 2
        assert toy.larger(1, 2) == 2


    def test_zero():
        assert toy.zero(3) == 0


    def test_that_fails_by_itself():
        assert toy.larger(1, 2) == 3
"""
LOOSE = """
    import toy


    def test_zero():
        assert toy.zero(3) is not None
"""


def mutated(folder, **files):
    """Run the command on a folder of files; outcomes by mutant without the module's name, and what it printed."""
    for name, content in files.items():
        (folder / f"{name}.py").write_text(dedent(content))
    command = [sys.executable, str(MUTATING), "toy.py", "--tests", "test_*.py", "--root", str(folder), "--marks", ""]
    command += ["--sample", "0", "--margin", "0.4", "--work", str(folder / "work")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    path = folder / "work" / "mutants.json"
    assert path.exists(), run.stdout + run.stderr
    result = json.loads(path.read_text())
    found = {each["mutant"].removeprefix("toy.py::"): each["outcome"] for each in result["outcomes"]}
    return found, result["power"], run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def first(folder):
    return mutated(folder, toy=TOY, test_toy=TESTS)


def test_mutants_of_every_fate(first):
    found, power, run = first
    assert found["larger: `a > b` -> `a <= b` in `return a if a > b else b`"] == "killed"
    # of two equal numbers, either is the larger one
    assert found["larger: `a > b` -> `a >= b` in `return a if a > b else b`"] == "survived"
    assert found["zero: `n -= 1` -> `pass` in `n -= 1`"] == "hung"
    assert found["zero: `n -= 1` -> `n += 1` in `n -= 1`"] == "hung"
    assert found["unseen: `n + 1` -> `n - 1` in `return n + 1`"] == "survived"
    fates = list(found.values())
    assert power == 1 - fates.count("survived") / len(fates)
    assert run.returncode == (power < 0.9) == 1


def test_the_memory_of_a_function_hides_no_mutant(first):
    """`zero(3)` is remembered from when the tests were collected."""
    found, _, _ = first
    assert found["zero: `return n` -> `return None` in `return n`"] == "killed"


def test_a_test_that_fails_by_itself_kills_nothing(first):
    _, _, run = first
    assert "test_that_fails_by_itself" not in run.stdout


def test_survivors_are_named(first):
    _, _, run = first
    assert (
        "survivor, not listed: toy.py::unseen: `n + 1` -> `n - 1` in `return n + 1` (line 22; no tests run it)"
    ) in run.stdout.splitlines()


def test_the_next_run_tries_again_what_new_tests_may_kill(folder, first):
    """Killed mutants stay killed as long as their killers stay; survivors meet the new tests."""
    before, _, _ = first
    log = folder / "work" / "outcomes.jsonl"
    tried = len(log.read_text().splitlines())
    assert tried == len(before)
    new = "import toy\n\n\ndef test_unseen():\n    assert toy.unseen(1) == 2\n"
    after, power, run = mutated(folder, test_unseen=new)
    again = len(log.read_text().splitlines()) - tried
    assert again == list(before.values()).count("survived")
    survivors = {name for name, outcome in after.items() if outcome == "survived"}
    assert survivors == {
        name for name, outcome in before.items() if outcome == "survived" and not name.startswith("unseen")
    }
    assert run.returncode == (power < 0.9)


def test_loose_tests_kill_less(tmp_path):
    """The measure can be low: what is never compared with its value may be anything."""
    found, power, run = mutated(tmp_path, toy=TOY, test_toy=LOOSE)
    assert found["larger: `a > b` -> `a <= b` in `return a if a > b else b`"] == "survived"
    assert found["zero: `n > 0` -> `n >= 0` in `while n > 0:`"] == "survived"
    assert power < 0.5
    assert run.returncode == 1
