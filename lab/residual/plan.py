"""What is to be run for some layer programs, whatever the batch: made once for all batches of a sweep."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lab.errors import UserError
from lab.residual.programs import Program, Step
from lab.residual.tree import Node, layer_applications, prefix_tree


@dataclass(frozen=True)
class Plan:
    """Layer programs as trees; these hold no states.

    Attributes:
        programs: in the order of their results.
        trees: one for all programs, or one for each.
        steps: that occur in any program.
        layer_applications: of all trees.
    """

    programs: tuple[Program, ...]
    trees: tuple[Node, ...]
    steps: frozenset[Step]
    layer_applications: int

    @property
    def is_own(self) -> bool:
        """Whether nothing but the model's own layers is applied, to the stream as it is."""
        return all(step.is_own for step in self.steps)

    def require_known(self, n_layers: int, variants: Collection[str], edits: Collection[str]) -> None:
        """Raise a `UserError` if a program names what an executor does not know."""
        for step in self.steps:
            if step.layer is not None and not 0 <= step.layer < n_layers:
                raise UserError(f"a program names layer {step.layer}; the model has layers 0 to {n_layers - 1}")
            for kind, name, known in (("variant", step.variant, variants), ("edit", step.edit, edits)):
                if name is not None and name not in known:
                    names = ", ".join(sorted(known)) or "none"
                    raise UserError(f"a program names the {kind} {name!r}; the executor knows {names}")


def planned(programs: Sequence[Program], *, share_prefixes: bool) -> Plan:
    """The plan for these programs, which share their common beginnings or run alone."""
    trees = [prefix_tree(programs)] if share_prefixes else list(map(_alone, range(len(programs)), programs))
    steps = frozenset(step for program in programs for step in program)
    return Plan(tuple(programs), tuple(trees), steps, sum(map(layer_applications, trees)))


def _alone(index: int, program: Program) -> Node:
    root = prefix_tree([program])
    for node in (root, *root.descendants()):
        node.programs = [index] * len(node.programs)
    return root
