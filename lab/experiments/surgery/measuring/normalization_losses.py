"""Losses of decoders with replaced norms on the scored texts. Losses that are not finite are results, no errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lab.corpora.batches import TokenBatch, TokenText, token_batches
from lab.experiments.surgery.normalization import Budget
from lab.normalization.sites import Norms
from lab.normalization.surgery import Renormed, Rule
from lab.residual.executor import Executor, Variant
from lab.residual.programs import Program, identity
from lab.residual.readouts import CompletionLoss
from lab.residual.sweeps import HEAD_DTYPES, Sample
from lab.store import Arrays, Sweep
from lab.subjects.anatomy import Decoder


@dataclass(frozen=True)
class Scorer:
    """Runs programs of replaced layers and reads the loss of each text.

    Attributes:
        decoder, norms: the model under study.
        sample: the scored texts.
        sweep: keeps results, so that an interrupted measurement resumes.
        budget: see `Budget`.
    """

    decoder: Decoder
    norms: Norms
    sample: Sample
    sweep: Sweep
    budget: Budget
    _alone: dict[bool, list[TokenBatch]] = field(default_factory=dict)

    def intact(self) -> np.ndarray:
        """Losses of the intact model [prompt], always measured anew."""
        found: np.ndarray = self._losses({"intact": identity(self.decoder.n_layers)}, {}, self.decoder, alone=False)[0]
        return found

    def renormed(self, name: str, roles: Sequence[str], rule: Rule, *, alone: bool = False) -> np.ndarray:
        """Losses with the norms of some roles replaced in all layers [prompt], nat/token; NaN where not finite.

        Args:
            name: of the replacement.
            roles: whose norms.
            rule: by what.
            alone: run every text in a batch of its own, for norms that look at the whole sequence.
        """
        changed = Renormed(self.decoder, self.norms, tuple(roles), rule)

        def compute() -> Arrays:
            variants, program = changed.program(name)
            return {"loss": self._losses({name: program}, variants, changed.readable(), alone=alone)[0]}

        return self.sweep.shard(f"whole model: {name}", compute)["loss"]

    def trained(self, changed: Renormed) -> np.ndarray:
        """Losses of a decoder whose norms hold what they have learned [prompt]."""
        variants, program = changed.program("trained")
        found: np.ndarray = self._losses({"trained": program}, variants, changed.readable(), alone=True)[0]
        return found

    def single_layers(self, what: str, roles: Sequence[str], rule: Rule) -> np.ndarray:
        """Losses with the norms of some roles replaced in one layer after the other [layer, prompt]."""
        n = self.decoder.n_layers

        def compute() -> Arrays:
            changed = Renormed(self.decoder, self.norms, tuple(roles), rule)
            made = [changed.program(what, [layer]) for layer in range(n)]
            variants = {name: variant for own, _ in made for name, variant in own.items()}
            programs = {f"layer {layer}": program for layer, (_, program) in enumerate(made)}
            return {"loss": self._losses(programs, variants, self.decoder, alone=False, what=what)}

        return self.sweep.shard(f"single layers: {what}", compute)["loss"]

    def _losses(
        self,
        programs: Mapping[str, Program],
        variants: Mapping[str, Variant],
        readable: Decoder,
        *,
        alone: bool,
        what: str = "",
    ) -> np.ndarray:
        """Mean loss of the scored tokens [program, prompt]."""
        executor = Executor(self.decoder, variants=variants)
        losses = np.full((len(programs), len(self.sample.texts)), np.nan)
        batches = self._batches(alone)
        for number, batch in enumerate(batches):
            read = CompletionLoss(
                readable, batch.to(self.decoder.device), head_dtype=HEAD_DTYPES[self.budget.head_dtype]
            )
            sums = executor.run(batch, list(programs.values()), read)["loss"].double().numpy()
            losses[:, list(batch.texts)] = sums / self.sample.scored_tokens[list(batch.texts)]
            if what:
                self.sweep.progress(number + 1, len(batches), what)
        losses[~np.isfinite(losses)] = np.nan
        return losses

    def _batches(self, alone: bool) -> list[TokenBatch]:
        if alone not in self._alone:
            texts = self.sample.texts
            self._alone[alone] = unpadded(texts) if alone else token_batches(texts, self.budget.batch_tokens)
        return self._alone[alone]


def unpadded(texts: Sequence[TokenText]) -> list[TokenBatch]:
    """Each text as a batch of its own; `texts` of a batch are indices into the sequence."""
    batches = []
    for index, text in enumerate(texts):
        (batch,) = token_batches([text], len(text.ids))
        batches.append(TokenBatch((index,), batch.ids, batch.lengths, batch.scored))
    return batches
