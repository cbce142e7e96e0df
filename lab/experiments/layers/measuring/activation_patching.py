"""How activation patching measures: minimal pairs as batches, patches as edits of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.corpora.minimal_pairs import TokenPair, load_minimal_pairs, tokenised
from lab.errors import NotApplicable, UserError
from lab.experiments.layers.activation_patching import FAMILIES, Budget
from lab.records import variable
from lab.residual.executor import Edit, Executor
from lab.residual.programs import Program, Step, edit_before, identity
from lab.store import Arrays, Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.loading import LoadedSubject

POSITIONS = ("span", "last", "between")


@dataclass(frozen=True)
class Side:
    """One run of a batch of pairs: the clean or the corrupted prompts.

    Attributes:
        batch: the prompts, all of one length.
        states: residual streams of the intact model at depth 0..L, each [B, T, d].
    """

    batch: TokenBatch
    states: tuple[Tensor, ...]

    def update(self, layer: int) -> Tensor:
        """What the layer adds to the stream [B, T, d], in float32: the difference of nearly equal states."""
        return self.states[layer + 1].float() - self.states[layer].float()


def measure(subject: LoadedSubject, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.layers.activation_patching.measure`."""
    pairs, unfit = tokenised(load_minimal_pairs(), subject.tokenizer)
    solved = _solved(subject.decoder, pairs, budget, sweep)
    chosen = [pair for family in FAMILIES for pair in _members(solved, family)[: budget.pairs]]
    if not chosen:
        raise NotApplicable(
            f"{subject.facts.name} solves none of the {len(pairs)} minimal pairs; nothing can be patched"
        )
    groups = list(_groups(chosen, budget.batch_tokens))
    parts, done = [], 0
    for index, group in enumerate(groups):
        parts.append(sweep.shard(f"patching {index}", partial(patched, subject.decoder, group)))
        done += len(group)
        sweep.progress(done, len(chosen), "minimal pairs")
    found = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    ordered = [pair for group in groups for pair in group]
    counts = {
        "attempted_pairs": variable("family", _counts(pairs), "1", "pairs that the model was asked"),
        "solved_pairs": variable("family", _counts(solved), "1", "pairs that it answers rightly on both sides"),
        "unfit_pairs": variable((), len(unfit), "1", "pairs whose answer or length this tokenizer does not allow"),
    }
    return _dataset(found, ordered).assign(counts)


def _members(pairs: Sequence[TokenPair], family: str) -> list[TokenPair]:
    return [pair for pair in pairs if pair.family == family]


def _counts(pairs: Sequence[TokenPair]) -> list[int]:
    return [len(_members(pairs, family)) for family in FAMILIES]


def _dataset(found: Arrays, pairs: Sequence[TokenPair]) -> xr.Dataset:
    kinds = [FAMILIES.index(pair.family) for pair in pairs]
    per_layer, unit = ("layer", "minimal_pair"), "logit"
    variables = {
        "pair_family": variable("minimal_pair", kinds, "1", "family of the pair, an index into the dimension `family`"),
        "clean_preference": variable("minimal_pair", found["clean"], unit, "logit difference of the clean run"),
        "corrupted_preference": variable(
            "minimal_pair", found["corrupted"], unit, "logit difference of the corrupted run"
        ),
        "residual_patched_preference": variable(
            ("position", *per_layer), found["residual"], unit, "with the clean residual stream after the layer"
        ),
        "update_patched_preference": variable(per_layer, found["update"], unit, "with the layer's clean update"),
        "update_corrupted_preference": variable(
            per_layer, found["damage"], unit, "clean run with the layer's corrupted update"
        ),
    }
    coords = {
        "layer": np.arange(len(found["update"])),
        "position": list(POSITIONS),
        "family": list(FAMILIES),
        "minimal_pair_id": ("minimal_pair", [pair.id for pair in pairs]),
    }
    return xr.Dataset(variables, coords)


def _solved(decoder: Decoder, pairs: Sequence[TokenPair], budget: Budget, sweep: Sweep) -> list[TokenPair]:
    """The pairs that the model answers rightly on both sides, in the order of the data."""
    right: set[str] = set()
    tried = 0
    for group in _groups(pairs, budget.batch_tokens):
        right |= {pair.id for pair, ok in _answers(decoder, group) if ok}
        tried += len(group)
        sweep.progress(tried, len(pairs), "minimal pairs tried")
    return [pair for pair in pairs if pair.id in right]


def _answers(decoder: Decoder, group: Sequence[TokenPair]) -> Iterator[tuple[TokenPair, bool]]:
    clean, corrupted = (
        _preferences(decoder, group, _side(decoder, group, name).states[-1][None])[0] for name in ("clean", "corrupted")
    )
    for pair, for_clean, for_corrupted in zip(group, clean.tolist(), corrupted.tolist(), strict=True):
        yield pair, for_clean > 0 > for_corrupted


