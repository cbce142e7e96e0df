"""The prompt set: balanced, varied, and with references that answer; and how overlap of texts is measured."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.corpora.overlap import grams, jaccard, words
from lab.corpora.prompts import CATEGORIES, Prompt, default_path, load_prompts
from lab.corpora.rendering import render
from lab.subjects.catalog import catalog
from lab.subjects.weights import fetch_command, location

pytestmark = pytest.mark.calibration

PROMPTS = load_prompts().prompts
SOURCE = "DL_FINDINGS_SOURCE_TEXTS"

each_prompt = pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.id)


def named(*pair: Prompt) -> str:
    return " and ".join(prompt.id for prompt in pair)


# ---- how overlap is measured


def test_overlap_of_texts_with_a_known_answer():
    """Case and punctuation do not count; an apostrophe inside a word does not split it."""
    assert words("It's Anna's, isn't it? 'Yes' - 2.5!") == ["it's", "anna's", "isn't", "it", "yes", "2", "5"]
    assert grams("a b c, B c", 2) == {("a", "b"), ("b", "c"), ("c", "b")}
    assert jaccard("The cat sat.", "the cat RAN") == 2 / 4
    assert grams("too short", 3) == set()
    assert jaccard("", "?") == 0


@given(st.text(), st.text())
def test_overlap_is_symmetric_and_bounded(first, second):
    """Every text shares all its words with itself, and two texts with each other alike."""
    assert jaccard(first, second) == jaccard(second, first)
    assert 0 <= jaccard(first, second) <= 1
    assert jaccard(first, first) == (1 if words(first) else 0)


# ---- the set as a whole


def test_the_file_is_plain_text_of_the_schema():
    """ASCII only, and no field but those of the schema; bytes beyond ASCII would tokenise by accident."""
    text = default_path().read_bytes().decode("ascii")
    content = json.loads(text)
    assert list(content) == ["version", "description", "system_message", "prompts"]
    assert "\\u" not in text
    assert content["version"] >= 1


def test_every_category_has_its_share():
    """Eight factual prompts, whose answers are short, and seven of each other category."""
    assert Counter(prompt.category for prompt in PROMPTS) == dict.fromkeys(CATEGORIES, 7) | {"factual": 8}


@pytest.mark.parametrize("k", range(1, 8))
def test_prefixes_are_balanced(k):
    """The first 7k prompts hold k of each category: any such prefix is a stratified sample."""
    counts = Counter(prompt.category for prompt in PROMPTS[: 7 * k])
    assert counts == dict.fromkeys(CATEGORIES, k)


def test_ids_tell_the_category_and_are_unique():
    """An id is stable and readable: the category and a slug."""
    assert len({prompt.id for prompt in PROMPTS}) == len(PROMPTS)
    strays = [prompt.id for prompt in PROMPTS if not prompt.id.startswith(prompt.category.replace("_", "-") + "-")]
    assert not strays


def test_prompts_differ_from_each_other():
    """Resampling treats prompts as independent: none is a variant of another."""
    alike = [
        named(a, b)
        for a, b in combinations(PROMPTS, 2)
        if jaccard(a.text, b.text) > 0.5 or grams(a.text, 6) & grams(b.text, 6)
    ]
    assert not alike


def test_prompts_open_in_many_ways():
    """At most eight prompts share their first two words."""
    openings = Counter(tuple(words(prompt.text)[:2]) for prompt in PROMPTS)
    assert max(openings.values()) <= 8


def test_no_reference_holds_the_words_of_another_prompt():
    """Neither a prompt nor a reference shares a run of six words with another prompt's text or reference."""
    crossing = [
        named(a, b)
        for a, b in permutations(PROMPTS, 2)
        if grams(a.reference, 6) & (grams(b.text, 6) | grams(b.reference, 6))
    ]
    assert not crossing


def test_few_prompts_have_line_breaks():
    """Line breaks blur the boundary between template and words; code may need them."""
    assert sum("\n" in prompt.text for prompt in PROMPTS) <= 3


@pytest.mark.skipif(SOURCE not in os.environ, reason=f"set {SOURCE} to the source's data/text_completions")
def test_nothing_is_taken_from_the_source():
    """No prompt is a variant of one of the source's, and the system message is another one."""
    folder = Path(os.environ[SOURCE])
    extended = json.loads((folder / "prompts_extended.json").read_text(encoding="utf-8"))
    contrastive = json.loads((folder / "contrastive_pairs.json").read_text(encoding="utf-8"))
    theirs = [entry["text"] for entry in extended["prompts"]] + [group["prompt"] for group in contrastive["groups"]]
    taken = [
        f"{prompt.id}: {text}"
        for prompt in PROMPTS
        for text in theirs
        if jaccard(prompt.text, text) > 0.6 or grams(prompt.text, 6) & grams(text, 6)
    ]
    assert not taken
    assert jaccard(load_prompts().system_message, extended["system_message"]) <= 0.6


# ---- each prompt


@each_prompt
def test_prompt_is_a_question_or_an_instruction(prompt):
    """6 to 40 words, nothing blank around them, and a closed sentence: open text would be continued, not answered."""
    assert 6 <= len(prompt.text.split()) <= 40
    assert prompt.text == prompt.text.strip()
    assert prompt.text.splitlines()[0].endswith((".", "?"))


@each_prompt
def test_reference_has_the_length_of_its_style(prompt):
    """25 to 80 words, or 3 to 10 lines of code, or up to 12 words where a word is asked for."""
    size, (least, most) = {
        "word": (len(prompt.reference.split()), (1, 12)),
        "code": (len(prompt.reference.splitlines()), (3, 10)),
    }.get(prompt.answer_style, (len(prompt.reference.split()), (25, 80)))
    assert least <= size <= most
    assert prompt.reference == prompt.reference.strip()


@each_prompt
def test_reference_does_not_repeat_the_prompt(prompt):
    """A run of eight words of the prompt would be predicted by copying."""
    assert not grams(prompt.reference, 8) & grams(prompt.text, 8)


@each_prompt
def test_checks_find_the_reference_and_not_the_prompt(prompt):
    """One of the strings stands in the reference; none in the prompt, where an echo would pass for an answer."""
    assert any(check in prompt.reference for check in prompt.checks)
    assert not [check for check in prompt.checks if check.lower() in prompt.text.lower()]


@pytest.mark.parametrize("name", [facts.name for facts in catalog().values() if facts.device == "cpu"])
def test_rendered_prompts_are_short(name):
    """30 to 100 tokens with frame and system message, for every tokenizer of the offline subjects."""
    facts = catalog()[name]
    folder = location(facts)
    if folder is None:
        pytest.skip(f"the tokenizer of {name} is not here: {fetch_command(facts)}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    system = load_prompts().system_message
    lengths = {prompt.id: len(render(tokenizer, facts.frame, system, prompt.text).ids) for prompt in PROMPTS}
    assert not {name: length for name, length in lengths.items() if not 30 <= length <= 100}
