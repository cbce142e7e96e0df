"""The executor: runs many layer programs at once, as a prefix tree, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.corpora.batches import TokenBatch
from lab.errors import UserError
from lab.memory import keep_freed_memory
from lab.residual.blocks import in_blocks
from lab.residual.compiled import compiled_layers
from lab.residual.plan import Plan, planned
from lab.residual.programs import Program, Step
from lab.residual.results import Results, Started
from lab.residual.tree import Edge, Frontier, Node
from lab.subjects import token_prefix
from lab.subjects.anatomy import Decoder
from lab.subjects.attention_kernels import avoid_plans_per_shape
from lab.subjects.calls import Captured
from lab.subjects.token_prefix import PrefixedCapture

#: `(states [k, B, T, d], batch) -> states [k, B, T, d]`; treats each of the k states alike, may work in place
Edit = Callable[[Tensor, TokenBatch], Tensor]
#: `(final states [k, B, T, d]) -> named results [k, ...]`
Readout = Callable[[Tensor], Mapping[str, Tensor]]
#: called as `report(done, total, what)` as the work proceeds
Report = Callable[[float, float, str], None]

#: Memory that a layer needs while it runs, in multiples of its input: normed copies in float32, queries, keys and
#: values, and an MLP of up to 5.4 times the width (Qwen2.5-0.5B) with gate, value and product.
ACTIVATIONS = 24
#: Tokens per layer call on a CPU: enough to keep the cores busy, few enough for activations to stay in the cache.
CPU_TOKENS = 2048
#: On a CUDA device with memory for this many states per program, states that run on stay views of their block: copies
#: took 44 ms and 11,328 launches of a knockout sweep of 2 s (a Qwen3-4B shape on an H200).
ROOMY = 8
CPU_BUDGET_BYTES = 2**30


@dataclass(frozen=True)
class Variant:
    """A module in the place of a decoder layer.

    Attributes:
        module: called as a decoder layer is: hidden state [k * B, T, d] first, which it must not write to, then the
            call arguments; returns the new hidden state, or a tuple that begins with it.
        layer: the layer whose call arguments it takes.
        calls: where they come from: None takes the model under study; `other.capture` of another
            `Decoder` gives a donor's layer the arguments that its own model would hand it.
    """

    module: Callable[..., object]
    layer: int
    calls: Callable[[Tensor], Captured] | None = None


class Executor:
    """Runs layer programs on batches of texts.

    Args:
        decoder: the model under study.
        variants: modules that programs may name in the place of a layer.
        edits: edits of the residual stream that programs may name.
        budget_bytes: memory for residual streams and for one layer's activations; None takes 1 GiB, or half of
            what a CUDA device has free. Three quarters hold states; one state takes B * T * d * itemsize bytes. If
            a tree needs more, it is walked in parts, subtree by subtree. Beyond the budget, one state per level
            of the tree may be held.
        share_prefixes: False runs every program alone, from the first layer: slow, for calibration.
        compiler: backend of `torch.compile` for the model's own layers where programs run them, see
            `lab.residual.compiled.layer_compiler`; None leaves them as they are.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        variants: Mapping[str, Variant] | None = None,
        edits: Mapping[str, Edit] | None = None,
        budget_bytes: int | None = None,
        share_prefixes: bool = True,
        compiler: str | None = None,
    ):
        self.decoder = decoder
        self.variants = dict(variants or {})
        self.edits = dict(edits or {})
        self.budget_bytes = budget_bytes or memory_budget(decoder.device)
        self.share_prefixes = share_prefixes
        self.compiler = compiler
        self._layers = decoder.layers if compiler is None else compiled_layers(decoder, decoder.layers, compiler)
        self._plan: Plan | None = None
        self._captured: tuple[Tensor, Tensor, Captured | PrefixedCapture] | None = None
        if decoder.device.type == "cuda":
            avoid_plans_per_shape()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None, "_captured": None}

    def run(
        self, batch: TokenBatch, programs: Sequence[Program], readout: Readout, report: Report | None = None
    ) -> dict[str, Tensor]:
        """Results of the readout for every program.

        Args:
            batch: texts.
            programs: of any lengths; the same program may occur twice and is run once.
            readout: reads the final states [k, B, T, d] (before the final norm) of k programs, in the model's dtype.
            report: progress callback; counts layer applications of this batch.

        Returns:
            Each result [n_programs, ...] in the order of the programs, on the CPU.

        Raises:
            UserError: a program names an unknown layer, variant or edit, or memory is too small for one state.
        """
        return self.start(batch, programs, readout, report).results()

    def start(
        self, batch: TokenBatch, programs: Sequence[Program], readout: Readout, report: Report | None = None
    ) -> Started:
        """Hand the work of `run` to the device; on a CPU it is done then.

        A CUDA device queues it, unless results are large or a readout looks at them, which takes until they are there.
        """
        plan = self._planned(programs)
        plan.require_known(self.decoder.n_layers, self.variants, self.edits)
        if len(batch.prefix) and not plan.is_own:
            raise ValueError("the prefix of these texts is put apart; variants and edits need it in its place")
        if self.decoder.device.type == "cpu":
            keep_freed_memory()
        walk = _Walk(self, batch.to(self.decoder.device), Results(len(programs)), readout, report)
        walk.total = plan.layer_applications
        for tree in plan.trees:
            walk.through(tree)
        return Started(self.decoder.device, walk.results, held=walk)

    def trace(self, batch: TokenBatch) -> Iterator[tuple[int, Tensor]]:
        """States of the intact model [B, T, d], one at a time: depth 0 is before the first layer, L after the last."""
        captured = self.capture(batch)
        state = captured.entry
        yield 0, captured.unpacked(state[None])[0].clone()  # what was captured is kept for who asks next
        for index, layer in enumerate(self.decoder.layers):
            with torch.no_grad():
                state = captured.apply(layer, state, index, 1)
            yield index + 1, captured.unpacked(state[None])[0]

    def intact(self, batch: TokenBatch) -> Tensor:
        """Final state of the intact model [B, T, d], before the final norm: the reference of KL and agreement."""
        for _, state in self.trace(batch):
            final = state  # one at a time is held
        return final

    def splits_prefix(self, programs: Sequence[Program]) -> bool:
        """Whether these programs are run with a common beginning of the texts put apart.

        They may on a CPU, where arithmetic is what takes the time (an accelerator would wait for twice the calls), if
        they apply the model's own layers and nothing else: a module in a layer's place may do without a cache, and an
        edit has positions of its own. Compiled layers would be compiled anew for it. And the layers must give the same
        so, see `lab.subjects.token_prefix`: in bfloat16 to the bit where it is tried, which leaves roundings
        in texts of other lengths.
        """
        if self.decoder.device.type != "cpu" or self.compiler is not None:
            return False
        return self._planned(programs).is_own and self.decoder.can_split_prefix

    def capture(self, batch: TokenBatch) -> Captured | PrefixedCapture:
        """What the model hands to its layers for this batch; kept until another batch comes.

        A batch is known by its tensors of ids. Nothing but layers may change in the model as long as it is kept.
        """
        kept = self._captured
        if kept is None or kept[0] is not batch.ids or kept[1] is not batch.prefix:
            captured = token_prefix.capture(self.decoder, batch.ids, batch.prefix)
            self._captured = kept = batch.ids, batch.prefix, captured
        return kept[2]

    def _planned(self, programs: Sequence[Program]) -> Plan:
        """The plan for these programs; the last one is kept, since a sweep asks for the same with every batch."""
        if self._plan is None or self._plan.programs != tuple(programs):
            self._plan = planned(programs, share_prefixes=self.share_prefixes)
        return self._plan


