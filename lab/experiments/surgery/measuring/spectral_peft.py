"""How T-18 measures: adapters are put on the competent model one after the other, and read on exercises and text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from threadpoolctl import threadpool_limits

from lab.adapters import lora, updates
from lab.adapters.allocations import MATRICES, parameters
from lab.corpora import arithmetic
from lab.corpora.batches import TokenText
from lab.corpora.corpus import Corpus, token_text
from lab.corpora.exercises import Exercise, worked_exercises
from lab.errors import NotApplicable
from lab.experiments.surgery.spectral_peft import RATES, Budget, Run, runs
from lab.records import variable
from lab.store import Arrays, Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.loading import LoadedSubject
from lab.training import recipes, specimens
from lab.training.evaluation import exercise_readings, target_readings

SPLITS = ("id", "ood")
AT_ONCE = 8  #: layers of weights, each with its copies in float64
RUN = ("rate", "configuration", "seed")
WEIGHTS = ("rate", "configuration", "layer", "matrix")
#: name -> unit and description of what is read of every run, and of the model before training
READ = {
    "id_nll": ("id_problem", "nat/token", "loss on the digits of results, in distribution"),
    "ood_nll": ("ood_problem", "nat/token", "loss on the digits of results, out of distribution"),
    "id_accuracy": ("id_problem", "1", "1 where every token of the solution is the first choice, in distribution"),
    "ood_accuracy": (
        "ood_problem",
        "1",
        "1 where every token of the solution is the first choice, out of distribution",
    ),
    "text_loss": ("text", "nat/token", "loss on completions of unrelated text"),
    "full_text_loss": ("text", "nat/token", "loss on unrelated text, template and prompt included, as published"),
}
CHANGES = {
    "update_relative_norm": "norm of the update over that of the weight",
    "merge_loss": "share of the update that merging in bfloat16 destroys",
    "merge_unchanged_fraction": "share of the weights that merging in bfloat16 leaves where they are",
    "effective_rank_ratio_change": "effective rank ratio with the update minus without, unmerged",
    "subspace_overlap_left": "share of the update in the weight's leading left directions (5 % of min(shape))",
    "subspace_overlap_right": "share of the update in the weight's leading right directions",
}
Adapters = Mapping[Run, Mapping[lora.Place, lora.Factors]]


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.surgery.spectral_peft.measure`."""
    family, rates = recipes.family(), recipes.rates()
    if subject.facts.name != family["subject"]:
        raise NotApplicable(f"no recipe adapts {subject.facts.name}; the adapters of T-18 are {family['subject']}'s")
    if not lora.is_available():
        raise NotApplicable(lora.NEED)
    planned = runs(budget, rates)
    folders = specimens.require([family["base"], *(run.name for run in planned)], remedy=budget.specimens)
    decoder = subject.decoder
    material = _Material(subject, corpus, budget)
    adapters = {run: lora.read_factors(decoder, folders[run.name]) for run in planned}
    with lora.merged(decoder, lora.read_factors(decoder, folders[family["base"]])):
        readings = _readings(decoder, material, folders, list(planned), sweep)
        weights = _weights(decoder, {run: adapters[run] for run in planned if run.seed == 0 and planned[run][0]}, sweep)
    assembly = _Assembly(planned, readings, weights, adapters, decoder, material)
    return assembly.dataset(
        {
            "rank_scale": family["rank_scale"],
            "rates": asdict(rates),
            "base": family["base"],
            "steps": family["steps"],
            "batch": family["batch"],
            "warmup_steps": family["warmup"],
            "prefix_kept": False,
            "trained_on": sorted({log["device"] for log in assembly.logs.values()}),
        }
    )


class _Material:
    """What adapters are read on: the first problems of either split, and unrelated text."""

    def __init__(self, subject: LoadedSubject, corpus: Corpus, budget: Budget):
        splits = arithmetic.splits("competent")
        self.exercises: dict[str, list[Exercise]] = {
            name: worked_exercises(subject.tokenizer, splits[name].worked[: budget.problems]) for name in SPLITS
        }
        self.texts, self.completions = _texts(corpus, budget.text_tokens)
        self.batch_tokens = budget.batch_tokens

    @property
    def weights(self) -> dict[str, xr.Variable]:
        """Scored tokens of each text, of its completion and of all."""
        completion = [len(chosen) for chosen in self.completions]
        full = [len(text.targets) for text in self.texts]
        return {
            "text_tokens": variable("text", completion, "token", "scored tokens of the completion"),
            "full_text_tokens": variable("text", full, "token", "tokens of the whole text but the first"),
        }


