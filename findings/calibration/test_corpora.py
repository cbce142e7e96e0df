"""Corpora: their files, the source's format, and reference answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.corpora import completions_file
from lab.corpora.byte_tokenizer import CHAT, byte_tokenizer
from lab.corpora.checks import flags_of
from lab.corpora.completions_file import Completion, CompletionsFile
from lab.corpora.corpus import Text, load_corpus, token_text
from lab.corpora.degeneration import novel
from lab.corpora.prompts import load_prompts
from lab.corpora.references import reference_corpus
from lab.corpora.rendering import render, special_ids
from lab.errors import UserError
from lab.subjects.catalog import facts

pytestmark = pytest.mark.calibration

SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def toy(tokenizer):
    """Facts of a subject that the byte tokenizer belongs to."""
    return replace(facts("smollm2-135m-instruct"), name="toy", vocabulary=len(tokenizer))


def answered(tokenizer, name: str, category: str, prompt: str, answer: str, ended: bool = True) -> Completion:
    """A completion as `complete` would store it."""
    rendering = render(tokenizer, "chat", SYSTEM, prompt)
    ids = tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]) + (tokenizer.eos_token_id,) * ended
    reason = "stop" if ended else "length"
    known = Completion(
        name, category, prompt, rendering.text, answer, reason, (), rendering.user_span, 0, 1.0, 0.5, rendering.ids, ids
    )
    return replace(known, flags=flags_of(known, special_ids(tokenizer)))


@pytest.fixture(scope="module")
def content(tokenizer) -> CompletionsFile:
    """Answers in three categories, one of them cut by the token limit and one degenerate."""
    entries = [
        answered(tokenizer, "a0", "factual", "Which river?", "The Nile."),
        answered(tokenizer, "a1", "factual", "Which town?", "Cairo, ist's in the north.", ended=False),
        answered(tokenizer, "b0", "code", "Add one, please.", "def f(x):\n    return x + 1"),
        answered(tokenizer, "b1", "code", "Go on.", "no no no no no no no no no no"),
        answered(tokenizer, "c0", "rare", "Why é?", "Because “é” is rare."),
    ]
    made = {"subject": "toy", "frame": "chat", "completion_source": "greedy", "versions": {"torch": "2"}}
    return CompletionsFile(made, SYSTEM, tuple(entries))


@pytest.fixture
def written(tmp_path, content) -> Path:
    completions_file.write(tmp_path / "completions.json", content)
    return tmp_path / "completions.json"


def test_writer_and_reader_are_inverse(written, content):
    """What was written is read back, entry by entry."""
    assert completions_file.read(written) == content


def test_a_changed_answer_changes_its_lines_only(tmp_path, written, content, tokenizer):
    """Every list is on a line of its own, so a diff shows which answers moved."""
    changed = answered(tokenizer, "a0", "factual", "Which river?", "The Elbe.")
    other = tmp_path / "other.json"
    completions_file.write(other, replace(content, completions=(changed, *content.completions[1:])))
    old, new = (path.read_text().splitlines() for path in (written, other))
    assert [line.split(":")[0].strip() for line, was in zip(new, old, strict=True) if line != was] == [
        '"completion"',
        '"completion_token_ids"',
    ]


def test_a_corpus_holds_the_fit_answers_in_balanced_order(written, toy, tokenizer):
    """Degenerate answers are named with their flags; categories take turns."""
    corpus = load_corpus(toy, tokenizer, written)
    assert [text.id for text in corpus.texts] == ["a0", "b0", "c0", "a1"]
    assert corpus.rejected == {"b1": ("loop", "repetitive")}
    assert corpus.categories == ("factual", "code", "rare")
    assert corpus.texts[3].flags == ("truncated",)
    assert corpus.texts[0].end_id == tokenizer.eos_token_id not in corpus.texts[0].completion_ids


def test_the_corpus_is_the_same_without_tokenizer(written, toy, tokenizer):
    """What needs a tokenizer are checks only."""
    assert load_corpus(toy, None, written) == load_corpus(toy, tokenizer, written)


def test_neither_layout_nor_rejected_answers_move_the_digest(tmp_path, written, toy, content):
    """Only ids and settings count."""
    digest = load_corpus(toy, None, written).digest
    loose = tmp_path / "loose.json"
    loose.write_text(json.dumps(json.loads(written.read_text()), indent=4))
    assert load_corpus(toy, None, loose).digest == digest
    completions_file.write(loose, replace(content, completions=tuple(e for e in content.completions if e.id != "b1")))
    assert load_corpus(toy, None, loose).digest == digest
    completions_file.write(loose, replace(content, settings={**content.settings, "dtype": "float32"}))
    assert load_corpus(toy, None, loose).digest != digest


@settings(deadline=None)
@given(st.permutations(range(5)))
def test_the_order_of_prompts_leaves_the_scored_tokens_as_they_are(tmp_path_factory, order):
    """Averages over tokens do not see in which order a file lists its prompts."""
    tokenizer = byte_tokenizer()
    base = [answered(tokenizer, f"p{i}", "abc"[i % 3], f"Question {i}", f"Answer number {i}.") for i in range(5)]
    path = tmp_path_factory.mktemp("order") / "completions.json"
    made = {"subject": "toy", "frame": "chat", "completion_source": "greedy"}
    completions_file.write(path, CompletionsFile(made, SYSTEM, tuple(base[index] for index in order)))
    toy = replace(facts("smollm2-135m-instruct"), name="toy", vocabulary=len(tokenizer))
    scored = {text.id: token_text(text) for text in load_corpus(toy, None, path).texts}
    assert scored == {entry.id: token_text(_as_text(entry)) for entry in base}


def _as_text(entry: Completion) -> Text:
    body = entry.body_ids
    mask = novel(body)
    return Text(entry.id, entry.category, entry.prompt_token_ids, body, entry.user_span, mask, end_id=entry.end_id)


def _edited(**changes):
    """Change fields of the first entry; None takes the field away."""

    def edit(document):
        entry = document["completions"][0] | changes
        document["completions"][0] = {name: value for name, value in entry.items() if value is not None}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format="dl-findings completions 9"), "'format' is"),
        (lambda d: d.update(completions={}), "'completions' must be a list of objects, not an object"),
        (lambda d: d.update(completions=[]), "'completions' is empty"),
        (lambda d: d.update(completions=[3]), "entry 0 must be an object, not a number"),
        (lambda d: d["completions"].append(d["completions"][0]), "holds 'a0' twice"),
        (lambda d: d["completions"].pop(), "'total_prompt_tokens' is"),
        (lambda d: d["config"].pop("total_completion_tokens"), "'total_completion_tokens' is missing"),
        (_edited(prompt_token_ids="1 2"), "entry 0: 'prompt_token_ids' must be a list of token ids, not a string"),
        (_edited(completion_token_ids=[1, 2.5]), "entry 0: 'completion_token_ids' .* holds 2.5"),
        (_edited(completion_token_ids=[True]), "holds True"),
        (_edited(prompt=None), "entry 0: 'prompt' is missing"),
        (_edited(finish_reason="abort"), "'finish_reason' is 'abort'; it must be one of stop, length, cut"),
        (_edited(user_span=[5, 900]), "'user_span' must be a start and a stop within"),
        (_edited(answer_start=99), "'answer_start' lies behind the completion"),
        (_edited(loss=float("nan")), "'loss' must be a finite number"),
        (_edited(loss=10**400), "'loss' must be a finite number"),
        (_edited(loss=-0.5), "'loss' is -0.5; a cross-entropy is 0 or more"),
        (_edited(greedy_agreement=1e308), "'greedy_agreement' is 1e[+]308; it must lie between 0 and 1"),
        (_edited(greedy_agreement=-0.1), "'greedy_agreement' is -0.1; it must lie"),
        (_edited(flags=["two\nlines"]), r"'flags' holds 'two\\nlines'; known are empty, loop"),
        (_edited(surprise=1), "'surprise' is unknown"),
        (_edited(flags=["echo"]), "the flags of 'a0' are echo, but its ids say none"),
        (_edited(greedy_agreement=0.2), "but its ids say not_greedy"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_entry_and_field(written, toy, edit, message):
    """Each fault of a file is told by file, entry and field."""
    document = json.loads(written.read_text())
    edit(document)
    written.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(toy, None, written)
    assert "\n" not in str(caught.value)
    assert str(written) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[: len(text) // 2], "is not whole JSON"),
        (lambda text: "[1, 2]", "must be an object, not a list"),
        (lambda text: "{}", "'config' is missing"),
    ],
)
def test_a_damaged_file_is_one_line(written, toy, tokenizer, damage, message):
    """Empty, truncated, or something else altogether."""
    written.write_text(damage(written.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(toy, tokenizer, written)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_command_that_makes_it(toy):
    """A subject without completions is told how to get them."""
    with pytest.raises(UserError, match="python -m lab complete toy"):
        load_corpus(toy, None)


def test_ids_beyond_the_vocabulary_are_another_tokenizers(written, toy):
    """The check that needs no tokenizer."""
    with pytest.raises(UserError, match=r"made with another tokenizer .* outside the vocabulary of 90"):
        load_corpus(replace(toy, vocabulary=90), None, written)


def test_another_tokenizer_is_refused_with_the_remedy(written, toy):
    """A template that renders other ids is told from the first prompt on."""
    with pytest.raises(UserError, match=r"made with another tokenizer .*'a0'.*`python -m lab complete toy"):
        load_corpus(toy, byte_tokenizer(CHAT.replace("assistant", "model")), written)


@pytest.fixture
def foreign(tmp_path, content) -> Path:
    """The same answers in the format of hivaze/dl-experiments."""
    entries = [
        {
            "idx": index,
            "prompt": entry.prompt,
            "category": entry.category,
            "templated_prompt": entry.templated_prompt,
            "completion": entry.completion,
            "full_text": entry.templated_prompt + entry.completion,
            "prompt_token_ids": entry.prompt_token_ids,
            "completion_token_ids": entry.completion_token_ids,
            "full_token_ids": entry.prompt_token_ids + entry.completion_token_ids,
            "prompt_token_count": len(entry.prompt_token_ids),
            "completion_token_count": len(entry.completion_token_ids),
        }
        for index, entry in enumerate(content.completions)
    ]
    config = {
        "model": "some/toy",
        "model_slug": "toy",
        "max_new_tokens": 32,
        "temperature": 0,
        "num_prompts": len(entries),
        "total_prompt_tokens": sum(entry["prompt_token_count"] for entry in entries),
        "total_completion_tokens": sum(entry["completion_token_count"] for entry in entries),
        "prompts_source": "elsewhere",
    }
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps({"config": config, "completions": entries}))
    return path


def test_the_sources_format_gives_the_same_texts(foreign, written, toy, tokenizer):
    """Finish reasons, flags and the users' words are derived; all ids are the same."""
    ours, theirs = (load_corpus(toy, tokenizer, path) for path in (written, foreign))
    assert [replace(text, greedy_agreement=None, loss=None) for text in ours.texts] == [
        replace(text, id=same.id) for text, same in zip(theirs.texts, ours.texts, strict=True)
    ]
    assert list(theirs.rejected.values()) == list(ours.rejected.values())
    assert theirs.settings["generator"] == "dl-experiments"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edited(idx=4), "'idx' is 4"),
        (_edited(full_text="x"), "'full_text' is not prompt and completion joined"),
        (_edited(full_token_ids=[1]), "'full_token_ids' are not"),
        (_edited(prompt_token_count=1), "'prompt_token_count' is 1"),
        (lambda d: d["config"].update(num_prompts=7), "'num_prompts' is 7"),
        (lambda d: d["config"].update(temperature=0.7), "'temperature' is not 0"),
        (_edited(completion="x", full_text=None), "'full_text' is missing"),
    ],
)
def test_contradictions_in_the_sources_format_are_told(foreign, toy, tokenizer, edit, message):
    """Everything that the format says twice is compared."""
    document = json.loads(foreign.read_text())
    edit(document)
    foreign.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        load_corpus(toy, tokenizer, foreign)


