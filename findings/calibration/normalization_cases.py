"""What the calibration of T-15 measures: a budget that leaves nothing out, on texts of eight lengths."""

import json

from lab.experiments.surgery.normalization import Budget, Normalization, measure
from lab.normalization.settings import Training
from lab.store import Sweep
from lab.subjects.tiny import loaded, random_corpus

LENGTHS = ((7, 15), (4, 9), (9, 13), (3, 12), (5, 11), (4, 14), (6, 9), (5, 8))
BUDGET = Budget(
    prompts=None,
    tokens=None,
    calibration_prompts=None,
    groups=(1, 4, 5, 8),
    removals=("identity", "frozen_scale", "frozen_scale_first_exact"),
    sites_separately=True,
    head_dtype="float32",
    training=Training(steps=(2,), learning_rate=1e-2),
)


def record_of(model, budget=BUDGET, corpus=None):
    data = measure(loaded(model), corpus or random_corpus(LENGTHS), budget, Sweep())
    named = {"subject": "tiny", "source": "measured", "condition": "full-float32"}
    return Normalization(data.assign_attrs(named, provenance=json.dumps({"settings": json.loads(data.settings)})))
