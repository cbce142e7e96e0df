"""The series of trials on SmolLM2, and the table of what they found (`data/alarms.json`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.alarms import changes, circumstances
from lab.alarms.trial import Variation
from lab.corpora.fields import Fields
from lab.errors import UserError
from lab.experiments.layers import activation_patching, layer_knockout, layer_swap_cost, logit_lens
from lab.snapshots.drift import Move

SUBJECT = "smollm2-135m-instruct"
#: Far less text than the quick budget reads: averages are noisier, a share of five tokens moves in fifths, and an
#: alarm goes off sooner. That is strict with circumstances and lenient with changes: one whose alarms all come from
#: rare token classes has not been told from another kernel's rounding.
PROMPTS = 7
BUDGETS: Mapping[str, Any] = {
    "logit_lens": logit_lens.Budget(prompts=PROMPTS, tokens=None, stride=5, batch_tokens=2048),
    "layer_knockout": layer_knockout.Budget(
        prompts=4, tokens=24, pair_prompts=1, pair_tokens=24, block_sizes=(1, 2), batch_tokens=2048
    ),
    "layer_swap_cost": layer_swap_cost.Budget(
        prompts=2, tokens=12, context_stride=6, move_layers=3, swap_groups=2, batch_tokens=256
    ),
    "activation_patching": activation_patching.Budget(pairs=2),
}
CIRCUMSTANCES: Mapping[str, Variation] = {
    "one thread": circumstances.threads(1),
    "batches a quarter as large": circumstances.batches(1 / 4),
    "batches four times as large": circumstances.batches(4),
    "prompts in another order": circumstances.shuffled,
    "native bfloat16 products": circumstances.native_products,
}
#: circumstance, experiment; activation patching reads minimal pairs, whose order is not the corpus's
QUIET_TRIALS = [
    (circumstance, experiment)
    for circumstance, variation in CIRCUMSTANCES.items()
    for experiment in BUDGETS
    if not (variation is circumstances.shuffled and experiment == "activation_patching")
]
CHANGES: Mapping[str, Variation] = {
    "1 % noise on the weights of layer 1": changes.noise(1),
    "1 % noise on the weights of layer 15": changes.noise(15),
    "layers 14 and 15 exchanged": changes.exchanged(14),
    "final norm gain x 1.02": changes.scaled_final_norm(1.02),
    "weights rounded to 8 bits per output": changes.requantized(8),
    "weights rounded to 4 bits in groups of 32": changes.requantized(4, 32),
    "targets looked up at their own position": changes.own_position,
    "first completion token not scored": changes.late_completions,
    "system message dropped": changes.without_system_message,
}
ANOTHER_TORCH = "torch"  #: of circumstances that are another version's, the first word of the name

TABLE = paths.DATA / "alarms.json"
WHAT = "table of alarms"


@dataclass
class Table:
    """What the trials found.

    Attributes:
        libraries: versions that the unvaried trials were measured under.
        quiet: circumstance -> experiment -> quantity -> largest deviation, in tolerances.
        loud: change -> experiment -> the numbers that moved farthest, each quantity once, in tolerances.
    """

    libraries: dict[str, str] = field(default_factory=dict)
    quiet: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    loud: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def note_circumstance(self, circumstance: str, experiment: str, moves: Mapping[str, Move]) -> None:
        """Keep every quantity's largest deviation."""
        shares = {name: _rounded(move.share) for name, move in sorted(moves.items())}
        self.quiet.setdefault(circumstance, {})[experiment] = shares

    def note_change(self, change: str, experiment: str, moves: Mapping[str, Move], shown: int = 3) -> None:
        """Keep the numbers that moved farthest, the farthest first."""
        farthest = sorted(moves.values(), key=lambda move: -move.share)[:shown]
        self.loud.setdefault(change, {})[experiment] = {move.text: _rounded(move.share) for move in farthest}

    def largest(self, experiment: str) -> dict[str, tuple[float, str]]:
        """Per quantity its largest deviation under any circumstance, and under which."""
        found: dict[str, tuple[float, str]] = {}
        for circumstance, of_experiments in self.quiet.items():
            for quantity, share in of_experiments.get(experiment, {}).items():
                found[quantity] = max(found.get(quantity, (-1.0, "")), (share, circumstance))
        return found

    def write(self, path: Path = TABLE) -> None:
        """Save the table."""
        parts = {"libraries": self.libraries, "circumstances": self.quiet, "changes": self.loud}
        files.write_text(path, json.dumps(parts, indent=1) + "\n")


def read(path: Path = TABLE) -> Table:
    """The recorded table; an empty one if nothing was recorded.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return Table()
    content = Fields(files.read_json(path, WHAT), f"{WHAT} {path}")
    parts = [content.mapping(name) for name in ("libraries", "circumstances", "changes")]
    for part, depth in zip(parts, (1, 3, 3), strict=True):
        if not _is_nested(part, depth):
            raise UserError(f"the {WHAT} {path} is not what `make alarms` writes; restore it")
    return Table(*parts)


def _is_nested(tree: Any, depth: int) -> bool:
    """Whether objects lie in objects, so many deep, and then words or numbers."""
    if depth == 0:
        return isinstance(tree, (str, int, float))
    return isinstance(tree, dict) and all(_is_nested(branch, depth - 1) for branch in tree.values())


def _rounded(share: float) -> float:
    return float(f"{share:.3g}")
