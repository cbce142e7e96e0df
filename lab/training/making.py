"""Making a specimen: its base is loaded, its adapter trained, and everything saved at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from lab import files
from lab.adapters import lora
from lab.adapters.allocations import allocation
from lab.corpora import arithmetic, thinking
from lab.corpora.batches import TokenText
from lab.corpora.exercises import thinking_exercises, worked_exercises
from lab.corpora.prompts import load_prompts
from lab.subjects.catalog import facts
from lab.subjects.loading import LoadedSubject, load
from lab.training import loop, specimens
from lab.training.answers import scores_of
from lab.training.recipes import Recipe, recipe

WEIGHTS, STATES = "bfloat16", "float32"  #: weights as they are studied; products as fast, and states exact, in float32
NEED_SPECTRA = ("spectral", "inverse")
Report = Callable[[str], None]


def make(one: Recipe, device: str = "cpu", report: Report = lambda line: None) -> Path:
    """Train a specimen, and first what it builds on if that is not here; returns its folder.

    Raises:
        UserError: the subject's weights are not here, peft is not installed, or training diverged.
    """
    if one.base is not None and specimens.problem(recipe(one.base)) is not None:
        make(recipe(one.base), device, report)
    subject = load(facts(one.subject), WEIGHTS, device)
    subject.model.float()
    with specimens.building(one) as folder:
        trained(subject, one, folder, report)
    return specimens.folder(one.name)


def trained(subject: LoadedSubject, one: Recipe, folder: Path, report: Report = lambda line: None) -> None:
    """Train a recipe's adapter on a loaded subject and write it to a folder, with a log of the training."""
    decoder = subject.decoder
    if one.base is not None:
        lora.merge(decoder, lora.read_factors(decoder, specimens.folder(one.base)))
    ranks = allocation(
        one.configuration, lora.shape_of(decoder, one.rank_scale, spectra=one.configuration in NEED_SPECTRA)
    )
    texts = texts_of(one, subject)
    settings = loop.Settings(one.learning_rate, one.steps, one.batch, one.warmup, one.seed)
    with lora.fresh_adapter(decoder, ranks, one.seed) as model:
        parameters = lora.trainable_parameters(model)
        report(f"{one.name}: {sum(map(torch.numel, parameters)):,} parameters, {one.steps} steps of {one.batch}")
        log = loop.train(decoder, parameters, texts, settings, _reporting(one, report))
        lora.save_adapter(model, folder, one.subject)
        scores = scores_of(subject, load_prompts().system_message) if one.task == "thinking" else {}
    note = {
        "recipe": asdict(one),
        "trainable_parameters": sum(map(torch.numel, parameters)),
        "train_loss": sum(log.losses) / len(log.losses),
        **asdict(log),
        "test": scores,
        "dtype": STATES,
        "device": decoder.device.type,
        "threads": torch.get_num_threads(),
        "libraries": {name: version(name) for name in ("torch", "transformers", "peft")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    files.write_text(folder / specimens.LOG, json.dumps(note, indent=1) + "\n")
    report(f"{one.name}: {log.seconds:.0f} s, {log.tokens / log.seconds:.0f} tokens/s, last loss {log.losses[-1]:.3f}")
    if scores:
        closed, right = (f"{scores[name]:.0%}" for name in ("closed", "right"))
        report(f"{one.name}: of {scores['items']} test items {closed} close the span and {right} are right")


def texts_of(one: Recipe, subject: LoadedSubject) -> list[TokenText]:
    """What a recipe's adapter learns, in the subject's tokens."""
    if one.task == "thinking":
        system = load_prompts().system_message
        found = thinking_exercises(subject.tokenizer, system, thinking.items("train"))
    else:
        regime: arithmetic.Regime = "novel" if one.task == "novel" else "competent"
        split = "competence" if one.task == "competence" else "train"
        found = worked_exercises(subject.tokenizer, arithmetic.splits(regime)[split].worked)
    return [exercise.text for exercise in found]


def _reporting(one: Recipe, report: Report) -> Callable[[int, float], None]:
    def line(done: int, loss: float) -> None:
        if done % 10 == 0 or done == one.steps:
            report(f"{one.name}: step {done} of {one.steps}, loss {loss:.3f}")

    return line
