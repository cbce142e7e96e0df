"""Training and evaluation of adapters on tiny models: what falls, what stays and what repeats."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.adapters import lora
from lab.corpora.arithmetic import splits
from lab.corpora.batches import TokenText, token_batches
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.corpora.exercises import Exercise, worked_exercises
from lab.errors import UserError
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import tiny
from lab.training import loop
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
