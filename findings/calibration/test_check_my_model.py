"""`--model` on decoders that the catalog does not know: facts, own text, measurement, and the run as a user sees it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lab import cli
from lab.corpora import completions, completions_file, generation_transformers, generator, on_the_spot, prompts
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.corpora.checks import flags_of
from lab.corpora.completions_file import Completion, CompletionsFile
from lab.corpora.corpus import completion_slice, load_corpus
from lab.corpora.references import reference_corpus
from lab.corpora.rendering import render, special_ids
from lab.errors import UserError
from lab.experiments.layers import layer_knockout
from lab.store import Sweep
from lab.subjects.loading import LoadedSubject, load
from lab.subjects.tiny import ARCHITECTURES, LAYERS, tiny
from lab.subjects.uncatalogued import named_model

pytestmark = pytest.mark.calibration

REPOSITORY = Path(__file__).parents[2]
REPLAYING = ("layer_knockout", "layer_swap_cost", "logit_lens")
#: need facts that the model knows, a tokenizer with words, and linear maps: a random GPT-2 over bytes has none of them
NOT_FOR_IT = ("activation_patching", "contrastive_trajectories", "quantization")
FINDINGS = [
    str(path)
    for group in ("layers", "systems")
    for name in (*REPLAYING, *NOT_FOR_IT)
    for path in sorted(REPOSITORY.glob(f"findings/{group}/test_{name}*.py"))
]
FEW = layer_knockout.Budget(
    prompts=3, tokens=12, pair_prompts=2, pair_tokens=6, block_sizes=None, head_dtype="float32", batch_tokens=512
)


def save(architecture: str, folder: Path, seed: int = 0) -> Path:
    """A tiny model with random weights and a byte tokenizer, as `save_pretrained` leaves them."""
    tokenizer = byte_tokenizer()
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    tiny(architecture, seed=seed, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request, tmp_path_factory) -> LoadedSubject:
    """A tiny model of each decoder class, found by nothing but its folder."""
    folder = save(request.param, tmp_path_factory.mktemp("models") / f"My {request.param}")
    return load(named_model(folder), "float32")


@pytest.fixture
def few_prompts(monkeypatch) -> None:
    """Three prompts instead of fifty."""
    three = replace(prompts.load_prompts(), prompts=prompts.load_prompts().prompts[:3])
    monkeypatch.setattr(prompts, "load_prompts", lambda: three)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A tiny Llama in a folder, an empty cache, and no vLLM."""
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(generator.INTERPRETER, str(tmp_path / "no-vllm"))
    return save("llama", tmp_path / "my-model")


# ---- any decoder class


def test_facts_are_the_configurations(subject):
    facts, config = subject.facts, subject.decoder.config
    assert facts.name == f"my-{config.model_type.replace('_', '-')}"
    assert (facts.layers, facts.width, facts.vocabulary) == (LAYERS, config.hidden_size, subject.decoder.vocabulary)
    assert (facts.architecture, facts.frame, facts.device) == (config.model_type, "chat", "cpu")


def test_generated_text_is_the_models_own_argmax(subject):
    """Prompts of unequal lengths in one batch: padding and caches, recurrent ones too, change no token."""
    asked = [list(b"abcdefghij"), list(b"xyz"), list(b"hello, world")]
    request = {"model": str(subject.facts.source.path), "dtype": "float32", "max_tokens": 6, "prompts": asked}
    answers = generation_transformers.generate({**request, "end_ids": [subject.tokenizer.eos_token_id]})
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt + answer["ids"]])
        argmax = subject.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert answer["ids"] == argmax.tolist()


def test_layer_knockout_measures_what_the_model_itself_loses(subject):
    """The experiment's losses, intact and without layer 2, by the model's own forward pass with that layer bypassed."""
    corpus = reference_corpus(subject.facts, subject.tokenizer)
    data = layer_knockout.measure(subject, corpus, FEW, Sweep())
    record = layer_knockout.LayerKnockout(data.assign_attrs(subject="tiny", source="measured", condition="quick"))
    assert record.knockout_loss.sizes == {"layer": LAYERS}
    texts = corpus.prefix(FEW.prompts).texts
    assert float(record.baseline_loss) == pytest.approx(own_loss(subject, texts), rel=1e-4)
    hook = subject.decoder.layers[2].register_forward_hook(bypass, with_kwargs=True)
    try:
        assert float(record.knockout_loss.sel(layer=2)) == pytest.approx(own_loss(subject, texts), rel=1e-4)
    finally:
        hook.remove()


def bypass(layer, args, kwargs, output):
    """A forward hook: the residual stream leaves the layer as it came."""
    entered = args[0] if args else kwargs["hidden_states"]
    return (entered, *output[1:]) if isinstance(output, tuple) else entered


