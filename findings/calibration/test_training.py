"""Training and evaluation of adapters on tiny models: what falls, stays and repeats, and what is left half done."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import cli, paths
from lab.adapters import lora
from lab.adapters.adapted_weights import AGGRESSIVE, GENTLE
from lab.adapters.allocations import Shape, allocation, parameters
from lab.corpora import thinking
from lab.corpora.arithmetic import splits
from lab.corpora.batches import TokenText, token_batches
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.corpora.exercises import Exercise, worked_exercises
from lab.errors import NotApplicable, UserError
from lab.experiments.surgery.measuring import spectral_peft as measuring
from lab.experiments.surgery.spectral_peft import EXPERIMENT, Budget, Run, SpectralPeft, runs
from lab.store import Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.configuration import facts_of_folder
from lab.subjects.facts import Local
from lab.subjects.loading import load
from lab.subjects.tiny import loaded, random_corpus, tiny
from lab.training import answers, loop, making, rates, recipes, sets, specimens
from lab.training.checkpoints import save_merged, write_checkpoint
from lab.training.evaluation import exercise_readings, target_readings
from lab.training.loop import Settings, training_batches

pytestmark = pytest.mark.calibration

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")
SETTINGS = Settings(learning_rate=5e-3, steps=20, batch=4, warmup=3, seed=0)


def random_texts(count, vocabulary=89, seed=0):
    """Texts of 6 to 12 tokens whose last three are learned."""
    generator = np.random.default_rng(seed)
    texts = [tuple(generator.integers(3, vocabulary, generator.integers(6, 13)).tolist()) for _ in range(count)]
    return [TokenText(ids, tuple(range(len(ids) - 3, len(ids)))) for ids in texts]


def trained(decoder, texts, settings=SETTINGS, ranks=None):
    """The log of a training, and the factors that it ends with."""
    ranks = np.full((decoder.n_layers, 7), 4) if ranks is None else ranks
    with lora.fresh_adapter(decoder, ranks, settings.seed) as model:
        parameters = lora.trainable_parameters(model)
        log = loop.train(decoder, parameters, texts, settings)
        return log, [parameter.detach().clone() for parameter in parameters]


# ---- the loop


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "cohere", "granite"])
def test_the_loss_is_the_models_own(architecture):
    decoder = Decoder(tiny(architecture))
    (batch,) = token_batches(random_texts(5), 1000)
    logits = decoder.model(input_ids=batch.ids, use_cache=False).logits[batch.scored.row, batch.scored.position].float()
    expected = torch.nn.functional.cross_entropy(logits, batch.scored.target)
    torch.testing.assert_close(loop.solution_loss(decoder, batch), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_loss_and_leaves_the_weights(architecture):
    decoder = Decoder(tiny(architecture))
    before = {name: weight.clone() for name, weight in decoder.model.state_dict().items()}
    log, factors = trained(decoder, random_texts(8))
    assert len(log.losses) == len(log.gradient_norms) == SETTINGS.steps
    assert np.mean(log.losses[-3:]) < 0.85 * np.mean(log.losses[:2])  # Gemma's logits are capped
    assert all(factor.abs().sum() > 0 for factor in factors)
    after = decoder.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())


def test_a_seed_repeats_a_training_bit_for_bit():
    decoder, texts = Decoder(tiny("llama")), random_texts(20)
    short = replace(SETTINGS, steps=6)
    (log, factors), (again, same) = (trained(decoder, texts, short) for _ in range(2))
    assert log.losses == again.losses
    assert all(map(torch.equal, factors, same))
    other, _ = trained(decoder, texts, replace(short, seed=1))
    assert other.losses != log.losses


def test_layers_without_ranks_are_not_trained():
    decoder = Decoder(tiny("llama"))
    ranks = np.zeros((5, 7), dtype=int)
    ranks[3:] = 2
    with lora.fresh_adapter(decoder, ranks, 0) as model:
        loop.train(decoder, lora.trainable_parameters(model), random_texts(8), replace(SETTINGS, steps=2))
        trained_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained_names
    assert all(".layers.3." in name or ".layers.4." in name for name in trained_names)


def test_the_first_step_moves_nothing_and_the_second_by_the_rate():
    """The warm-up begins at 0, and Adam's first real step is the rate in every element that has a gradient."""
    decoder = Decoder(tiny("llama"))
    with lora.fresh_adapter(decoder, np.full((5, 7), 2), 0) as model:
        start = [parameter.detach().clone() for parameter in lora.trainable_parameters(model)]
    _, one = trained(decoder, random_texts(8), Settings(1e-3, 1, 4, 1, 0), np.full((5, 7), 2))
    _, two = trained(decoder, random_texts(8), Settings(1e-3, 2, 4, 1, 0), np.full((5, 7), 2))
    assert all(map(torch.equal, start, one))
    moved = torch.cat([(a - b).abs().ravel() for a, b in zip(start, two, strict=True)])
    assert 0 < float(moved.max()) <= 1e-3 * 1.01


