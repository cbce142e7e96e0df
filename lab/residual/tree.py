"""Prefix trees of layer programs, and the order in which their edges are run.

Programs that begin alike share a path from the root; every edge is one application of a layer. The
frontier of the walk is a set of edges whose states are waiting for their layer. It is served like an
elevator: always the next layer upwards that anybody waits for, then back down to the lowest. Skips
then need one sweep, swaps three, a permutation with m descents m + 1, and all states that wait for
a layer go through it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lab.residual.programs import Program, Step, normalised


@dataclass(eq=False)
class Node:
    """A state of the residual stream: what a common beginning of some programs leaves.

    Attributes:
        rank: position in depth-first order; neighbours in rank share most of their path.
        children: the steps that lead on.
        programs: indices of the programs that end here.
    """

    rank: int = 0
    children: dict[Step, Node] = field(default_factory=dict)
    programs: list[int] = field(default_factory=list)

    def descendants(self) -> Iterator[Node]:
        """All nodes below, depth first."""
        waiting = list(reversed(self.children.values()))
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children.values())


def prefix_tree(programs: Sequence[Program]) -> Node:
    """The tree of these programs; programs that apply the same layers end in the same node."""
    root = Node()
    for index, program in enumerate(programs):
        node = root
        for step in normalised(program):
            node = node.children.setdefault(step, Node())
        node.programs.append(index)
    for rank, node in enumerate(root.descendants()):
        node.rank = rank
    return root


def layer_applications(root: Node) -> int:
    """Number of times that a layer, or a variant of one, is applied to the states of a batch."""
    return sum(_layers_below(node) for node in (root, *root.descendants()))


def _layers_below(node: Node) -> int:
    return sum(step.layer is not None for step in node.children)


@dataclass(eq=False)
class Edge:
    """A step to be applied to a state [B, T, d], and the node that it leads to."""

    state: Tensor
    step: Step
    node: Node


class Frontier:
    """Edges that wait for their layer, served in elevator order."""

    def __init__(self, edges: list[Edge], cursor: int = 0):
        self.edges = edges
        self.cursor = cursor

    def next_group(self) -> list[Edge]:
        """The edges to run next: all that wait for the same layer, or for the same variant of it."""
        chosen = min(self.edges, key=self._distance).step
        return [edge for edge in self.edges if (edge.step.layer, edge.step.variant) == (chosen.layer, chosen.variant)]

    def replace(self, group: list[Edge], following: list[Edge]) -> None:
        """Take out edges that have run, move the cursor to their layer and add the edges that follow."""
        done = set(map(id, group))
        self.edges = [edge for edge in self.edges if id(edge) not in done] + following
        layer = group[0].step.layer
        self.cursor = self.cursor if layer is None else layer

    def split(self) -> tuple[Frontier, Frontier]:
        """Two halves in depth-first order, so that edges of one subtree stay together."""
        edges = sorted(self.edges, key=lambda edge: edge.node.rank)
        middle = (len(edges) + 1) // 2
        return Frontier(edges[:middle], self.cursor), Frontier(edges[middle:], self.cursor)

    def _distance(self, edge: Edge) -> tuple[bool, int, str]:
        # A step without a layer only edits: it is done at once, wherever the elevator is.
        layer = self.cursor if edge.step.layer is None else edge.step.layer
        return layer < self.cursor, layer, edge.step.variant or ""
