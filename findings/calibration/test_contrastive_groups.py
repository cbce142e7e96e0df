"""Contrastive groups: balanced, matched, without leaks, and one token per word.

What needs no tokenizer always runs; the rest runs under every catalogued tokenizer that is here.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import scipy

from lab.corpora.contrastive_groups import (
    CONTRASTS,
    PREFIXES,
    RELATIONSHIPS,
    TRUTHS,
    WORDS,
    default_path,
    load_contrastive_groups,
)
from lab.corpora.contrastive_tokens import tokenised
from lab.corpora.overlap import grams, jaccard, words
from lab.corpora.prompts import load_prompts
from lab.corpora.rendering import render
from lab.subjects.catalog import catalog
from lab.subjects.weights import fetch_command, location

pytestmark = pytest.mark.calibration

CONTENT = load_contrastive_groups()
SOURCE = "DL_FINDINGS_SOURCE_TEXTS"

each_family = pytest.mark.parametrize("family", CONTENT.families, ids=lambda family: family.id)


# ---- the committed file: what it holds


def test_cells_are_large_and_balanced():
    """240 matched groups in equal cells, 24 style groups, half of them shared; half of the families assert."""
    cells = Counter((group.relationship, group.prefix) for group in CONTENT.groups)
    assert all(cells[kind, prefix] == 40 for kind in CONTRASTS for prefix in PREFIXES)
    assert all(cells["style", prefix] == 12 for prefix in PREFIXES)
    assert {group.relationship for group in CONTENT.groups} == set(RELATIONSHIPS)
    truths = Counter(family.truth for family in CONTENT.families)
    assert abs(truths["asserted"] - truths["open"]) <= 1


def test_any_prefix_of_the_file_is_balanced():
    """So that a smaller budget may take the first families."""
    for end in range(len(CONTENT.families)):
        counts = Counter(family.truth for family in CONTENT.families[:end])
        assert abs(counts["asserted"] - counts["open"]) <= 1
    for end in range(len(CONTENT.style)):
        counts = Counter(entry.prefix for entry in CONTENT.style[:end])
        assert abs(counts["immediate"] - counts["shared"]) <= 1


def test_the_file_is_plain_text():
    """ASCII only."""
    default_path().read_bytes().decode("ascii")


def test_no_anchor_and_no_pair_comes_twice():
    """In neither order: big and small must not come back as small and big."""
    assert len({family.anchor for family in CONTENT.families}) == len(CONTENT.families)
    pairs = Counter(frozenset((f.anchor, getattr(f, kind))) for f in CONTENT.families for kind in CONTRASTS)
    assert max(pairs.values()) == 1


# ---- leaks


@each_family
def test_no_word_leaks(family):
    """No word of a family, nor its first four letters as a word start, stands in prompt, stem or system message."""
    around = words(f"{family.prompt} {family.stem} {CONTENT.system_message}")
    assert not [(word, seen) for word in family.words() for seen in around if seen.startswith(word[:4])]


@each_family
def test_the_unrelated_word_looks_unrelated(family):
    """It shares no start of four letters with the others."""
    assert family.unrelated[:4] not in {word[:4] for word in family.words()[:-1]}


@each_family
def test_prompts_and_stems_have_the_usual_length(family):
    """6 to 40 words, and 3 to 6."""
    assert 6 <= len(words(family.prompt)) <= 40
    assert 3 <= len(family.stem.split()) <= 6


def test_prompts_are_independent_of_each_other():
    """No two share a run of 6 words or half of their words, nor does one with a prompt or reference of the corpus."""
    own = [(entry.id, entry.prompt) for entry in (*CONTENT.families, *CONTENT.style)]
    others = [(prompt.id, text) for prompt in load_prompts().prompts for text in (prompt.text, prompt.reference)]
    pairs = [*combinations(own, 2), *((one, other) for one in own for other in others)]
    alike = [
        (a, b)
        for (a, first), (b, second) in pairs
        if grams(first, 6) & grams(second, 6) or jaccard(first, second) > 0.5
    ]
    assert not alike


@pytest.mark.skipif(SOURCE not in os.environ, reason=f"the environment variable {SOURCE} names no folder")
def test_nothing_is_copied_from_the_source():
    """No run of 6 words, and no Jaccard similarity above 0.6, with the prompts of the source's contrastive pairs."""
    source = load_contrastive_groups(Path(os.environ[SOURCE]) / "contrastive_pairs.json")
    theirs = {group.prompt for group in source.groups}
    own = {entry.prompt for entry in (*CONTENT.families, *CONTENT.style)}
    assert not [(a, b) for a in own for b in theirs if grams(a, 6) & grams(b, 6) or jaccard(a, b) > 0.6]


# ---- tokens


@cache
def folder_of(name: str) -> Path:
    folder = location(catalog()[name])
    if folder is None:
        pytest.skip(f"the tokenizer of {name} is not here: {fetch_command(catalog()[name])}")
    return folder


@cache
def tokenizer_of(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder_of(name))


@pytest.fixture(params=catalog())
def name(request):
    folder_of(request.param)
    return request.param