def test_divergence_is_one_line():
    decoder = Decoder(tiny("llama"))
    texts = random_texts(8)
    with lora.fresh_adapter(decoder, np.full((5, 7), 2), 0) as model:
        parameters = lora.trainable_parameters(model)
        parameters[0].data.fill_(float("nan"))
        with pytest.raises(UserError, match="training diverged at step 0"):
            loop.train(decoder, parameters, texts, SETTINGS)


def test_every_text_is_read_before_any_is_read_again():
    texts = random_texts(40)
    batches = list(training_batches(texts, replace(SETTINGS, steps=15)))
    assert [len(batch.lengths) for batch in batches] == [4] * 15
    rows = [
        tuple(row[:length].tolist()) for batch in batches for row, length in zip(batch.ids, batch.lengths, strict=True)
    ]
    counts = [rows.count(text.ids) for text in texts]
    assert sum(counts) == 60
    assert set(counts) == {1, 2}


def test_little_of_a_batch_is_padding():
    exercises = worked_exercises(byte_tokenizer(), splits("competent")["train"].worked[:640])
    batches = list(training_batches([exercise.text for exercise in exercises], Settings(1e-3, 40, 16, 4, 0)))
    padded = sum(batch.ids.numel() for batch in batches)
    assert 1 - sum(int(batch.lengths.sum()) for batch in batches) / padded < 0.05


# ---- evaluation


def test_readings_are_those_of_single_texts():
    decoder, texts = Decoder(tiny("llama")), random_texts(9)
    for text, (losses, right) in zip(texts, target_readings(decoder, texts, 30), strict=True):
        with torch.no_grad():
            logits = decoder.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0].double()
        expected = [-logits[t - 1].log_softmax(-1)[text.ids[t]].item() for t in text.targets]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        assert right.tolist() == [int(logits[t - 1].argmax()) == text.ids[t] for t in text.targets]


def test_an_exact_solution_is_what_greedy_decoding_writes():
    """Half of the solutions are what the model itself writes; the others are that with one token changed."""
    decoder = Decoder(tiny("qwen3"))
    decoder.model.generation_config.eos_token_id = None
    generator = np.random.default_rng(0)
    exercises, expected = [], []
    for number in range(20):
        prompt = generator.integers(3, 89, 6).tolist()
        written = decoder.model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0].tolist()
        if number % 2:
            written[6 + number % 5] = (written[6 + number % 5] + 1) % 89
        exercises.append(Exercise(tuple(written), tuple(range(6, len(written))), (7, 8)))
        expected.append(float(number % 2 == 0))
    found = exercise_readings(decoder, exercises, 64)
    assert found["accuracy"].tolist() == expected


def test_the_loss_on_results_reads_their_digits_alone():
    decoder = Decoder(tiny("llama"))
    text = random_texts(1)[0]
    targets = tuple(range(2, len(text.ids)))
    (losses, _), *_ = target_readings(decoder, [TokenText(text.ids, targets)], 100)
    found = exercise_readings(decoder, [Exercise(text.ids, targets, targets[1:3])], 100)
    assert found["nll"][0] == pytest.approx(losses[1:3].mean())


# ---- planted truth


