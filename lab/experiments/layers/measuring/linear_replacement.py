"""The global half of T-7: fit matrices to layers, put them in the layers' places, and read the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from lab.corpora.batches import TokenText, token_batches
from lab.corpora.corpus import Corpus
from lab.errors import UserError
from lab.experiments.layers.linearization_gap import Budget
from lab.records import variable
from lab.residual.executor import Executor, Variant
from lab.residual.linear_maps import LinearMap, MappedLayer, Regression
from lab.residual.programs import Program, identity, skip
from lab.residual.programs import replace as replaced
from lab.residual.replay import input_norm
from lab.residual.sweeps import ProgramLosses, sample
from lab.store import Sweep

Variables = dict[str, xr.Variable]

#: Of five texts in a row three are fitted to, one chooses the penalty, one is scored. Texts are balanced over
#: seven categories in turn, so that every part meets all of them.
FIT, CHOOSE, SCORE = (0, 1, 2), (3,), (4,)
#: The first positions keep the layer's own output.
EXACT_FIRST = 1


@dataclass(frozen=True)
class States:
    """The residual stream at every real token of the corpus.

    Attributes:
        depths: states before each layer and after the last [L + 1][n, d], in the model's dtype.
        text: index of each token's text [n].
        position: of each token in its text [n].
        completion: whether the token belongs to the completion [n].
    """

    depths: list[Tensor]
    text: Tensor
    position: Tensor
    completion: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """Input of every layer [L][n, d]."""
        return self.depths[:-1]

    def update(self, layer: int) -> Tensor:
        """What the layer adds [n, d], in float32; the states themselves are rounded as the model rounds them."""
        return self.depths[layer + 1].float() - self.depths[layer].float()

    def part(self, which: Sequence[int]) -> Tensor:
        """Tokens of one part of the corpus, see `FIT` [n]."""
        return torch.isin(self.text % 5, torch.tensor(which, device=self.text.device))


def collect(executor: Executor, corpus: Corpus, budget: Budget, sweep: Sweep) -> States:
    """One pass over the corpus that keeps every state: (L + 1) n d numbers."""
    texts = [TokenText(text.prompt_ids + text.completion_ids, ()) for text in corpus.texts]
    batches = token_batches(texts, budget.batch_tokens)
    depths: list[list[Tensor]] = [[] for _ in range(executor.decoder.n_layers + 1)]
    text, position = [], []
    for number, batch in enumerate(batches):
        batch = batch.to(executor.decoder.device)
        place = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
        real = place < batch.lengths.to(place.device)[:, None]
        for depth, states in executor.trace(batch):
            depths[depth].append(states[real].cpu())
        rows = torch.tensor(batch.texts).repeat_interleave(batch.lengths.cpu())
        text.append(rows)
        position.append(place[real].cpu())
        sweep.progress(number + 1, len(batches), "batches of the corpus read")
    text_of, position_of = torch.cat(text), torch.cat(position)
    starts = torch.tensor([len(entry.prompt_ids) for entry in corpus.texts])
    joined = [torch.cat(parts) for parts in depths]
    return States(joined, text_of, position_of, position_of >= starts[text_of])


def energy_factors(states: States) -> np.ndarray:
    """Mean squared deviation of each layer's update over the squared mean norm of completion updates [L].

    About 1 where tokens are alike; far above it where a few tokens carry the variance, and so any R^2.
    """
    factors = []
    for layer in range(len(states.inputs)):
        update = states.update(layer).double()
        spread = (update - update.mean(0)).square().sum(-1).mean()
        factors.append(float(spread / update[states.completion].norm(dim=-1).mean() ** 2))
    return np.array(factors)


def replaced_layers(factors: np.ndarray, stride: int) -> list[int]:
    """Layers to be replaced: every `stride`-th, the second, the last, and the one with the largest outliers."""
    n = len(factors)
    return sorted({*range(0, n, stride), min(1, n - 1), n - 1, int(factors.argmax())})


@dataclass(frozen=True)
class Fitted:
    """The maps of one layer and how well they predict its update.

    Attributes:
        maps: by name; see `MAPS`.
        rho: relative penalty of the residual map.
        scores: sums of squares on the scored texts' completions [prompt], by name.
    """

    maps: dict[str, LinearMap]
    rho: float
    scores: dict[str, np.ndarray]


#: Name of a map -> what its loss variable is described as. The published map of the full output is not fitted again:
#: it differs from the residual one by W_full - W_res = I - lambda (X^T X + lambda I)^-1, which is I where the data are.
MAPS = {
    "residual": "update replaced by an affine map of the stream, first position exact",
    "normalized": "update replaced by an affine map of the normed stream, first position exact",
    "all_tokens": "update replaced by a map without intercept, fitted to and used at all positions, as published",
}


def measured(
    executor: Executor, states: States, corpus: Corpus, layers: Sequence[int], budget: Budget, sweep: Sweep
) -> Variables:
    """Losses and sums of squares with one layer after the other replaced by each of its maps."""
    scored = _scored_texts(corpus)
    texts = sample(replace(corpus, texts=tuple(corpus.texts[index] for index in scored)), None, budget.scored_tokens)
    ids = {text.id: index for index, text in enumerate(corpus.texts)}
    own = [ids[prompt] for prompt in texts.prompts]
    norms = _input_norms(executor, texts.texts[0], layers)
    fitted: dict[int, Fitted] = {}
    for done, layer in enumerate(layers):
        fitted[layer] = _fit(states, layer, norms[layer], own, budget)
        sweep.progress(done + 1, len(layers), "layers fitted")
    variants, programs = _programs(executor, fitted, norms, budget.ranks)
    runner = Executor(executor.decoder, variants=variants)
    losses = ProgramLosses(runner, sweep, budget.batch_tokens, budget.head_dtype)
    found = dict(zip(programs, losses("layers replaced", texts, programs)["loss"], strict=True))
    return _variables(found, fitted, texts.scored_tokens, executor.decoder.n_layers, budget)


def _scored_texts(corpus: Corpus) -> list[int]:
    scored = [index for index in range(len(corpus.texts)) if index % 5 in SCORE]
    if not scored:
        raise UserError(
            f"the corpus of {corpus.subject} has {len(corpus.texts)} texts; five at least are needed to fit a layer "
            "to some and score it on others"
        )
    return scored


def _input_norms(executor: Executor, text: TokenText, layers: Sequence[int]) -> dict[int, nn.Module | None]:
    (batch,) = token_batches([text], len(text.ids))
    captured = executor.decoder.capture(batch.ids)
    return {
        layer: input_norm(executor.decoder.layers[layer], captured.entry, captured.call(layer, 1)) for layer in layers
    }


def _fit(states: States, layer: int, norm: nn.Module | None, scored: Sequence[int], budget: Budget) -> Fitted:
    inputs, update = states.inputs[layer], states.update(layer)
    later = states.position >= EXACT_FIRST
    fit, choose = states.part(FIT), states.part(CHOOSE)
    maps: dict[str, LinearMap] = {}

    def regress(name: str, x: Tensor, kept: Tensor, *, intercept: bool) -> tuple[Regression, float]:
        regression = Regression(x[fit & kept], update[fit & kept], intercept=intercept)
        maps[name], rho = regression.best(x[choose & kept], update[choose & kept])
        return regression, rho

    everywhere = torch.ones_like(later)
    regression, rho = regress("residual", inputs, later, intercept=True)
    for rank in budget.ranks:
        maps[_rank(rank)] = regression.low_rank(rho, rank)
    regress("all_tokens", inputs, everywhere, intercept=False)
    if norm is not None:
        device = next(norm.parameters()).device
        regress("normalized", norm(inputs.to(device)).cpu(), later, intercept=True)
    tokens = {"residual": states.completion, "all_tokens": everywhere}
    scores: dict[str, np.ndarray] = {}
    for name, chosen in tokens.items():
        sums = _sums_of_squares(maps[name], inputs, update, states.text, chosen, scored)
        scores |= {f"{name}_{kind}": values for kind, values in sums.items()}
    return Fitted(maps, rho, scores)


def _sums_of_squares(
    linear: LinearMap, inputs: Tensor, update: Tensor, text: Tensor, chosen: Tensor, scored: Sequence[int]
) -> dict[str, np.ndarray]:
    """Per scored text: squared error, and squared deviation from the mean over all scored tokens [prompt]."""
    kept = chosen & torch.isin(text, torch.tensor(scored))
    x, y = inputs[kept], update[kept].double()
    errors = {"error": y - linear(x).double(), "deviation": y - y.mean(0)}
    return {
        name: np.array([float(value[text[kept] == index].square().sum()) for index in scored])
        for name, value in errors.items()
    }


def _rank(rank: int) -> str:
    return f"rank {rank}"


def _programs(
    executor: Executor, fitted: dict[int, Fitted], norms: dict[int, nn.Module | None], ranks: Sequence[int]
) -> tuple[dict[str, Variant], dict[str, Program]]:
    """One variant per layer and map, and the programs: intact, without the layer, with each of its maps."""
    n, device = executor.decoder.n_layers, executor.decoder.device
    variants, programs = {}, {"intact": identity(n)}
    for layer, fit in fitted.items():
        programs[f"without layer {layer}"] = skip(n, (layer,))
        for name, linear in fit.maps.items():
            module = MappedLayer(
                executor.decoder.layers[layer],
                LinearMap(linear.weight.to(device), linear.bias.to(device)),
                norm=norms[layer] if name == "normalized" else None,
                exact_first=0 if name == "all_tokens" else EXACT_FIRST,
            )
            label = _label(layer, name)
            variants[label] = Variant(module, layer)
            programs[label] = replaced(n, layer, label)
    return variants, programs


def _label(layer: int, name: str) -> str:
    return f"layer {layer} as {name}"


def _variables(
    losses: dict[str, np.ndarray], fitted: dict[int, Fitted], tokens: np.ndarray, n_layers: int, budget: Budget
) -> Variables:
    prompts = len(tokens)
    nothing = np.full(prompts, np.nan)

    def by_layer(of: dict[int, np.ndarray]) -> np.ndarray:
        return np.stack([of.get(layer, nothing) for layer in range(n_layers)])

    dims = ("layer", "scored_prompt")
    without = {layer: losses[f"without layer {layer}"] for layer in fitted}
    found = {
        "scored_tokens": variable("scored_prompt", tokens, "token", "completion tokens scored with layers replaced"),
        "baseline_loss": variable("scored_prompt", losses["intact"], "nat/token", "loss of the intact model"),
        "knockout_loss": variable(dims, by_layer(without), "nat/token", "loss without the layer"),
        "ridge_penalty": variable(
            "layer",
            [fitted[layer].rho if layer in fitted else np.nan for layer in range(n_layers)],
            "1",
            "penalty of the residual map relative to the mean eigenvalue of its inputs' second moments",
        ),
    }
    for name, description in MAPS.items():
        of = {layer: losses[_label(layer, name)] for layer in fitted if name in fitted[layer].maps}
        if of:
            found[f"{name}_loss"] = variable(dims, by_layer(of), "nat/token", f"loss with the {description}")
    if budget.ranks:
        by_rank = [by_layer({layer: losses[_label(layer, _rank(rank))] for layer in fitted}) for rank in budget.ranks]
        found["low_rank_loss"] = variable(
            ("layer", "rank", "scored_prompt"),
            np.stack(by_rank, axis=1),
            "nat/token",
            "loss with the residual map cut to a rank (reduced-rank regression)",
        )
    for name in next(iter(fitted.values())).scores:
        sums = {layer: fit.scores[name] for layer, fit in fitted.items()}
        described = {"error": "squared error of the map", "deviation": "squared deviation from the mean"}
        where = "completion tokens" if name.startswith("residual") else "all tokens"
        text = f"sum over the prompt's {where}: {described[name.rpartition('_')[2]]}"
        found[f"{name}_squares"] = variable(dims, by_layer(sums), "norm^2", text, weights="scored_weight")
    found["scored_weight"] = variable("scored_prompt", np.ones(prompts), "1", "equal weights of the scored prompts")
    return found