def memory_budget(device: torch.device) -> int:
    """Bytes that a sweep may take on a device: half of a CUDA device's free memory, elsewhere 1 GiB.

    The other half is left to logits, to kernels' workspaces, and to whoever shares the device. What PyTorch keeps of
    an earlier sweep is free too: else the shapes of blocks would depend on what ran before.
    """
    if device.type != "cuda":
        return CPU_BUDGET_BYTES
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (int(torch.cuda.mem_get_info(device)[0]) + kept) // 2


def _is_roomy(device: torch.device, programs: int, capacity: int) -> bool:
    """Whether a walk need not care how long a block of states stays alive."""
    return device.type == "cuda" and programs * ROOMY <= capacity


class _Walk:
    """One batch's way through the trees of its programs."""

    def __init__(
        self, executor: Executor, batch: TokenBatch, results: Results, readout: Readout, report: Report | None
    ):
        self.executor, self.batch, self.results = executor, batch, results
        self.readout, self.report = readout, report
        self.captured = executor.capture(batch)
        self.donors: dict[Callable[[Tensor], Captured], Captured] = {}
        self.finished: list[tuple[Node, Tensor]] = []
        self.done, self.total = 0, 0
        state_bytes = self.captured.entry.numel() * self.captured.entry.element_size()
        self.capacity = max(1, executor.budget_bytes * 3 // 4 // state_bytes)
        self.block = max(1, executor.budget_bytes // 4 // (ACTIVATIONS * state_bytes))
        self.is_roomy = _is_roomy(executor.decoder.device, len(results), self.capacity)
        if self.captured.entry.device.type == "cpu":
            tokens = self.captured.entry.shape[:-1].numel()
            self.block = max(1, min(self.block, CPU_TOKENS // tokens))

    @torch.no_grad()
    def through(self, root: Node) -> None:
        """Run every edge of the tree once, and read every final state."""
        self._finish(root, self.captured.entry)
        waiting = [Frontier(_following(root, self.captured.entry))]
        while waiting:
            frontier = waiting.pop()
            if not frontier.edges:
                continue
            group = frontier.next_group()
            if self._exceeds(frontier, group, waiting):
                if self.finished:
                    self._read_finished()
                elif len(frontier.edges) > 1:
                    first, rest = frontier.split()
                    waiting += [rest, first]
                    continue
            frontier.replace(group, self._advanced(group))
            waiting.append(frontier)
        self._read_finished()

    def _exceeds(self, frontier: Frontier, group: list[Edge], waiting: list[Frontier]) -> bool:
        """Whether the states held, once the group has run, would be more than the budget allows."""
        moved = set(map(id, group))
        held = {id(edge.state) for other in (*waiting, frontier) for edge in other.edges if id(edge) not in moved}
        held |= {id(state) for _, state in self.finished}
        return len(held) + len(group) > self.capacity

    def _advanced(self, group: list[Edge]) -> list[Edge]:
        """Apply the group's layer; the edges that follow."""
        following: list[Edge] = []
        for edges, states in in_blocks(group, self.block, self._states_after):
            for edge, state in zip(edges, states, strict=True):
                self._finish(edge.node, state)
                following += _following(edge.node, state)
            self._count(edges)
        return following

    def _states_after(self, edges: Sequence[Edge]) -> list[Tensor]:
        """States [B, T, d] after the step that these edges share, apart from their edits."""
        states = [self._edited(edge) for edge in edges]
        step = edges[0].step
        if step.layer is None:
            return states
        stacked = torch.cat(states) if len(states) > 1 else states[0]
        output = self._layer_output(step, stacked, len(states))
        if output.shape != stacked.shape:
            returned, given = tuple(output.shape), tuple(stacked.shape)
            raise UserError(f"variant {step.variant!r} returned a tensor of shape {returned}; it was given {given}")
        if len(states) == 1:
            return [output]
        # Copies, since views would keep the whole block alive as long as any of its states, unless there is room.
        parts = output.chunk(len(states))
        return [
            part if self.is_roomy and not edge.node.programs else part.clone()
            for part, edge in zip(parts, edges, strict=True)
        ]

    def _edited(self, edge: Edge) -> Tensor:
        if edge.step.edit is None:
            return edge.state
        edited = self.executor.edits[edge.step.edit](edge.state[None].clone(), self.batch)
        return edited.to(edge.state.dtype)[0]

    def _layer_output(self, step: Step, stacked: Tensor, copies: int) -> Tensor:
        if step.variant is None:
            assert step.layer is not None
            return self.captured.apply(self.executor._layers[step.layer], stacked, step.layer, copies)
        variant = self.executor.variants[step.variant]
        return self._arguments(variant).apply(variant.module, stacked, variant.layer, copies)

    def _arguments(self, variant: Variant) -> Captured | PrefixedCapture:
        if variant.calls is None:
            return self.captured
        if variant.calls not in self.donors:
            self.donors[variant.calls] = variant.calls(self.batch.ids)
        return self.donors[variant.calls]

    def _finish(self, node: Node, state: Tensor) -> None:
        if node.programs:
            self.finished.append((node, state))

    def _read_finished(self) -> None:
        finished, self.finished = self.finished, []
        for part, results in in_blocks(finished, max(1, self.capacity // 2), self._read):
            self.results.add([node for node, _ in part], results)

    def _read(self, finished: Sequence[tuple[Node, Tensor]]) -> Mapping[str, Tensor]:
        return self.readout(self.captured.unpacked(torch.stack([state for _, state in finished])))

    def _count(self, edges: Sequence[Edge]) -> None:
        self.done += sum(edge.step.layer is not None for edge in edges)
        if self.report is not None:
            self.report(self.done, self.total, "layers")


def _following(node: Node, state: Tensor) -> list[Edge]:
    return [Edge(state, step, child) for step, child in node.children.items()]
