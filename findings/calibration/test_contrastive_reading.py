"""Contrastive groups as a file and as tokens: the reader, one token per byte, and the source's format."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.corpora.contrastive_groups import (
    Family,
    Style,
    load_contrastive_groups,
)
from lab.corpora.contrastive_tokens import tokenised
from lab.errors import UserError

pytestmark = pytest.mark.calibration

GOOD = {
    "id": "big",
    "truth": "open",
    "prompt": "How is it?",
    "stem": "I find it",
    "anchor": "big",
    "synonym": "large",
    "antonym": "little",
    "unrelated": "green",
}
REGISTERS = {"id": "late", "prompt": "Say it.", "texts": ["It is late.", "Gosh, late!"]}


# ---- the reader


@pytest.fixture
def file_of(tmp_path):
    """A function that writes families and style entries to a file."""

    def write(*families, style=(REGISTERS,), **more):
        content = {"version": 1, "description": "toy", "system_message": "Be brief.", "families": list(families)}
        path = tmp_path / "contrastive_groups.json"
        path.write_text(json.dumps(content | {"style": list(style)} | more))
        return path

    return write


def test_a_family_makes_six_groups(file_of):
    """Three contrasts at once and three behind the stem, anchor first; a style entry makes one group."""
    content = load_contrastive_groups(file_of(GOOD))
    assert content.families == (Family(**GOOD),)
    assert content.style == (Style("late", "Say it.", ("It is late.", "Gosh, late!")),)
    groups = {group.id: group.completions for group in content.groups}
    assert len(groups) == 7
    assert groups["big/antonym/immediate"] == ("big", "little")
    assert groups["big/synonym/shared"] == ("I find it big", "I find it large")
    assert groups["late/style"] == ("It is late.", "Gosh, late!")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": "maybe"}, "'truth' is 'maybe'; it must be one of asserted, open"),
        ({"anchor": "Big"}, "'anchor' is 'Big'; it must be one word in lower case"),
        ({"antonym": "not big"}, "must be one word"),
        ({"synonym": "little"}, "must be four different words"),
        ({"stem": "I find it "}, "'stem' begins or ends with white space"),
        ({"prompt": ""}, "'prompt' is blank"),
        ({"note": "x"}, "'note' is unknown"),
        ({"unrelated": 3}, "'unrelated' must be a string, not a number"),
    ],
)
def test_a_faulty_family_is_named_in_one_line(file_of, change, message):
    """The error says which family of which file, and what is the matter with it."""
    fine = GOOD | {"id": "fine", "anchor": "huge"}
    with pytest.raises(UserError) as error:
        load_contrastive_groups(file_of(fine, GOOD | change))
    assert message in str(error.value)
    assert "contrastive_groups.json, family 1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"texts": ["a", "a"]}, "two different texts"),
        ({"texts": ["a"]}, "two different texts"),
        ({"stem": "It is", "texts": ["It is late.", "Gosh!"]}, "begin with the stem"),
        ({"texts": ["late ", "Gosh!"]}, "no blanks around them"),
    ],
)
def test_a_faulty_style_entry_is_named(file_of, entry, message):
    """So is a style entry."""
    with pytest.raises(UserError, match=message):
        load_contrastive_groups(file_of(GOOD, style=[REGISTERS | entry]))


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ([GOOD, GOOD], "the id 'big' occurs twice"),
        ([GOOD, GOOD | {"id": "other"}], "the anchor 'big' occurs twice"),
    ],
)
def test_what_comes_twice_is_refused(file_of, families, message):
    """It would count twice."""
    with pytest.raises(UserError, match=message):
        load_contrastive_groups(file_of(*families))


def test_a_file_without_groups_is_refused(file_of):
    """Nothing could be measured."""
    with pytest.raises(UserError, match="holds no groups"):
        load_contrastive_groups(file_of(style=[]))


# ---- pairs of tokens, with one token per byte


def test_words_of_several_tokens_drop_their_family(file_of):
    """Byte by byte no word of ours is one token; a family of single letters is, and stays with all its groups."""
    letters = GOOD | {"id": "a", "anchor": "a", "synonym": "b", "antonym": "c", "unrelated": "d"}
    content = load_contrastive_groups(file_of(GOOD, letters))
    found = tokenised(content, byte_tokenizer(), "chat")
    assert list(found.dropped) == ["big"]
    assert Counter(pair.group.family for pair in found.pairs) == {"a": 6, "late": 1}


def test_a_wrong_tag_drops_its_family(file_of):
    """Byte by byte `ba` and `bb` share a token, so that their group is not immediate, whatever the file says."""
    words = {"anchor": "ba", "synonym": "cx", "antonym": "bb", "unrelated": "dx"}
    content = load_contrastive_groups(file_of(GOOD | words))
    found = tokenised(content, byte_tokenizer(), "chat", require_complete_pivot=False)
    assert found.dropped == {"big": "big/antonym/immediate: it is shared, not immediate as tagged"}
    assert {pair.group.family for pair in found.pairs} == {"late"}


def test_the_pivot_is_the_first_difference(file_of):
    """Positions and shared tokens of the letters' family."""
    letters = GOOD | {"id": "a", "anchor": "a", "synonym": "b", "antonym": "c", "unrelated": "d"}
    tokenizer = byte_tokenizer()
    found = tokenised(load_contrastive_groups(file_of(letters)), tokenizer, "chat")
    for pair in found.pairs[:6]:
        a, b = (found.sequences[s] for s in (pair.a, pair.b))
        assert a.ids[: pair.pivot] == b.ids[: pair.pivot]
        assert tokenizer.decode(a.ids[pair.pivot]) == "a"
        assert tokenizer.decode(b.ids[pair.pivot]) in "bcd"
        assert pair.shared_tokens == (0 if pair.group.prefix == "immediate" else len("I find it "))
        assert pair.pivot == a.prompt_tokens + pair.shared_tokens