def _groups(pairs: Sequence[TokenPair], batch_tokens: int) -> Iterator[list[TokenPair]]:
    """Pairs of equal length, so that the last position is the last token of every row."""
    lengths = sorted({len(pair.clean_ids) for pair in pairs})
    for length in lengths:
        members = [pair for pair in pairs if len(pair.clean_ids) == length]
        size = max(1, batch_tokens // length)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _side(decoder: Decoder, group: Sequence[TokenPair], name: str) -> Side:
    texts = [TokenText(pair.clean_ids if name == "clean" else pair.corrupted_ids, ()) for pair in group]
    (batch,) = token_batches(texts, sum(len(text.ids) for text in texts))
    batch = batch.to(decoder.device)
    return Side(batch, tuple(state for _, state in Executor(decoder).trace(batch)))


def patched(decoder: Decoder, group: Sequence[TokenPair]) -> Arrays:
    """Preferences [..., pair] of one batch of pairs."""
    clean, corrupted = (_side(decoder, group, name) for name in ("clean", "corrupted"))
    n = decoder.n_layers
    denoising = _residual_edits(group, clean) | _update_edits(clean)
    residual = {
        f"{name} {layer}": edit_before(n, layer + 1, f"{name} {layer}") for name in POSITIONS for layer in range(n)
    }
    recovered = _run(decoder, group, corrupted, denoising, [identity(n), *residual.values(), *_update_programs(n)])
    damaged = _run(decoder, group, clean, _update_edits(corrupted), [identity(n), *_update_programs(n)])
    return {
        "clean": damaged[0],
        "corrupted": recovered[0],
        "residual": recovered[1 : 1 + len(residual)].reshape(len(POSITIONS), n, -1),
        "update": recovered[1 + len(residual) :],
        "damage": damaged[1:],
    }


def _residual_edits(group: Sequence[TokenPair], clean: Side) -> dict[str, Edit]:
    masks = position_masks(group, clean.batch)
    return {
        f"{name} {layer}": _taking(clean.states[layer + 1], masks[name])
        for name in POSITIONS
        for layer in range(len(clean.states) - 1)
    }


def _update_edits(side: Side) -> dict[str, Edit]:
    return {f"update {layer}": _adding(side.update(layer)) for layer in range(len(side.states) - 1)}


def _update_programs(n: int) -> list[Program]:
    """For each layer: leave it out and add the update that the other run made in its place."""
    return [
        tuple(Step(None, edit=f"update {slot}") if slot == layer else Step(slot) for slot in range(n))
        for layer in range(n)
    ]


def position_masks(group: Sequence[TokenPair], batch: TokenBatch) -> dict[str, Tensor]:
    """Masks [B, T] of the changed span, the last position, and what lies between them."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    starts, stops = (torch.tensor([pair.span[end] for pair in group], device=columns.device)[:, None] for end in (0, 1))
    span, last = (columns >= starts) & (columns < stops), (columns == len(columns) - 1).expand(len(group), -1)
    return {"span": span, "last": last, "between": (columns >= stops) & ~last}


def _taking(states: Tensor, mask: Tensor) -> Edit:
    return lambda running, batch: torch.where(mask[..., None], states, running)


def _adding(update: Tensor) -> Edit:
    return lambda running, batch: running.float() + update


def _run(
    decoder: Decoder, group: Sequence[TokenPair], side: Side, edits: dict[str, Edit], programs: Sequence[Program]
) -> np.ndarray:
    """Preferences [program, pair]."""
    executor = Executor(decoder, edits=edits)
    found = executor.run(side.batch, programs, lambda states: {"preference": _preferences(decoder, group, states)})
    values: np.ndarray = found["preference"].double().numpy()
    if not np.isfinite(values).all():
        program, pair = np.argwhere(~np.isfinite(values))[0]
        raise UserError(
            f"activation patching: pair {group[pair].id}, program {program}: logits are not finite; check the weights"
        )
    return values


@torch.no_grad()
def _preferences(decoder: Decoder, group: Sequence[TokenPair], states: Tensor) -> Tensor:
    """Logit of the answer minus logit of the corrupted answer at the last position [k, B] of states [k, B, T, d]."""
    logits = decoder.unembedding.logits(decoder.final_norm(states[:, :, -1]), torch.float32)
    right, wrong = (
        torch.tensor(ids, device=logits.device)
        for ids in zip(*((p.answer, p.corrupted_answer) for p in group), strict=True)
    )
    rows = torch.arange(len(group), device=logits.device)
    return logits[:, rows, right] - logits[:, rows, wrong]