def own_loss(subject, texts) -> float:
    """Mean loss of the scored tokens of these texts, by the model's own forward pass on each [nat/token]."""
    losses = []
    for text in texts:
        body = text.completion_ids[: FEW.tokens]
        ids = torch.tensor([text.prompt_ids + body])
        targets = range(ids.shape[1])[completion_slice(len(text.prompt_ids), ids.shape[1])]
        scored = [target for target in targets if text.novel[target - len(text.prompt_ids)]]
        logits = subject.model(input_ids=ids, use_cache=False).logits[0, [target - 1 for target in scored]]
        losses += torch.nn.functional.cross_entropy(logits.double(), ids[0, scored], reduction="none").tolist()
    return sum(losses) / len(losses)


# ---- completions on the spot


def test_a_model_answers_once_and_is_read_from_then_on(model, few_prompts, monkeypatch):
    """Through Transformers, which the settings say; the second call generates nothing."""
    facts, told = named_model(model), []
    path = on_the_spot.ensure(facts, model, told.append)
    assert [line.split(":")[0] for line in told[:1]] == ["my-model has no completions yet"]
    assert "3 prompts through Transformers" in told[0]
    assert str(path) in told[1]
    corpus = load_corpus(facts, AutoTokenizer.from_pretrained(model), path)
    assert (corpus.settings["generator"], corpus.settings["subject"]) == ("transformers", "my-model")
    monkeypatch.setattr(on_the_spot, "complete", None)
    assert on_the_spot.ensure(facts, model, told.append) == path
    assert len(told) == 2