def _texts(corpus: Corpus, tokens: int) -> tuple[list[TokenText], list[tuple[int, ...]]]:
    """Whole texts with every token but the first as target, until so many completion tokens; and which those are."""
    texts, completions, total = [], [], 0
    for text in corpus.texts:
        if total >= tokens:
            break
        scored = token_text(text)
        if scored.targets:
            texts.append(TokenText(scored.ids, tuple(range(1, len(scored.ids)))))
            completions.append(scored.targets)
            total += len(scored.targets)
    return texts, completions


def _readings(
    decoder: Decoder, material: _Material, folders: Mapping[str, Path], planned: Sequence[Run], sweep: Sweep
) -> dict[Run | None, Arrays]:
    """What is read of every run, and of the model before training (None)."""
    found: dict[Run | None, Arrays] = {None: sweep.shard("before training", partial(_read, decoder, material))}
    sweep.progress(1, len(planned) + 1, "adapters")
    for number, run in enumerate(planned, 2):
        found[run] = sweep.shard(run.name, partial(_read_adapted, decoder, material, folders[run.name]))
        sweep.progress(number, len(planned) + 1, "adapters")
    return found


def _read_adapted(decoder: Decoder, material: _Material, folder: Path) -> Arrays:
    with lora.attached(decoder, folder):
        return _read(decoder, material)


def _read(decoder: Decoder, material: _Material) -> Arrays:
    found: Arrays = {}
    for split, exercises in material.exercises.items():
        read = exercise_readings(decoder, exercises, material.batch_tokens)
        found |= {f"{split}_{name}": values for name, values in read.items()}
    losses = [loss for loss, _ in target_readings(decoder, material.texts, material.batch_tokens)]
    # the target at index t is the (t - 1)th: all but the first are scored
    completions = [loss[np.array(chosen) - 1].mean() for loss, chosen in zip(losses, material.completions, strict=True)]
    return found | {"text_loss": np.array(completions), "full_text_loss": np.array([loss.mean() for loss in losses])}


def _weights(decoder: Decoder, adapters: Adapters, sweep: Sweep) -> list[Arrays]:
    """Of each layer: effective rank ratios before [matrix], shapes, and the changes by every run [run, matrix]."""
    maps, done = lora.adapted_maps(decoder), itertools.count(1)

    def of_layer(layer: int) -> Arrays:
        found = sweep.shard(f"weights {layer}", partial(_of_layer, maps, adapters, layer))
        sweep.progress(next(done), decoder.n_layers, "layers of weights")
        return found

    # Eigenvectors of matrices this small gain nothing from a second core: a layer for each instead.
    with threadpool_limits(1), ThreadPoolExecutor(min(AT_ONCE, torch.get_num_threads())) as pool:
        return list(pool.map(of_layer, range(decoder.n_layers)))


def _of_layer(maps: Mapping[lora.Place, Any], adapters: Adapters, layer: int) -> Arrays:
    before = np.empty(len(MATRICES))
    changes = {name: np.full((len(adapters), len(MATRICES)), np.nan) for name in CHANGES}
    for column, matrix in enumerate(MATRICES):
        study = updates.WeightUnderStudy(maps[layer, matrix].weight.detach().float().cpu().numpy())
        before[column] = study.effective_rank_ratio
        for row, factors in enumerate(adapters.values()):
            if (layer, matrix) in factors:
                for name, value in study.changed_by(factors[layer, matrix]).items():
                    changes[name][row, column] = value
    return {"before": before, **changes}