def test_a_source_file_of_another_tokenizer_is_refused(foreign, toy):
    """Ids that do not decode to the file's own text."""
    shifted = byte_tokenizer()
    document = json.loads(foreign.read_text())
    for entry in document["completions"]:
        entry["completion_token_ids"] = [(token + 1) % 200 for token in entry["completion_token_ids"]]
        entry["full_token_ids"] = entry["prompt_token_ids"] + entry["completion_token_ids"]
    foreign.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"another tokenizer .* decode to another text; make your own"):
        load_corpus(toy, shifted, foreign)


def test_reasoning_that_never_closes_is_no_answer(foreign, toy):
    """Files of thinking models: what counts is the answer behind the closing tag."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    closing = tokenizer.convert_tokens_to_ids("</think>")
    document = json.loads(foreign.read_text())
    for entry, answer in zip(document["completions"], ("hm</think>The Nile.", *["hm, hm"] * 4), strict=True):
        entry["templated_prompt"] += "<think>\n"
        entry["completion"] = answer
        entry["full_text"] = entry["templated_prompt"] + answer
        entry["prompt_token_ids"] = tokenizer(entry["templated_prompt"])["input_ids"]
        entry["completion_token_ids"] = tokenizer(answer)["input_ids"]
        entry["full_token_ids"] = entry["prompt_token_ids"] + entry["completion_token_ids"]
        entry["prompt_token_count"], entry["completion_token_count"] = map(
            len, (entry["prompt_token_ids"], entry["completion_token_ids"])
        )
    document["config"]["total_prompt_tokens"] = sum(e["prompt_token_count"] for e in document["completions"])
    document["config"]["total_completion_tokens"] = sum(e["completion_token_count"] for e in document["completions"])
    foreign.write_text(json.dumps(document))
    corpus = load_corpus(replace(toy, vocabulary=len(tokenizer)), tokenizer, foreign)
    assert set(corpus.rejected.values()) == {("empty", "truncated")}
    (text,) = corpus.texts
    assert text.completion_ids[text.answer_start - 1] == closing


@pytest.mark.parametrize(("frame", "blank"), [("chat", ""), ("plain", " ")])
def test_reference_answers_make_a_corpus_without_generation(toy, tokenizer, frame, blank):
    """Every prompt has its reference as completion, joined by ids, and the corpus says so."""
    corpus, asked = reference_corpus(replace(toy, frame=frame), tokenizer), load_prompts()
    references = {prompt.id: blank + prompt.reference for prompt in asked.prompts}
    assert {text.id: tokenizer.decode(text.completion_ids) for text in corpus.texts} == references
    assert corpus.settings["completion_source"] == "reference"
    assert corpus.problems() == []
