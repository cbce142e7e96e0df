"""The GitHub workflows ask for what exists: make targets, subjects, options; and name no host."""

import re
from pathlib import Path

import pytest
import yaml

from lab.subjects.catalog import catalog
from lab.subjects.facts import Wheels

pytestmark = pytest.mark.calibration

REPOSITORY = Path(__file__).parents[2]
WORKFLOWS = sorted(REPOSITORY.glob(".github/workflows/*.yml"))
FILES = [*WORKFLOWS, *REPOSITORY.glob(".github/actions/*/action.yml")]
TARGETS = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def steps(path):
    content = yaml.safe_load(path.read_text())
    jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_actions_are_pinned_by_major_version_or_are_our_own(path):
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[\w/-]+@v\d+", action) or (REPOSITORY / action / "action.yml").is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_make_targets_exist_and_no_host_is_named(path):
    text = path.read_text()
    commands = " ".join(step.get("run", "") for step in steps(path))
    assert set(re.findall(r"\bmake (\w+)", commands)) <= TARGETS
    assert "://" not in text


def test_the_gate_lints_and_tests_and_publishes_what_it_measured():
    content = yaml.safe_load((REPOSITORY / ".github/workflows/findings.yml").read_text())
    assert set(content[True]) == {"push", "pull_request", "schedule", "workflow_dispatch"}  # YAML reads `on` as true
    commands = [step.get("run", "") for step in content["jobs"]["gate"]["steps"]]
    assert {"make lint", "make test"} <= set(commands)
    assert any("python -m lab report --output results/atlas" in command for command in commands)
    assert content["jobs"]["publish"]["needs"] == "gate"


def test_every_subject_that_needs_no_hub_is_measured_weekly():
    content = yaml.safe_load((REPOSITORY / ".github/workflows/findings.yml").read_text())
    offline = {name for name, facts in catalog().items() if isinstance(facts.source, Wheels)}
    assert set(content["jobs"]["weekly"]["strategy"]["matrix"]["subject"]) == offline