class _Assembly:
    """Puts what was read of single runs into arrays by rate, configuration and seed."""

    def __init__(
        self,
        planned: Mapping[Run, tuple[str | None, bool]],
        readings: Mapping[Run | None, Arrays],
        weights: Sequence[Arrays],
        adapters: Adapters,
        decoder: Decoder,
        material: _Material,
    ):
        self.planned, self.readings, self.weights, self.adapters = planned, readings, weights, adapters
        self.maps, self.material, self.n_layers = lora.adapted_maps(decoder), material, decoder.n_layers
        named = [run for run, (rate, _) in planned.items() if rate]
        self.configurations = list(dict.fromkeys(run.configuration for run in named))
        self.seeds = sorted({run.seed for run in named})
        self.logs = {run: specimens.training_log(run.name) for run in planned}

    def dataset(self, settings: dict[str, Any]) -> xr.Dataset:
        """The record; `settings` become part of its provenance."""
        variables = {**self._read(), **self._training(), **self._of_weights(), **self._sweep(), **self.material.weights}
        coords = {
            "rate": list(RATES),
            "configuration": self.configurations,
            "seed": self.seeds,
            "layer": np.arange(self.n_layers),
            "matrix": list(MATRICES),
        }
        swept = [run.learning_rate for run, (_, swept) in self.planned.items() if swept]
        if swept:
            coords["learning_rate"] = swept
        return xr.Dataset(variables, coords, {"settings": json.dumps(settings)})

    def _place(self, run: Run) -> tuple[int, int, int]:
        rate = self.planned[run][0]
        assert rate is not None
        return RATES.index(rate), self.configurations.index(run.configuration), self.seeds.index(run.seed)

    def _grid(self, values: Mapping[Run, Any], *more: int) -> np.ndarray:
        grid = np.full((len(RATES), len(self.configurations), len(self.seeds), *more), np.nan)
        for run, value in values.items():
            if self.planned[run][0]:
                grid[self._place(run)] = value
        return grid

    def _read(self) -> dict[str, xr.Variable]:
        found = {}
        for name, (dimension, unit, description) in READ.items():
            weights = {"weights": "full_text_tokens"} if name == "full_text_loss" else {}
            before = self.readings[None][name]
            after = self._grid({run: self.readings[run][name] for run in self.planned}, len(before))
            found[name] = variable((*RUN, dimension), after, unit, description, **weights)
            found[f"base_{name}"] = variable(dimension, before, unit, f"{description}, before training", **weights)
        return found

    def _training(self) -> dict[str, xr.Variable]:
        loss, seconds = ({run: log[name] for run, log in self.logs.items()} for name in ("train_loss", "seconds"))
        return {
            "train_loss": variable(RUN, self._grid(loss), "nat/token", "mean training loss over all steps"),
            "train_seconds": variable(RUN, self._grid(seconds), "s", "time that training took where it ran"),
        }

    def _ranks(self) -> np.ndarray:
        ranks = np.zeros((len(self.configurations), self.n_layers, len(MATRICES)), dtype=int)
        for run, factors in self.adapters.items():
            for (layer, matrix), one in factors.items():
                ranks[self.configurations.index(run.configuration), layer, MATRICES.index(matrix)] = len(one.down)
        return ranks

    def _of_weights(self) -> dict[str, xr.Variable]:
        ranks = self._ranks()
        shapes = np.array(
            [[self.maps[layer, name].weight.shape for name in MATRICES] for layer in range(self.n_layers)]
        )
        counts = [parameters(one, shapes.sum(-1)) for one in ranks]
        before = np.array([layer["before"] for layer in self.weights])
        named = [run for run in self.adapters if run.seed == 0 and self.planned[run][0]]
        found = {
            "rank": variable(
                ("configuration", "layer", "matrix"), ranks, "1", "rank of the adapter; 0 where there is none"
            ),
            "trainable_parameters": variable("configuration", counts, "1", "parameters of the adapter"),
            "rows": variable("matrix", shapes[0, :, 0], "1", "output features of the weight"),
            "columns": variable("matrix", shapes[0, :, 1], "1", "input features of the weight"),
            "effective_rank_ratio_before": variable(
                ("layer", "matrix"), before, "1", "participation ratio of squared singular values over min(shape)"
            ),
        }
        for name, description in CHANGES.items():
            grid = np.full((len(RATES), len(self.configurations), self.n_layers, len(MATRICES)), np.nan)
            for row, run in enumerate(named):
                grid[self._place(run)[:2]] = [layer[name][row] for layer in self.weights]
            found[name] = variable(WEIGHTS, grid, "1", f"{description}; seed 0")
        return found

    def _sweep(self) -> dict[str, xr.Variable]:
        swept = [run for run, (_, swept) in self.planned.items() if swept]
        found = {}
        for name, (dimension, unit, description) in READ.items() if swept else ():
            weights = {"weights": "full_text_tokens"} if name == "full_text_loss" else {}
            values = [self.readings[run][name] for run in swept]
            found[f"sweep_{name}"] = variable(
                ("learning_rate", dimension), values, unit, f"{description}, A at the rates of the sweep", **weights
            )
        return found
