"""Every experiment in a few seconds on a tiny decoder: full budgets, shrunk in what is a matter of size alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lab.corpora.corpus import Corpus
from lab.experiments import experiment
from lab.normalization.settings import NORM_TYPES, Bench, Training
from lab.subjects.tiny import random_corpus

LENGTHS = ((7, 15), (4, 9), (9, 13), (3, 12), (5, 11), (4, 14), (6, 9), (5, 8))
MANY = tuple((5 + index % 4, 9 + index % 5) for index in range(15))
CORPORA = {"linearization_gap": MANY, "layer_shuffle_recovery": ((7, 9), (5, 11)) * 5 + ((4, 6),)}
#: what of a full budget is a matter of size
SMALLER: dict[str, dict[str, Any]] = {
    "activation_patching": {"pairs": 3, "batch_tokens": 64},
    "layer_knockout": {"pair_prompts": 4},
    "linearization_gap": {
        "local_tokens": 4,
        "directions": 2,
        "rounded_directions": 2,
        "principal": 3,
        "iterated_prompts": 2,
        "ranks": (4, 16),
        "spectral_steps": 3,
        "power_steps": 2,
    },
    "contrastive_trajectories": {"families": 2, "batch_tokens": 64},
    "layer_shuffle_recovery": {
        "seeds": 1,
        "stages": ((1, 8), (2, 10)),
        "proposals": 12,
        "random_passes": 1,
        "bubble_sweeps": 1,
        "reinsertion_passes": 1,
        "largest_block": 2,
        "heldout_texts": 3,
        "heldout_tokens": 12,
    },
    "quantization": {"permutations": 2, "footprints": False},
    "normalization": {
        "training": Training(steps=(2,), learning_rate=1e-3),
        "bench": Bench(2, 1, 1, (64,), (8,), tuple(name for name in NORM_TYPES if name != "rms_norm_compiled")),
    },
}


def small_budget(name: str, **more: Any) -> Any:
    """The experiment's full budget on a tiny model; `more` overrides further settings."""
    return replace(experiment(name).budgets["full"], **SMALLER.get(name, {}) | more)


def small_corpus(name: str) -> Corpus:
    """Random texts that the experiment can be measured on."""
    return random_corpus(CORPORA.get(name, LENGTHS))
