"""Specimens on a tiny model: from recipe to adapter to record, whole or absent, and told apart by their digests."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import cli
from lab.adapters import lora
from lab.adapters.adapted_weights import AGGRESSIVE, GENTLE
from lab.adapters.allocations import Shape, allocation, parameters
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.errors import NotApplicable, UserError
from lab.experiments.surgery.measuring import spectral_peft as measuring
from lab.experiments.surgery.spectral_peft import EXPERIMENT, Budget, Run, SpectralPeft, runs
from lab.store import Sweep
from lab.subjects import catalog, fetching, weights
from lab.subjects.configuration import facts_of_folder
from lab.subjects.facts import Adapted, Local
from lab.subjects.loading import load
from lab.subjects.tiny import loaded, random_corpus, tiny
from lab.training import answers, making, rates, recipes, sets, specimens
from lab.training.checkpoints import save_merged, write_checkpoint

pytestmark = pytest.mark.calibration

QUICK = Budget(
    gentle=("A", "B_matched", "spectral", "F", "H"),
    aggressive=("A", "H"),
    seeds=(0,),
    sweep=True,
    problems=3,
    text_tokens=20,
    specimens="spectral-peft",
)


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


@pytest.fixture
def sibling(workshop, tmp_path, monkeypatch):
    """A catalogued subject that is a tiny model with a specimen merged into it."""
    path = tmp_path / "tiny"
    subject().model.save_pretrained(path)
    subject().tokenizer.save_pretrained(path)
    base = facts_of_folder(path, Local(path), "tiny")
    monkeypatch.setitem(catalog.catalog(), "tiny", base)
    return replace(base, name="sibling", source=Adapted("tiny", "arithmetic-competence"))


def test_a_sibling_is_made_from_its_base_and_an_adapter(sibling, workshop):
    with pytest.raises(UserError, match=r"the adapter arithmetic-competence is not here; make it with `python -m lab"):
        fetching.fetch(sibling)
    make(recipes.recipe("arithmetic-competence"))
    assert weights.location(sibling) is None
    folder = fetching.fetch(sibling)
    assert folder == weights.location(sibling) == fetching.fetch(sibling)
    again, base = load(sibling, "float32"), load(catalog.facts("tiny"), "bfloat16")
    lora.merge(base.decoder, lora.read_factors(base.decoder, workshop / "arithmetic-competence"))
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(again.model(ids).logits, base.model.float()(ids).logits)


def test_another_adapter_is_another_sibling(sibling, workshop):
    """What was merged earlier is not taken for a model that the adapter of today makes."""
    make(recipes.recipe("arithmetic-competence"))
    before = fetching.fetch(sibling)
    with open(workshop / "arithmetic-competence" / "adapter_model.safetensors", "ab") as file:
        file.write(b"\0")
    assert weights.location(sibling) is None
    assert weights.adapted_folder(sibling) != before


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
        ("spectral-peft-Z-0.0004-0", "did you mean spectral-peft-A-0.0004-0"),
    ],
)
def test_an_unknown_name_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        sets.members(name)


def test_sets_name_what_the_budgets_evaluate():
    counts = {name: len(sets.members(name)) for name in ("spectral-peft", "spectral-peft-rates", "spectral-peft-full")}
    assert list(counts.values()) == [8 + 3, 4, 12 * 3 + 6 + 3]


def test_bases_are_trained_first_and_what_is_here_is_not_trained_again(workshop, monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(making, "make", lambda one, device, report: asked.append(one.name))
    rises = {5e-5: 0.001, recipes.rates().gentle: 0.015, 1: 0.03}
    monkeypatch.setattr(rates, "text_rises", lambda device, report: rises)
    found = sets.train(["spectral-peft-rates"], "cpu", told.append)
    assert asked[0] == "arithmetic-competence"
    assert asked[1:] == [path.name for path in found]
    assert re.fullmatch(r"the gentle rate of the recipes, [\d.e-]+, is the largest within 0.02 nat", told[-1])
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