def test_the_command_line_leaves_its_file_where_the_suite_looks(model, few_prompts, capsys):
    """`python -m lab complete FOLDER`: nothing of an uncatalogued model is written into the repository."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["complete", str(model), "--generator", "transformers", "--max-tokens", "8"])
    path = on_the_spot.completions_path(named_model(model), model)
    assert ended.value.code == 0
    assert path.exists()
    assert capsys.readouterr().out.splitlines()[-1] == f"my-model: {path}"


def test_other_weights_answer_anew(model):
    """A checkpoint that was trained on, in the same folder, is another model; so is one with another template."""
    paths = [on_the_spot.completions_path(named_model(model), model)]
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    paths.append(on_the_spot.completions_path(named_model(model), model))
    save("llama", model, seed=1)
    paths.append(on_the_spot.completions_path(named_model(model), model))
    assert len(set(paths)) == 3


def test_where_vllm_fails_transformers_takes_over_and_says_so(model, few_prompts, monkeypatch, tmp_path):
    """The reason is told, and the settings name the generator that did the work."""
    vllm = tmp_path / "python"
    vllm.write_text("#!/bin/sh\necho 'ValueError: no such architecture'; echo bye; exit 1\n")
    vllm.chmod(0o755)
    monkeypatch.setenv(generator.INTERPRETER, str(vllm))
    told: list[str] = []
    path = on_the_spot.ensure(named_model(model), model, told.append)
    assert completions_file.read(path).settings["generator"] == "transformers"
    assert "through vLLM" in told[0]
    assert told[1].startswith("vLLM does not run llama here: ")
    assert "(ValueError: no such architecture)" in told[1]
    assert "through Transformers" in told[2]


def test_completions_under_a_known_name_count_for_the_weights_that_wrote_them(model, few_prompts, monkeypatch):
    """Two checkpoints may be called alike; a file in the repository belongs to one of them."""
    facts = named_model(model)
    committed = model.parent / "committed.json"
    completions.complete(facts, model, committed, "transformers", 8)
    monkeypatch.setattr("lab.corpora.reading.committed_path", lambda name: committed)
    assert on_the_spot.completions_path(facts, model) == committed
    save("llama", model, seed=1)
    assert on_the_spot.completions_path(facts, model) != committed


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def with_nan(folder: Path) -> None:
    broken = tiny("llama", vocab_size=len(byte_tokenizer()))
    broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(folder)


def with_short_context(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without_tokenizer, r"there is no tokenizer.json in .*my-model; save the model's fast tokenizer beside it"),
        (with_nan, r"1 entries of model.layers.1.mlp.up_proj.weight are NaN or infinite"),
        (with_short_context, r"my-model reads at most 100 tokens, but its prompts take up to \d+ of them"),
    ],
)
def test_what_is_wrong_with_a_model_is_one_line(model, harm, message):
    """It is told before anything is generated, and nothing is kept."""
    harm(model)
    facts = named_model(model)
    with pytest.raises(UserError, match=message):
        on_the_spot.ensure(facts, model, lambda line: None)
    assert not on_the_spot.completions_path(facts, model).exists()


def test_a_model_saved_under_a_catalogued_name_is_not_taken_for_it(tmp_path):
    assert named_model(save("llama", tmp_path / "SmolLM2-135M-Instruct")).name == "smollm2-135m-instruct-local"


# ---- the run


def write_reference_completions(facts, path: Path) -> Path:
    """The committed reference answers as a completions file of this subject; long enough to pass the limits."""
    tokenizer, asked = AutoTokenizer.from_pretrained(facts.source.path), prompts.load_prompts()
    entries = []
    for prompt in asked.prompts:
        rendered = render(tokenizer, facts.frame, asked.system_message, prompt.text)
        ids = tuple(tokenizer(prompt.reference)["input_ids"])
        told = {"id": prompt.id, "category": prompt.category, "prompt": prompt.text, "completion": prompt.reference}
        entry = Completion(
            **told,
            templated_prompt=rendered.text,
            finish_reason="cut",
            flags=(),
            user_span=rendered.user_span,
            answer_start=0,
            greedy_agreement=None,
            loss=None,
            prompt_token_ids=rendered.ids,
            completion_token_ids=ids,
        )
        entries.append(replace(entry, flags=flags_of(entry, special_ids(tokenizer))))
    settings = {"completion_source": "reference", "frame": facts.frame}
    completions_file.write(path, CompletionsFile(settings, asked.system_message, tuple(entries)))
    return path


def run(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    """`pytest findings` as a user runs it; the experiments that are left out take two minutes more."""
    command = [sys.executable, "-m", "pytest", *FINDINGS, "-p", "no:cacheprovider", "-m", "measured"]
    environment = {**os.environ, "DL_FINDINGS_CACHE": str(cache), "COLUMNS": "120", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def stated(experiments: tuple[str, ...]) -> set[str]:
    """Ids of the claims about these experiments."""
    paths = [path for path in FINDINGS if any(name in path for name in experiments)]
    return {found for path in paths for found in re.findall(r'@claim\("([^"]+)"', Path(path).read_text())}


def test_checking_a_model_end_to_end(tmp_path):
    """GPT-2's class, with LayerNorm and learned positions: verdicts, what transfers, another subject beside it."""
    folder, cache, verdicts = save("gpt2", tmp_path / "my-gpt2"), tmp_path / "cache", tmp_path / "verdicts.json"
    corpus = write_reference_completions(named_model(folder), tmp_path / "completions.json")
    given = ("--model", folder, "--corpus", corpus)
    first = run(*given, "--verdicts", verdicts, cache=cache)
    assert first.returncode == 1, first.stdout + first.stderr  # random weights: most claims fail, and failures fail
    assert "measuring layer_knockout on my-gpt2 ..." in first.stdout
    assert "findings that transfer to my-gpt2" in first.stdout
    assert "no snapshot of this model yet" in first.stdout
    for reason in ("leaves no contrastive families", "a decoder layer keeps attn.c_attn.weight"):
        assert reason in first.stdout  # where an experiment does not apply, its claims are skipped
    rows = json.loads(verdicts.read_text())
    assert {row["subject"] for row in rows} == {"my-gpt2"}
    assert {row["verdict"] for row in rows} >= {"holds", "refuted"}
    # also with five layers every claim comes to a verdict, if only that it does not apply
    outcomes = {(row["verdict"], row["outcome"]) for row in rows if row["claim"] not in stated(NOT_FOR_IT)}
    assert outcomes == {("holds", "passed"), ("refuted", "failed"), ("not applicable", "skipped")}
    again = run(*given, "-k", "layer_knockout", "--against", "smollm2-135m-instruct", cache=cache)
    assert "measuring" not in again.stdout
    assert f"smollm2-135m-instruct has 30 layers and my-gpt2 has {LAYERS}:" in again.stdout
    assert "differs    on smollm2-135m-instruct the verdict is" in again.stdout


def test_a_model_without_text_of_its_own_skips_with_the_reason(tmp_path):
    """Four answers are no corpus: no claim is judged, and one line per file says why and what to do."""
    folder, cache = save("llama", tmp_path / "babbler"), tmp_path / "cache"
    corpus = write_reference_completions(named_model(folder), tmp_path / "completions.json")
    content = completions_file.read(corpus)
    completions_file.write(corpus, replace(content, completions=content.completions[:4]))
    ended = run("--model", folder, "--corpus", corpus, "-k", "test_layer_knockout", cache=cache)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("SKIPPED")]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(lines) == sum("test_layer_knockout" in path for path in FINDINGS)
    for line in lines:
        assert "the completions of babbler are unfit: only 1 completions of category" in line
        assert line.endswith("with --corpus FILE")
