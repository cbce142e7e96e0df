"""Minimal pairs: their file, its reader, and what tokenizers and SmolLM2 make of them."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tokenizers.processors import TemplateProcessing

from lab.corpora.byte_tokenizer import START, byte_tokenizer
from lab.corpora.minimal_pairs import FAMILIES, MinimalPair, default_path, load_minimal_pairs, tokenised
from lab.errors import UserError
from lab.subjects.catalog import catalog
from lab.subjects.weights import fetch_command, location

pytestmark = pytest.mark.calibration

PAIRS = load_minimal_pairs()
FEWEST_PAIRS = 24
GOOD = {
    "id": "factual-0",
    "family": "factual",
    "clean": "The first is a",
    "corrupted": "The third is a",
    "answer": "x",
    "corrupted_answer": "y",
}


@pytest.fixture
def file_of(tmp_path):
    """A function that writes pairs to a file."""

    def write(*pairs, **more):
        path = tmp_path / "minimal_pairs.json"
        path.write_text(json.dumps({"version": 1, "description": "toy", "pairs": list(pairs)} | more))
        return path

    return write


# ---- the committed file


def test_families_are_large():
    """At least 40 pairs each, so that 24 are left when a small model fails some."""
    counts = Counter(pair.family for pair in PAIRS)
    assert all(counts[family] >= 40 for family in FAMILIES)


def test_pairs_are_plain_text():
    """ASCII only; ids begin with the family."""
    default_path().read_bytes().decode("ascii")
    assert all(pair.id.startswith(f"{pair.family}-") for pair in PAIRS)


def test_words_and_numbers_are_asked_in_both_directions():
    """Neither the smaller sum nor the singular or the male word is always the clean one."""
    smaller = [int(pair.answer) < int(pair.corrupted_answer) for pair in PAIRS if pair.family == "arithmetic"]
    marked = {" are", " were", " have", " she", " herself"}
    plural_or_female = [pair.answer in marked for pair in PAIRS if pair.family == "linguistic"]
    for direction in (smaller, plural_or_female):
        assert 0.4 <= sum(direction) / len(direction) <= 0.6


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.family == "arithmetic"], ids=lambda pair: pair.id)
def test_sums_are_right(pair):
    """Every sum in a prompt is right, and the one that is asked is not among the worked ones."""
    for prompt, answer in ((pair.clean, pair.answer), (pair.corrupted, pair.corrupted_answer)):
        *worked, asked = (prompt + answer).split(", ")
        for equation in (*worked, asked):
            terms, result = equation.split("=")
            assert sum(map(int, terms.split("+"))) == int(result)
        assert asked not in worked


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_one_answer(family):
    """The same prompt never has two answers, whichever pair it stands in."""
    answers: dict[str, set[str]] = {}
    for pair in (pair for pair in PAIRS if pair.family == family):
        answers.setdefault(pair.clean, set()).add(pair.answer)
        answers.setdefault(pair.corrupted, set()).add(pair.corrupted_answer)
    assert not {prompt: found for prompt, found in answers.items() if len(found) > 1}


@pytest.mark.parametrize("name", [facts.name for facts in catalog().values() if facts.device == "cpu"])
def test_tokenizers_keep_the_pairs(name):
    """Each offline subject's tokenizer keeps 40 pairs per family; a span is one word of few tokens."""
    folder = location(catalog()[name])
    if folder is None:
        pytest.skip(f"the tokenizer of {name} is not here: {fetch_command(catalog()[name])}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    usable, dropped = tokenised(PAIRS, tokenizer)
    counts = Counter(pair.family for pair in usable)
    assert all(counts[family] >= 40 for family in FAMILIES), dropped
    texts = {pair.id: pair for pair in PAIRS}
    for pair in usable:
        assert 1 <= pair.span[1] - pair.span[0] <= 3
        assert tokenizer.decode([pair.answer]) == texts[pair.id].answer
        assert pair.clean_ids == tuple(tokenizer(texts[pair.id].clean)["input_ids"])


def test_smollm2_solves_enough_pairs(smollm2):
    """SmolLM2 prefers the right answer on both sides of at least 24 pairs per family."""
    import torch

    def preferences(pairs, ids_of):
        ids = torch.tensor([ids_of(pair) for pair in pairs])
        with torch.no_grad():
            logits = smollm2.model(ids, use_cache=False).logits[:, -1].float()
        rows = torch.arange(len(pairs))
        right, wrong = ([p.answer for p in pairs], [p.corrupted_answer for p in pairs])
        return (logits[rows, right] - logits[rows, wrong]).tolist()

    usable, _ = tokenised(PAIRS, smollm2.tokenizer)
    solved: Counter[str] = Counter()
    for length in {len(pair.clean_ids) for pair in usable}:
        group = [pair for pair in usable if len(pair.clean_ids) == length]
        clean = preferences(group, lambda pair: pair.clean_ids)
        corrupted = preferences(group, lambda pair: pair.corrupted_ids)
        solved.update(pair.family for pair, a, b in zip(group, clean, corrupted, strict=True) if a > 0 > b)
    assert all(solved[family] >= FEWEST_PAIRS for family in FAMILIES), solved


# ---- the reader


def test_a_pair_is_read(file_of):
    """A pair of the schema is read field by field."""
    assert load_minimal_pairs(file_of(GOOD)) == [MinimalPair(**GOOD)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "fun"}, "'family' is 'fun'; it must be one of factual"),
        ({"corrupted": "The third is really a"}, "'corrupted' has 5 words, but 'clean' has 4"),
        ({"corrupted": "The first is a"}, "there is nothing to patch"),
        ({"corrupted": "That first was a"}, "in more than one span"),
        ({"corrupted": "The first is an"}, "in the last word"),
        ({"clean": "The first is a "}, "'clean' begins or ends with white space"),
        ({"answer": "y"}, "'answer' is 'y', as 'corrupted_answer' is"),
        ({"clean": 3}, "'clean' must be a string, not a number"),
        ({"answer": ""}, "'answer' is blank"),
        ({"note": "x"}, "'note' is unknown"),
    ],
)
def test_a_faulty_pair_is_named_in_one_line(file_of, change, message):
    """The error says which pair of which file, and what is the matter with it."""
    with pytest.raises(UserError) as error:
        load_minimal_pairs(file_of(GOOD | {"id": "fine", "clean": "A b is a", "corrupted": "A c is a"}, GOOD | change))
    assert message in str(error.value)
    assert "minimal_pairs.json, pair 1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (GOOD | {"clean": "A b is a", "corrupted": "A c is a"}, "'factual-0' occurs twice"),
        (GOOD | {"id": "other", "clean": GOOD["corrupted"], "corrupted": GOOD["clean"]}, "of another pair too"),
    ],
)
def test_a_pair_that_comes_twice_is_refused(file_of, second, message):
    """Under the same id, or with the same prompts the other way round, it would count twice."""
    with pytest.raises(UserError, match=message):
        load_minimal_pairs(file_of(GOOD, second))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pairs": []}, "holds no pairs"),
        ({"pairs": 3}, "must be a list of objects"),
        ({"extra": 1}, "'extra' is unknown"),
    ],
)
def test_a_faulty_file_is_refused(file_of, more, message):
    """So is a file of another schema."""
    with pytest.raises(UserError, match=message):
        load_minimal_pairs(file_of(GOOD, **more))


