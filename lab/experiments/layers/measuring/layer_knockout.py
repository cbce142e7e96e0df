"""How T-2 measures: the layer programs of single, paired, greedy and contiguous knockouts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lab.corpora.batches import token_batches
from lab.corpora.corpus import Corpus
from lab.experiments.layers.layer_knockout import Budget, all_pairs
from lab.records import variable
from lab.residual.compiled_losses import compiled_losses
from lab.residual.executor import Executor
from lab.residual.programs import Program, skip
from lab.residual.sweeps import ProgramLosses, Sample, sample, token_mean
from lab.store import Sweep
from lab.subjects.loading import LoadedSubject

Variables = dict[str, xr.Variable]


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.layers.layer_knockout.measure`."""
    losses = compiled_losses(subject.decoder, budget, sweep)
    many = sample(corpus, budget.prompts, budget.tokens)
    few = sample(corpus, budget.pair_prompts, budget.pair_tokens)
    variables = _single_variables(losses, many)
    variables |= _residual_variables(subject, losses.executor, many, budget.batch_tokens)
    variables |= _pair_variables(losses, few)
    variables |= _pruning_variables(losses, few, variables["pair_single_loss"].values)
    variables |= _block_variables(losses, few, budget.block_sizes, variables)
    coords = {
        "layer": np.arange(subject.decoder.n_layers),
        "step": np.arange(len(variables["pruning_loss"])),
        "removal": np.arange(1, len(variables["pruning_loss"])),
        "prompt_id": ("prompt", list(many.prompts)),
        "pair_prompt_id": ("pair_prompt", list(few.prompts)),
    }
    return xr.Dataset(variables, coords, {"settings": json.dumps({"vocabulary": subject.facts.vocabulary})})


def _skipping(n_layers: int, sets: Iterable[Collection[int]]) -> dict[str, Program]:
    return {"without layers " + ", ".join(map(str, layers)): skip(n_layers, layers) for layers in sets}


def _single_variables(losses: ProgramLosses, texts: Sample) -> Variables:
    n = losses.executor.decoder.n_layers
    found = losses("single layers", texts, _skipping(n, [(), *((i,) for i in range(n))]), compare=True, user_words=True)
    single, user = ("layer", "prompt"), {"weights": "text_tokens"}
    return {
        "scored_tokens": variable("prompt", texts.scored_tokens, "token", "scored completion tokens"),
        "text_tokens": variable("prompt", texts.user_tokens, "token", "scored tokens of the user's words"),
        "baseline_loss": variable("prompt", found["loss"][0], "nat/token", "loss of the intact model"),
        "target_probability": variable(
            "prompt", found["target_probability"][0], "1", "mean probability of the target token, intact"
        ),
        "text_baseline_loss": variable(
            "prompt", found["user_loss"][0], "nat/token", "intact loss on the user's words", **user
        ),
        "knockout_loss": variable(single, found["loss"][1:], "nat/token", "loss without the layer"),
        "knockout_kl": variable(single, found["kl"][1:], "nat", "KL(intact || without the layer)"),
        "top1_agreement": variable(single, found["agreement"][1:], "1", "share of positions that keep their top token"),
        "text_knockout_loss": variable(
            single, found["user_loss"][1:], "nat/token", "loss on the user's words without the layer", **user
        ),
    }


def _residual_variables(subject: LoadedSubject, executor: Executor, texts: Sample, batch_tokens: int) -> Variables:
    """Norms of updates and states at the scored positions, the largest entries, and the layers' weight norms."""
    n = subject.decoder.n_layers
    norms = {name: np.zeros((n, len(texts.prompts))) for name in ("input_norm", "update_norm")}
    largest = np.zeros(n)
    for batch in token_batches(texts.texts, batch_tokens):
        batch = batch.to(subject.device)
        at = (batch.scored.row, batch.scored.position)
        real = batch.lengths[:, None] > torch.arange(batch.ids.shape[1], device=subject.device)
        before = None
        for depth, states in executor.trace(batch):
            scored = states[at].float()
            if before is not None:
                largest[depth - 1] = max(largest[depth - 1], float(states[real].abs().max()))
                sizes = {"input_norm": before.norm(dim=-1), "update_norm": (scored - before).norm(dim=-1)}
                for name, size in sizes.items():
                    norms[name][depth - 1, list(batch.texts)] = _row_means(size, batch.scored.row, len(batch.texts))
            before = scored
    weights = [
        float(sum(w.double().square().sum() for w in layer.parameters() if w.ndim == 2)) ** 0.5
        for layer in subject.decoder.layers
    ]
    return {
        "input_norm": variable(
            ("layer", "prompt"), norms["input_norm"], "norm", "mean norm of the layer's input at scored positions"
        ),
        "update_norm": variable(
            ("layer", "prompt"), norms["update_norm"], "norm", "mean norm of the layer's update at scored positions"
        ),
        "residual_abs_max": variable(
            "layer", largest, "1", "largest absolute residual-stream entry after the layer, any position"
        ),
        "layer_weight_norm": variable(
            "layer", weights, "1", "root of the summed squared Frobenius norms of the layer's matrices"
        ),
    }