# ---- the source's format


def source_file(tmp_path, *completions, **change):
    group = {
        "id": 0,
        "prompt": "Which way?",
        "category": "toy",
        "relationship": "antonym",
        "completions": [{"label": label, "text": text} for label, text in zip("ABC", completions, strict=False)],
        "expected": "A",
        "pivot_token": "the word",
        "prefix_group": "immediate",
    }
    content = {
        "version": 3,
        "description": "toy",
        "system_message": "Be brief.",
        "relationships": {},
        "groups": [group | change],
    }
    path = tmp_path / "contrastive_pairs.json"
    path.write_text(json.dumps(content))
    return path


def test_the_sources_file_is_read(tmp_path):
    """All pairs of a group, their tags not trusted."""
    content = load_contrastive_groups(source_file(tmp_path, "go up", "go down", "stay"))
    assert not content.matched
    assert [group.completions for group in content.groups] == [("go up", "go down", "stay")]
    found = tokenised(content, byte_tokenizer(), "chat", require_complete_pivot=False)
    assert [(pair.shared_tokens, pair.prefix) for pair in found.pairs] == [
        (3, "shared"),
        (0, "immediate"),
        (0, "immediate"),
    ]


def test_a_completion_that_begins_another_has_no_pivot(tmp_path):
    """The source compares different positions there; here the pair is dropped, and so is a completion given twice."""
    content = load_contrastive_groups(source_file(tmp_path, "up", "up there", "down"))
    found = tokenised(content, byte_tokenizer(), "chat", require_complete_pivot=False)
    assert len(found.pairs) == 2
    assert "beginning of the other" in found.dropped["0"]
    twice = load_contrastive_groups(source_file(tmp_path, "up", "up"))
    assert not tokenised(twice, byte_tokenizer(), "chat", require_complete_pivot=False).pairs


def test_incomplete_pivots_are_kept_only_if_asked(tmp_path):
    """Pairs of which a completion goes on behind the pivot."""
    content = load_contrastive_groups(source_file(tmp_path, "a", "bc", "d"))
    strict, loose = (
        tokenised(content, byte_tokenizer(), "chat", require_complete_pivot=strict) for strict in (True, False)
    )
    assert [pair.complete_pivots for pair in strict.pairs] == [2]
    assert sorted(pair.complete_pivots for pair in loose.pairs) == [1, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relationship": "cousin"}, "'relationship' is 'cousin'"),
        ({"prefix_group": "both"}, "'prefix_group' is 'both'"),
        ({"completions": [{"label": "A", "text": "up"}]}, "two or more"),
        ({"completions": [{"label": "A", "text": "up"}, {"label": "A", "text": "down"}]}, "labels of their own"),
    ],
)
def test_a_faulty_group_of_the_source_is_named(tmp_path, change, message):
    """In one line, with its number."""
    with pytest.raises(UserError, match=message):
        load_contrastive_groups(source_file(tmp_path, "up", "down", **change))