# ---- the tokens


def test_the_span_holds_the_tokens_that_differ():
    """With one token per byte the span is as long as the words that differ."""
    tokenizer = byte_tokenizer()
    (pair,), dropped = tokenised([MinimalPair(**GOOD)], tokenizer)
    assert not dropped
    assert tokenizer.decode(pair.clean_ids[slice(*pair.span)]) == "first"
    assert tokenizer.decode(pair.corrupted_ids[slice(*pair.span)]) == "third"
    assert pair.clean_ids[: pair.span[0]] == pair.corrupted_ids[: pair.span[0]]
    assert pair.clean_ids[pair.span[1] :] == pair.corrupted_ids[pair.span[1] :]
    assert tokenizer.decode([pair.answer, pair.corrupted_answer]) == "xy"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"corrupted": "The second is a"}, "the prompts have 14 and 15 tokens"),
        ({"answer": " x"}, "the answer ' x' is not one token behind its prompt"),
        ({"corrupted_answer": "yes"}, "the answer 'yes' is not one token"),
    ],
)
def test_a_pair_that_the_tokenizer_does_not_allow_is_told(change, reason):
    """It is left out, with the reason under its id; the others stay."""
    pairs = [MinimalPair(**GOOD | change), MinimalPair(**GOOD | {"id": "fine"})]
    usable, dropped = tokenised(pairs, byte_tokenizer())
    assert [pair.id for pair in usable] == ["fine"]
    assert list(dropped) == ["factual-0"]
    assert reason in dropped["factual-0"]


def test_a_start_token_stays_outside_the_span():
    """A tokenizer that opens every text with a start token does so here, and the span moves by one."""
    started = byte_tokenizer(bos_token=START)
    opening = (START, started.bos_token_id)
    started.backend_tokenizer.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[opening])
    ((without,), _), ((opened,), _) = (tokenised([MinimalPair(**GOOD)], one) for one in (byte_tokenizer(), started))
    assert opened.clean_ids[0] == opened.corrupted_ids[0] == started.bos_token_id
    assert opened.span == (without.span[0] + 1, without.span[1] + 1)
    assert opened.answer == without.answer