def _row_means(values: Tensor, rows: Tensor, n_rows: int) -> np.ndarray:
    sums = np.bincount(rows.cpu().numpy(), values.double().cpu().numpy(), n_rows)
    return sums / np.bincount(rows.cpu().numpy(), minlength=n_rows)


def _pair_variables(losses: ProgramLosses, texts: Sample) -> Variables:
    n = losses.executor.decoder.n_layers
    pairs = all_pairs(n)
    loss = losses("pairs of layers", texts, _skipping(n, [(), *((i,) for i in range(n)), *pairs]))["loss"]
    first, second = zip(*pairs, strict=True)
    return {
        "pair_scored_tokens": variable(
            "pair_prompt", texts.scored_tokens, "token", "scored tokens of the smaller sample"
        ),
        "pair_baseline_loss": variable("pair_prompt", loss[0], "nat/token", "intact loss on the smaller sample"),
        "pair_single_loss": variable(
            ("layer", "pair_prompt"), loss[1 : n + 1], "nat/token", "loss without the layer, smaller sample"
        ),
        "pair_first_layer": variable("pair", first, "layer", "lower layer of the pair"),
        "pair_second_layer": variable("pair", second, "layer", "higher layer of the pair"),
        "pair_knockout_loss": variable(("pair", "pair_prompt"), loss[n + 1 :], "nat/token", "loss without both layers"),
    }


def _pruning_variables(losses: ProgramLosses, texts: Sample, single_loss: np.ndarray) -> Variables:
    """Greedy removal down to a quarter of the layers, beside the order that the single knockouts suggest."""
    n = losses.executor.decoder.n_layers
    singles = token_mean(single_loss, texts.scored_tokens)
    naive = [int(layer) for layer in np.argsort(singles, kind="stable")][: n // 4]
    greedy = naive[:1]  # the first step is the single-knockout result
    while len(greedy) < n // 4:
        candidates = [layer for layer in range(n) if layer not in greedy]
        programs = _skipping(n, [(*sorted(greedy), layer) for layer in candidates])
        loss = losses(f"greedy removal {len(greedy) + 1}", texts, programs)["loss"]
        greedy.append(candidates[int(np.argmin(token_mean(loss, texts.scored_tokens)))])
    paths = {
        name: _skipping(n, [order[:k] for k in range(n // 4 + 1)])
        for name, order in (("greedy", greedy), ("naive", naive))
    }
    along = {name: losses(f"{name} pruning", texts, programs, user_words=True) for name, programs in paths.items()}
    dims = ("step", "pair_prompt")
    return {
        "pair_text_tokens": variable(
            "pair_prompt", texts.user_tokens, "token", "scored tokens of the user's words, smaller sample"
        ),
        "pruning_removed_layer": variable("removal", greedy, "layer", "layer removed at each greedy step"),
        "pruning_loss": variable(
            dims, along["greedy"]["loss"], "nat/token", "loss after each greedy removal; step 0 is intact"
        ),
        "naive_pruning_loss": variable(
            dims, along["naive"]["loss"], "nat/token", "loss without the n layers that hurt least alone"
        ),
        "text_pruning_loss": variable(
            dims,
            along["greedy"]["user_loss"],
            "nat/token",
            "loss on the user's words along the greedy removals",
            weights="pair_text_tokens",
        ),
    }


def _block_variables(
    losses: ProgramLosses, texts: Sample, sizes: tuple[int, ...] | None, measured: Variables
) -> Variables:
    """Contiguous blocks; those of one and two layers are the single and paired knockouts of the same sample."""
    n = losses.executor.decoder.n_layers
    wanted = [size for size in range(1, n // 4 + 1) if sizes is None or size in sizes]
    blocks = [(size, first) for size in wanted for first in range(n - size + 1)]
    loss = dict(zip(((1, i) for i in range(n)), measured["pair_single_loss"].values, strict=True))
    pairs = zip(all_pairs(n), measured["pair_knockout_loss"].values, strict=True)
    loss |= {(2, i): of_pair for (i, j), of_pair in pairs if j == i + 1}
    longer = [block for block in blocks if block not in loss]
    programs = _skipping(n, [range(first, first + size) for size, first in longer])
    loss |= dict(zip(longer, losses("contiguous blocks", texts, programs)["loss"], strict=True)) if longer else {}
    return {
        "block_size": variable("block", [size for size, _ in blocks], "layer", "layers in the block"),
        "block_first_layer": variable("block", [first for _, first in blocks], "layer", "first layer of the block"),
        "block_loss": variable(
            ("block", "pair_prompt"), [loss[block] for block in blocks], "nat/token", "loss without the block"
        ),
    }
