"""T-1 logit lens: how does the prediction of the next token develop over depth?

The residual stream at every slot (the embedding, or the state after a layer) is read out through the
model's own final norm and head, as if the network ended there,

    z_s = W_U Norm_final(h_s),

and compared with the token that follows. The last slot is the model's own output. Two settings: logits
of a float32 head with mid-ranks (strictly greater entries plus half of the ties), which is the sound one,
and bfloat16 logits with every tie resolved in favour of the target, as published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import xarray as xr

from lab.corpora.token_classes import TOKEN_TYPES, token_type
from lab.errors import NotApplicable, UserError
from lab.experiments import Experiment, Tolerance
from lab.records import Record, variable
from lab.statistics.depth import label_of_largest
from lab.statistics.lens_figures import lens_figures
from lab.statistics.rank_paths import EMBEDDING

if TYPE_CHECKING:
    from lab.corpora.batches import TokenText
    from lab.corpora.corpus import Corpus, Text
    from lab.store import Arrays, Sweep
    from lab.subjects.loading import LoadedSubject

PUBLISHED_SETTING = "bfloat16_"
#: Depths within rounding of each other are one depth: 13/36 must not fall out of "up to 13/36".
SAME_DEPTH = 1e-9


class LogitLens(Record):
    """Readings of the residual stream at every depth, and what claims derive from them.

    Dimensions: `slot` (-1 the embedding, l the residual stream after layer l), `layer`, `token_type`, `category`.
    A measured record holds the readings of single tokens [slot, token] and the prompt of each token; published
    figures are profiles over depth. Both give the same figures, see `figures`.
    """

    TOKEN_TYPES = TOKEN_TYPES
    profiles: ClassVar = ("top1", "top5", "median_rank", "entropy")

    def __init__(self, data: xr.Dataset, prompts: np.ndarray | None = None):
        """Wrap a record.

        Args:
            data: readings of tokens, or figures.
            prompts: drawn prompts of a bootstrap resample; None is every prompt once.
        """
        super().__init__(data)
        self._prompts = prompts

    @cached_property
    def figures(self) -> xr.Dataset:
        """Profiles over depth, without tokens; for a measured record computed from its tokens."""
        if "token" not in self.data.dims:
            return self.data
        return lens_figures(self.data, self._prompts).assign_attrs(self.data.attrs)

    @cached_property
    def published_setting(self) -> Self:
        """The same quantities from bfloat16 logits with ties in favour of the target.

        Published figures are that already.
        """
        own = [str(name) for name in self.figures if str(name).startswith(PUBLISHED_SETTING)]
        if not own:
            return self
        return type(self)(self.figures[own].rename({name: name.removeprefix(PUBLISHED_SETTING) for name in own}))

    def require_both_settings(self) -> None:
        """Raise NotApplicable unless float32 and bfloat16 logits were read side by side."""
        if self.published_setting is self:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds bfloat16 logits only")

    def has(self, name: str) -> bool:
        """Whether the record holds this figure."""
        return name in self.figures

    def variable(self, name: str) -> xr.DataArray:
        """A figure, over all tokens.

        Raises:
            NotApplicable: the record does not hold it.
        """
        if name not in self.figures:
            raise NotApplicable(f"the {self.source} record of {self.subject} holds no {name}")
        return self.figures[name]

    def mean(self, name: str) -> xr.DataArray:
        """A figure, over all tokens: figures have no sampling dimension left."""
        return self.variable(name)

    def summary(self) -> xr.Dataset:
        """All figures of both settings: the numbers that a snapshot holds."""
        return self.figures

    def _resampled(self, generators: Mapping[str, np.random.Generator]) -> Self:
        # The tokens are shared: five hundred copies of them would fill the memory.
        size = self.data.sizes["prompt"]
        return type(self)(self.data, generators["prompt"].integers(size, size=size))

    # ---- depth

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.top1.sizes["slot"]) - 1

    @property
    def last(self) -> int:
        """Slot of the model's output, L - 1."""
        return self.n_layers - 1

    @cached_property
    def depth(self) -> xr.DataArray:
        """Relative depth of each slot [slot]: embedding 0, last layer 1."""
        slots = self.top1.slot
        depth: xr.DataArray = (slots - EMBEDDING) / self.n_layers
        return depth

    def depth_of(self, layer: float | xr.DataArray) -> float:
        """Relative depth of a (mean) slot label."""
        return (float(layer) - EMBEDDING) / self.n_layers

    def slot_at(self, depth: float) -> int:
        """Last slot that is not deeper than a relative depth."""
        return int(np.floor(depth * self.n_layers + SAME_DEPTH)) + EMBEDDING

    def gain_within(self, above: float, up_to: float) -> float:
        """Top-1 accuracy gained between two depths."""
        return float(self.top1.sel(slot=self.slot_at(up_to)) - self.top1.sel(slot=self.slot_at(above)))

    def require_depth(self, layer: int, above: float, up_to: float) -> None:
        """Raise NotApplicable unless the layer lies at depths above < z <= up_to."""
        if not self.slot_at(above) < layer <= self.slot_at(up_to):
            # The layer stays unnamed, so that pytest lists all layers outside in one line.
            raise NotApplicable(f"the claim speaks of layers at depths {above:.2f} to {up_to:.2f}")

    def early(self, quantity: xr.DataArray) -> xr.DataArray:
        """The layers of the first half of a profile [slot], l < L/2, without the embedding."""
        return quantity.sel(slot=slice(0, (self.n_layers - 1) // 2))

    def late(self, quantity: xr.DataArray) -> xr.DataArray:
        """The layers of the second half of a profile [slot], l >= L/2."""
        return quantity.sel(slot=slice((self.n_layers - 1) // 2 + 1, None))

    # ---- profiles

    @cached_property
    def top1(self) -> xr.DataArray:
        """Share of tokens that the lens predicts [slot]."""
        return self.variable("lens_top1_accuracy")

    @cached_property
    def top5(self) -> xr.DataArray:
        """Share of tokens among the lens's first 5 [slot]."""
        return self.variable("lens_top5_accuracy")

    @cached_property
    def top10(self) -> xr.DataArray:
        """Share of tokens among the lens's first 10 [slot]."""
        return self.variable("lens_top10_accuracy")

    @cached_property
    def mean_rank(self) -> xr.DataArray:
        """Mean rank of the target [slot]; ruled by the few tokens of the largest ranks."""
        return self.variable("lens_mean_rank")

    @cached_property
    def median_rank(self) -> xr.DataArray:
        """Median rank of the target [slot]."""
        return self.variable("lens_median_rank")

    @cached_property
    def entropy(self) -> xr.DataArray:
        """Mean entropy of the lens distribution [slot], nat."""
        return self.variable("lens_entropy")

    @cached_property
    def gain(self) -> xr.DataArray:
        """Top-1 accuracy gained by each layer [layer]."""
        accuracy = self.top1.values
        return xr.DataArray(np.diff(accuracy), dims="layer", coords={"layer": np.arange(self.n_layers)})

    @property
    def layers_by_gain(self) -> list[int]:
        """Layers, the largest gain of top-1 accuracy first."""
        return [int(layer) for layer in (-self.gain).argsort().values]

    @cached_property
    def knee(self) -> int:
        """Slot at which top-1 accuracy lies farthest below the straight line from (0, 0) to (1, last accuracy)."""
        below = self.depth * self.top1.sel(slot=self.last) - self.top1
        return label_of_largest(below)

    @cached_property
    def sharpest_bend(self) -> int:
        """Layer whose gain of top-1 accuracy exceeds that of the layer before by most."""
        return label_of_largest(self.gain.diff("layer"))

    def first_slot_below(self, ranks: xr.DataArray, limit: float) -> int:
        """First slot past the embedding at which a rank profile [slot] lies below a limit; L if none does."""
        return self._first(ranks.sel(slot=slice(0, None)) < limit)

    def recovery(self, quantity: xr.DataArray, *, rising: bool) -> int:
        """First layer whose reading is better than the embedding's; L if none is.

        Args:
            quantity: profile [slot].
            rising: whether larger is better (accuracies) or smaller (ranks).
        """
        sign = 1 if rising else -1
        return self._first(sign * quantity.sel(slot=slice(0, None)) > sign * quantity.sel(slot=EMBEDDING))

    def _first(self, reached: xr.DataArray) -> int:
        return int(reached.values.argmax()) if reached.any() else self.n_layers

    @property
    def repeat_share(self) -> float:
        """Share of targets that equal the token they are predicted from."""
        return float(self.variable("repeated_target_count") / self.variable("scored_token_count"))

    def require_tied_embeddings(self) -> None:
        """Raise NotApplicable if the head is not the embedding itself."""
        if not self.provenance["settings"]["tied_embeddings"]:
            raise NotApplicable(f"{self.subject} has a head of its own")

    # ---- rank paths

    @cached_property
    def hurt_fraction(self) -> xr.DataArray:
        """Share of all tokens whose rank the layer worsens, if it was below 100 [layer]."""
        return self.variable("hurt_fraction")

    @cached_property
    def conditional_hurt_rate(self) -> xr.DataArray:
        """Share of the tokens of rank below 100 whose rank the layer worsens [layer]."""
        return self.variable("conditional_hurt_rate")

    @property
    def layers_by_hurt(self) -> list[int]:
        """Layers, the one that hurts most tokens first."""
        return [int(layer) for layer in (-self.hurt_fraction).argsort().values]

    @property
    def crystallization_depth(self) -> float:
        """Mean relative depth from which tokens stay in the top 10."""
        return self.depth_of(self.variable("crystallization_layer_mean"))

    @property
    def first_top1_depth(self) -> float:
        """Mean relative depth at which tokens first lead, lasting or not."""
        return self.depth_of(self.variable("first_top1_layer_mean"))

    # ---- token classes

    @cached_property
    def type_crystallization(self) -> xr.DataArray:
        """Mean crystallization slot of each token class [token_type]."""
        return self.variable("token_type_crystallization_mean")

    def type_rank(self, token_type: str) -> xr.DataArray:
        """Mean rank of a token class [slot]."""
        return self.variable("token_type_mean_rank").sel(token_type=token_type)

    def require_tokens(self, token_type: str, at_least: int) -> None:
        """Raise NotApplicable if the record holds fewer tokens of a class than a claim about it needs."""
        count = int(self.variable("token_type_count").sel(token_type=token_type))
        if count < at_least:
            raise NotApplicable(
                f"the {self.source} record of {self.subject} holds {count} of {at_least} tokens of class {token_type}"
            )

    def settled_slot(self, token_type: str) -> int:
        """First layer at which the mean rank of a token class is below 1; L if never."""
        return self.first_slot_below(self.type_rank(token_type), 1)


# ---- measuring


@dataclass(frozen=True)
class Budget:
    """How many tokens are read. The product with the vocabulary is nearly all of the cost, once per slot and token.

    Attributes:
        prompts: a balanced prefix of the corpus; None is all.
        tokens: completion tokens per prompt, from the start of the completion; None is all.
        stride: every so manieth of them is read, and every number, since numbers are rare and claims are about
            them. Neighbouring tokens tell much the same, so this costs less support than fewer prompts would.
        batch_tokens: padded tokens per batch; a batch is what an interrupted measurement loses at most.
    """

    prompts: int | None
    tokens: int | None
    stride: int
    batch_tokens: int


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Read the chosen tokens at every depth, with the float32 head and with bfloat16 logits."""
    from lab.corpora.batches import token_batches
    from lab.residual.lens_readings import LensReader

    texts, scored, in_sample = _sample(subject, corpus, budget)
    reader = LensReader(subject.decoder)
    batches = token_batches(scored, budget.batch_tokens)
    total = sum(len(batch.scored) for batch in batches)
    parts: list[Arrays] = []
    done = 0
    for index, batch in enumerate(batches):
        parts.append(sweep.shard(f"batch {index}", lambda: reader(batch.to(subject.decoder.device))))  # noqa: B023
        _require_finite(parts[-1], texts)
        done += len(batch.scored)
        sweep.progress(done, total, "tokens at every depth")
    # Batches are sorted by length, the record by prompt.
    order = np.argsort(np.concatenate([part["text"] for part in parts]), kind="stable")
    readings = {name: np.concatenate([part[name] for part in parts], axis=-1)[..., order] for name in parts[0]}
    return _dataset(subject, texts, scored, readings | {"in_sample": in_sample})


def _sample(subject: LoadedSubject, corpus: Corpus, budget: Budget) -> tuple[list[Text], list[TokenText], np.ndarray]:
    """Texts, their targets, and per target [token] whether it is a regular step, not a number between two."""
    from lab.corpora.corpus import token_text

    texts, scored, in_sample = [], [], []
    for text in corpus.texts[: budget.prompts]:
        every = token_text(text, max_tokens=budget.tokens)
        regular = set(every.targets[:: budget.stride])
        chosen = [t for t in every.targets if t in regular or _class_of(subject, every.ids[t]) == "number"]
        if chosen:
            texts.append(text)
            scored.append(replace(every, targets=tuple(chosen)))
            in_sample += [t in regular for t in chosen]
    if not texts:
        remedy = f"make it again with python -m lab complete {corpus.subject}"
        raise UserError(f"the corpus of {corpus.subject} has no scored token; {remedy}")
    return texts, scored, np.array(in_sample, np.int8)


def _class_of(subject: LoadedSubject, token: int) -> str:
    return token_type(subject.tokenizer.decode([token]))


def _require_finite(readings: Arrays, texts: list[Text]) -> None:
    bad = np.argwhere(~np.isfinite(readings["target_log_probability"] + readings["entropy"]))
    if len(bad):
        array_slot, token = bad[0]
        prompt = texts[int(readings["text"][token])].id
        raise UserError(
            f"logit lens: no finite probability at slot {array_slot + EMBEDDING} on prompt {prompt}; "
            "check the weights, or measure with --dtype float32"
        )


def _dataset(subject: LoadedSubject, texts: list[Text], scored: list[TokenText], readings: Arrays) -> xr.Dataset:
    codes = np.array([TOKEN_TYPES.index(_class_of(subject, int(token))) for token in readings["target"]], np.int8)
    counts = [len(text.targets) for text in scored]
    variables = {name: variable(dims, readings[name], unit, says) for name, (dims, unit, says) in READINGS.items()}
    variables |= {
        "token_type": variable("token", codes, "1", "class of the target, index into the token types"),
        "token_prompt": variable("token", readings["text"].astype(np.int32), "1", "index of the token's prompt"),
        "scored_tokens": variable("prompt", counts, "token", "tokens read of the prompt"),
    }
    coords = {
        "slot": np.arange(subject.decoder.n_layers + 1) + EMBEDDING,
        "layer": np.arange(subject.decoder.n_layers),
        "prompt_id": ("prompt", [text.id for text in texts]),
        "category": ("prompt", [text.category for text in texts]),
    }
    settings = {"vocabulary": subject.facts.vocabulary, "tied_embeddings": subject.facts.tied}
    return xr.Dataset(variables, coords, {"settings": json.dumps(settings)})


#: name in a measured record -> dimensions, unit, description
READINGS = {
    "rank": (("slot", "token"), "rank", "entries of greater float32 logit than the target's, half of the ties"),
    "target_log_probability": (("slot", "token"), "nat", "log-probability of the target, float32 head"),
    "entropy": (("slot", "token"), "nat", "entropy of the lens distribution, float32 head"),
    "top_probability": (("slot", "token"), "probability", "largest probability of the lens distribution, float32 head"),
    "kl": (("slot", "token"), "nat", "KL(final distribution || lens distribution), float32 head"),
    "step_kl": (("layer", "token"), "nat", "KL(lens after the layer || lens before it), float32 head"),
    "bfloat16_rank": (("slot", "token"), "rank", "entries with a greater bfloat16 logit than the target's"),
    "bfloat16_ties": (("slot", "token"), "entry", "other entries with the target's bfloat16 logit"),
    "bfloat16_target_log_probability": (("slot", "token"), "nat", "log-probability of the target, bfloat16 logits"),
    "bfloat16_entropy": (("slot", "token"), "nat", "entropy of the lens distribution, bfloat16 logits"),
    "residual_norm": (("slot", "token"), "norm", "norm of the residual stream"),
    "update_similarity": (("layer", "token"), "1", "cosine of the layer's update with the update of the layer before"),
    "repeats_input": ("token", "1", "1 where the target is the token it is predicted from, else 0"),
    "in_sample": ("token", "1", "1 at the regular steps, 0 for numbers read between them"),
}

_KERNELS = "twice what AVX2 kernels moved it by, against AVX-512, on 698 tokens"
_COUNT = Tolerance(0.05, 12, f"{_KERNELS}: up to 7 tokens")
_FRACTION = Tolerance(0.02, 0.04, f"{_KERNELS}: up to 0.02")
_RANK = Tolerance(0.08, 4, f"{_KERNELS}: up to 3 ranks, or 4 %")
_MEDIAN_RANK = Tolerance(0.18, 4, f"{_KERNELS}: up to 9 % (Gemma 3, bfloat16 logits)")
_OF_THE_TEXT = Tolerance(0, 0, "the corpus alone decides")
TOLERANCES = {
    "": Tolerance(0.02, 0.02, "AVX2 kernels moved states by up to 1 %, against AVX-512"),
    "scored_token_count": _OF_THE_TEXT,
    "repeated_target_count": _OF_THE_TEXT,
    "token_type_count": _OF_THE_TEXT,
    "prompt_count_by_category": _OF_THE_TEXT,
    "hurt_count": _COUNT,
    "crystallization_histogram": _COUNT,
    "hurt_fraction": _FRACTION,
    "conditional_hurt_rate": _FRACTION,
    "confident_fraction": _FRACTION,
    "confident_accuracy": Tolerance(0.02, 0.2, f"{_KERNELS}: 0.1, which is one of ten confident tokens (Gemma 3)"),
    "lens_tied_fraction": Tolerance(0.02, 0.06, f"{_KERNELS}: 0.03, the ties of 8-bit logits"),
    "token_type_top1_accuracy": Tolerance(0.02, 0.07, f"{_KERNELS}: 0.03, which is one of 33 tokens"),
    "token_type_log_rank": _FRACTION,
    "token_type_mean_rank": Tolerance(0.1, 15, f"{_KERNELS}: 8 ranks"),
    "lens_mean_rank": _RANK,
    "lens_median_rank": _MEDIAN_RANK,
    "crystallization_layer_median": Tolerance(0, 1, "a median of whole layers moves in halves"),
    "token_type_crystallization_median": Tolerance(0, 1, "a median of whole layers moves in halves"),
    "token_type_crystallization_mean": Tolerance(0.02, 0.2, f"{_KERNELS}: 0.1 layer"),
    "number_delay_at_equal_surprisal": Tolerance(0.02, 0.2, f"{_KERNELS}: 0.08 layer"),
    "number_delay_within_category": Tolerance(0.02, 0.2, f"{_KERNELS}: 0.08 layer for its sibling; numbers are few"),
}
EXPERIMENT = Experiment(
    id="T-1",
    title="Logit lens",
    question="How does the prediction of the next token develop over depth?",
    record=LogitLens,
    measure=measure,
    budgets={
        "quick": Budget(prompts=None, tokens=None, stride=6, batch_tokens=2048),
        "full": Budget(prompts=None, tokens=None, stride=1, batch_tokens=8192),
    },
    tolerances=TOLERANCES | {f"bfloat16_{name}": tolerance for name, tolerance in TOLERANCES.items() if name},
)