@pytest.fixture(params=["own", "plain"])
def frame(request, name):
    """The subject's frame, and the plain one."""
    return catalog()[name].frame if request.param == "own" else "plain"


def test_every_word_is_one_token(name, frame):
    """ids(prompt + stem + word) are ids(prompt + stem) and one token, which differs between the words of a family."""
    tokenizer = tokenizer_of(name)
    for family in CONTENT.families:
        rendered = render(tokenizer, frame, CONTENT.system_message, family.prompt)
        lead = "" if frame == "chat" else " "
        for prefix in PREFIXES:
            front = rendered.text + (lead + family.stem if prefix == "shared" else "")
            stemmed = tuple(tokenizer(front, add_special_tokens=frame == "plain")["input_ids"])
            texts = [rendered.text + lead + family.completion(word, prefix) for word in family.words()]
            ids = [tuple(tokenizer(text, add_special_tokens=frame == "plain")["input_ids"]) for text in texts]
            assert all(own[:-1] == stemmed for own in ids), (family.id, prefix)
            assert len({own[-1] for own in ids}) == len(WORDS), (family.id, prefix)


def test_tags_are_true(name, frame):
    """No group is dropped; immediate pairs share no completion token, shared ones the stem's, two or more."""
    found = tokenised(CONTENT, tokenizer_of(name), frame)
    assert not found.dropped
    assert len(found.pairs) == len(CONTENT.groups)
    for pair in found.pairs:
        assert pair.shared_tokens == 0 if pair.group.prefix == "immediate" else pair.shared_tokens >= 2
        assert pair.complete_pivots == (0 if pair.group.relationship == "style" else 2)
    stems = {}
    for pair in found.pairs:
        stems.setdefault((pair.group.family, pair.prefix), set()).add(found.sequences[pair.a].ids[: pair.pivot])
    assert all(len(fronts) == 1 for fronts in stems.values())


def test_registers_are_equally_long(name, frame):
    """8 to 16 tokens, at a ratio of at most 1.25, with the stem's tokens and no others in common."""
    tokenizer = tokenizer_of(name)
    found = tokenised(CONTENT, tokenizer, frame)
    stems = {entry.id: entry.stem for entry in CONTENT.style}
    lead = "" if frame == "chat" else " "
    for pair in (pair for pair in found.pairs if pair.group.relationship == "style"):
        lengths = [len(found.sequences[s].ids) - found.sequences[s].prompt_tokens for s in (pair.a, pair.b)]
        assert min(lengths) >= 8, pair.group.id
        assert max(lengths) <= min(16, 1.25 * min(lengths)), pair.group.id
        stem = stems[pair.group.family]
        expected = len(tokenizer(lead + stem, add_special_tokens=False)["input_ids"]) if stem else 0
        assert pair.shared_tokens == expected, pair.group.id


def test_no_completion_begins_another(name, frame):
    """Of a group; such a pair has no pivot."""
    found = tokenised(CONTENT, tokenizer_of(name), frame, require_complete_pivot=False)
    for pair in found.pairs:
        a, b = (found.sequences[s].ids for s in (pair.a, pair.b))
        assert a[: len(b)] != b[: len(a)]


def merge_ranks(name: str) -> dict[str, int]:
    """Token -> when the tokenizer learned to merge it; the more frequent, the earlier."""
    merges = json.loads((folder_of(name) / "tokenizer.json").read_text())["model"]["merges"]
    joined = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges]
    return {token: rank for rank, token in reversed(list(enumerate(joined)))}


@pytest.mark.parametrize("blank", [False, True], ids=["bare", "blank"])
def test_synonyms_and_antonyms_are_equally_frequent(name, blank):
    """By merge rank: Mann-Whitney p > 0.1, and a median difference below half an octave."""
    ranks = merge_ranks(name)
    lead = ("▁" if "▁the" in ranks else "Ġ") if blank else ""
    synonym, antonym = (
        np.log2([1 + ranks[lead + getattr(family, kind)] for family in CONTENT.families])
        for kind in ("synonym", "antonym")
    )
    assert scipy.stats.mannwhitneyu(synonym, antonym).pvalue > 0.1
    assert abs(np.median(synonym - antonym)) < 0.5
    assert abs(np.median(synonym) - np.median(antonym)) < 0.5


@pytest.mark.skipif(SOURCE not in os.environ, reason=f"the environment variable {SOURCE} names no folder")
def test_the_sources_own_file_gives_the_published_counts():
    """111 groups and 199 pairs; two pairs have no pivot."""
    content = load_contrastive_groups(Path(os.environ[SOURCE]) / "contrastive_pairs.json")
    counts = Counter(group.relationship for group in content.groups)
    assert counts == {"antonym": 67, "synonym": 29, "style": 8, "unrelated": 7}
    assert sum(len(list(combinations(group.completions, 2))) for group in content.groups) == 199


def test_truths_are_those_of_the_reader():
    """Both occur."""
    assert {family.truth for family in CONTENT.families} == set(TRUTHS)