def test_a_task_of_the_last_layer_favours_the_last_layer():
    """Answers are those of the same model with another last layer: H can become that, early layers cannot.

    Judged on prompts that were not trained on, which memory does not help with.
    """
    decoder = Decoder(tiny("llama"))
    last, first = (np.zeros((5, 7), dtype=int) for _ in range(2))
    last[4] = first[0] = 4
    ids = torch.randint(3, 89, (160, 6), generator=torch.Generator().manual_seed(0))
    with lora.fresh_adapter(decoder, last, 7) as model, torch.no_grad():
        for parameter in lora.trainable_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
        answers = decoder.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
    texts = [TokenText((*row, answer), (6,)) for row, answer in zip(ids.tolist(), answers.tolist(), strict=True)]
    losses = {}
    for name, ranks in (("H", last), ("early", first)):
        with lora.fresh_adapter(decoder, ranks, 0) as model:
            loop.train(decoder, lora.trainable_parameters(model), texts[:120], Settings(1e-2, 60, 16, 6, 0))
            losses[name] = np.mean([loss for loss, _ in target_readings(decoder, texts[120:], 1000)])
    assert losses["H"] < 0.8 * losses["early"]


# ---- specimens, from recipe to record


QUICK = Budget(
    gentle=("A", "B_matched", "spectral", "F", "H"),
    aggressive=("A", "H"),
    seeds=(0,),
    sweep=True,
    problems=3,
    text_tokens=20,
    specimens="spectral-peft",
)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder of specimens and recipes of its own, for a tiny model."""
    text = (paths.DATA / "specimens" / "recipes.toml").read_text(encoding="utf-8")
    text = (
        text.replace('"smollm2-135m-instruct"', '"tiny"')
        .replace("steps = 200", "steps = 2")
        .replace("steps = 160", "steps = 2")
        .replace("steps = 60", "steps = 2")
    )
    text = (
        text.replace("batch = 16", "batch = 2").replace("warmup = 20", "warmup = 1").replace("warmup = 6", "warmup = 1")
    )
    (tmp_path / "data" / "specimens").mkdir(parents=True)
    (tmp_path / "data" / "specimens" / "recipes.toml").write_text(text, encoding="utf-8")
    (tmp_path / "data" / "specimens" / "manifest.json").write_text("{}")
    (tmp_path / "data" / "prompts.json").write_bytes((paths.DATA / "prompts.json").read_bytes())
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    # two steps read four texts: a hundred are enough to draw them from, and quickly put into tokens
    monkeypatch.setattr(making, "worked_exercises", lambda tokenizer, all_: worked_exercises(tokenizer, all_[:100]))
    monkeypatch.setattr(thinking, "TRAINED", 40)
    monkeypatch.setattr(thinking, "EVALUATED", 3)
    monkeypatch.setattr(answers, "ROOM", 0.05)
    thinking.items.cache_clear()
    recipes._document.cache_clear()
    yield tmp_path / "data" / "specimens"
    recipes._document.cache_clear()
    thinking.items.cache_clear()


def subject():
    return replace(loaded(tiny("llama", vocab_size=300)), tokenizer=byte_tokenizer())


def make(one):
    with specimens.building(one) as folder:
        making.trained(subject(), one, folder)


def test_from_recipes_to_a_record(workshop):
    planned = runs(QUICK, recipes.rates())
    assert len(planned) == 5 + 2 + 3  # the gentle rate is one of the sweep
    with pytest.raises(NotApplicable, match=r"arithmetic-competence is not here .*python -m lab train spectral-peft"):
        measuring.measure(subject(), random_corpus(), QUICK, Sweep())
    for name in ("arithmetic-competence", *(run.name for run in planned)):
        make(recipes.recipe(name))
    one = subject()
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    dataset = measuring.measure(one, random_corpus(), QUICK, Sweep())
    assert all(torch.equal(before[name], weight) for name, weight in one.model.state_dict().items())
    settings = json.loads(dataset.attrs.pop("settings"))
    provenance = json.dumps({"settings": settings})
    named = {"subject": "tiny", "source": "measured", "condition": "quick-float32", "provenance": provenance}
    record = SpectralPeft(dataset.assign_attrs(named))
    assert all({"unit", "description"} <= record.data[name].attrs.keys() for name in record.data.data_vars)
    assert record.configurations == ["A", "B_matched", "spectral", "F", "H"]
    assert record.trained(GENTLE) == ["A", "F", "H"]
    assert record.trained(AGGRESSIVE) == ["A", "H"]
    assert np.isfinite(
        [record.delta_nll("ood", "A", rate=AGGRESSIVE), record.text_rise("H"), record.perplexity()]
    ).all()
    assert record.trainable("A") == 3 * record.trainable("H") * 5 / 6  # 5 layers against 2
    cost = lora.shape_of(one.decoder, 0.25).cost
    shape = Shape(cost, record.effective_rank_ratio.values, 0.25)
    for name in record.configurations:
        assert np.array_equal(record.variable("rank").sel(configuration=name), allocation(name, shape))
        assert record.trainable(name) == parameters(allocation(name, shape), cost)
    for layer in range(5):
        assert record.weights("update_relative_norm", layer).min() > 0
    with pytest.raises(NotApplicable):
        record.weights("merge_loss", 0, "H")
    with pytest.raises(NotApplicable, match="no B at the gentle rate"):
        record.delta_nll("ood", "B")
    assert record.sweep("ood_nll")[0].tolist() == list(recipes.rates().sweep)
    swept = record.sweep("ood_nll")[1][list(recipes.rates().sweep).index(recipes.rates().gentle)]
    assert swept == pytest.approx(record.mean("ood_nll").sel(rate="gentle", configuration="A", seed=0).item())
    assert record.sampling_sizes == {"id_problem": 3, "ood_problem": 3, "text": record.data.sizes["text"]}
    assert record.band("id_gains").sizes["bound"] == 2
    assert "id_gains" in record.profiles


def test_other_subjects_have_no_adapters(workshop):
    other = replace(subject(), facts=replace(subject().facts, name="another"))
    with pytest.raises(NotApplicable, match="no recipe adapts another"):
        measuring.measure(other, random_corpus(), QUICK, Sweep())


def test_without_peft_nothing_is_measured(workshop, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(NotApplicable, match=r"adapters need peft: pip install"):
        measuring.measure(subject(), random_corpus(), QUICK, Sweep())


def test_a_specimen_is_whole_or_absent(workshop):
    one = recipes.recipe("arithmetic-competence")

    def interrupted():
        with specimens.building(one) as folder:
            (folder / "adapter_model.safetensors").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in workshop.iterdir() if path.is_dir()] == []
    assert specimens.manifest() == {}
    assert specimens.problem(one) == "is not here"
    make(one)
    assert specimens.problem(one) is None
    assert specimens.require([one.name]) == {one.name: workshop / one.name}


def test_what_is_not_as_the_manifest_says_is_not_used(workshop):
    one = recipes.recipe("arithmetic-competence")
    make(one)
    assert specimens.problem(replace(one, steps=3)) == "was made by another recipe"
    with open(workshop / one.name / "adapter_model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(NotApplicable, match=r"has another adapter_model\.safetensors than the manifest says"):
        specimens.require([one.name])


def test_the_same_recipe_makes_the_same_adapter(workshop):
    one = recipes.recipe("arithmetic-competence")
    made = []
    for _ in range(2):
        make(one)
        made.append((workshop / one.name / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_thinking_specimen_is_made(workshop):
    one = recipes.recipe("smollm2-135m-think")
    make(one)
    log = specimens.training_log(one.name)
    assert log["recipe"]["task"] == "thinking"
    assert len(log["losses"]) == 2
    assert log["test"] == {"items": 3, "closed": 0, "right": 0}


def test_greedy_answers_do_not_depend_on_their_neighbours():
    """Padding on the left is masked: a prompt beside a longer one is continued as it is alone."""
    model = tiny("llama", vocab_size=300)
    prompts = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3), (40, 41)]
    together = answers.greedy(model, byte_tokenizer(), prompts, 6)
    assert together == [answers.greedy(model, byte_tokenizer(), [prompt], 6)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_a_checkpoint_is_the_adapted_model(workshop, tmp_path):
    one = recipes.recipe("arithmetic-competence")
    make(one)
    folder = save_merged(subject(), [one.name], tmp_path / "model")
    again = load(facts_of_folder(folder, Local(folder), "again"), "float32")
    adapted = subject()
    lora.merge(adapted.decoder, lora.read_factors(adapted.decoder, workshop / one.name))
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(again.model(ids).logits, adapted.model(ids).logits)
    assert not torch.equal(adapted.model(ids).logits, subject().model(ids).logits)
    assert again.tokenizer("a7")["input_ids"] == byte_tokenizer()("a7")["input_ids"]
    with pytest.raises(UserError, match="is there already"):
        write_checkpoint(one, folder)
    with pytest.raises(UserError, match="python -m lab train smollm2-135m-think"):
        write_checkpoint(recipes.recipe("smollm2-135m-think"), tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smollm2-135m-thnk",), "did you mean smollm2-135m-think?"),
        (("spectral-peft", "--checkpoint", "model"), "name one specimen"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *arguments])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_a_changed_base_changes_the_recipe(workshop):
    before = recipes.recipe("spectral-peft-A-0.0001-0").digest
    path = recipes.path()
    path.write_text(path.read_text().replace('task = "competence"', 'task = "novel"'))
    recipes._document.cache_clear()
    assert recipes.recipe("spectral-peft-A-0.0001-0").digest != before


def test_names_of_runs_are_read_back():
    for run in runs(EXPERIMENT.budgets["full"], recipes.rates()):
        found = recipes.recipe(run.name)
        assert Run(found.configuration, found.learning_rate, found.seed) == run
    assert recipes.rates().aggressive == pytest.approx(40 * recipes.rates().gentle)
    assert recipes.rates().gentle in recipes.rates().sweep


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-thnk", "did you mean smollm2-135m-think"),
        ("spectral-peft-Z-0.0001-0", "did you mean spectral-peft-A-0.0001-0"),
    ],
)
def test_an_unknown_name_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        sets.members(name)


def test_sets_name_what_the_budgets_evaluate():
    counts = {name: len(sets.members(name)) for name in ("spectral-peft", "spectral-peft-rates", "spectral-peft-full")}
    assert list(counts.values()) == [8, 4, 12 * 3 + 6 + 3]


def test_bases_are_trained_first_and_what_is_here_is_not_trained_again(workshop, monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(making, "make", lambda one, device, report: asked.append(one.name))
    monkeypatch.setattr(rates, "text_rises", lambda device, report: {5e-5: 0.001, 1e-4: 0.015, 2e-4: 0.03})
    found = sets.train(["spectral-peft-rates"], "cpu", told.append)
    assert asked[0] == "arithmetic-competence"
    assert asked[1:] == [path.name for path in found]
    assert told[-1] == "the gentle rate of the recipes, 0.0001, is the largest within 0.02 nat"
    monkeypatch.setattr(specimens, "problem", lambda one: None)
    asked.clear()
    sets.train(["spectral-peft-rates"], "cpu", told.append)
    assert asked == []
    sets.train(["spectral-peft-rates"], "cpu", told.append, again=True)
    assert asked == [path.name for path in found]


def test_the_gentle_rate_is_the_largest_that_keeps_other_text():
    assert rates.gentle({1e-4: 0.01, 2e-4: 0.02, 4e-4: 0.1}) == 2e-4
    assert rates.gentle({1e-4: 0.03}) is None
    assert "0.0002 is the largest within" in rates.verdict({1e-4: 0.01, 2e-4: 0.02})
    assert "no rate of the sweep is within" in rates.verdict({1e-4: 0.03})


def test_making_loads_the_subject_in_float32_on_its_own_grid(workshop, monkeypatch):
    given = {}

    def load(facts, dtype, device):
        given.update(dtype=dtype, device=device)
        return subject()

    monkeypatch.setattr(making, "load", load)
    monkeypatch.setattr(making, "facts", lambda name: SimpleNamespace(name=name))
    lines = []
    folder = making.make(recipes.recipe("spectral-peft-H-0.0001-0"), "cpu", lines.append)
    assert given == {"dtype": "bfloat16", "device": "cpu"}
    assert folder.is_dir()
    assert specimens.problem(recipes.recipe("arithmetic-competence")) is None
    assert any("tokens/s" in line for line in lines)
