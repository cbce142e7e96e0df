"""Everything that the logit lens experiment reads about the scored tokens of a batch, as arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lab.corpora.batches import TokenBatch
from lab.memory import keep_freed_memory
from lab.residual.executor import Executor
from lab.residual.lens import Lens
from lab.store import Arrays
from lab.subjects.anatomy import Decoder


class LensReader:
    """Traces a batch once and reads the states at its n scored positions at all L + 1 depths.

    Both settings are read from the same states: a float32 head, and bfloat16 logits as published.
    """

    def __init__(self, decoder: Decoder):
        if decoder.device.type == "cpu":
            keep_freed_memory()
        self.executor = Executor(decoder)
        self.sound = Lens(decoder, torch.float32)
        self.published = Lens(decoder, torch.bfloat16, divergences=False)

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> Arrays:
        """Readings [L + 1, n], similarity of updates [L, n]; per token [n] its text, target and whether it repeats."""
        scored = batch.scored
        states = torch.stack([state[scored.row, scored.position] for _, state in self.executor.trace(batch)])
        sound, published = self.sound.read(states, scored.target), self.published.read(states, scored.target)
        arrays = {
            "rank": sound.mid_rank,
            "target_log_probability": sound.target_log_probability,
            "entropy": sound.entropy,
            "top_probability": sound.top_probability,
            "kl": sound.kl,
            "step_kl": sound.step_kl[1:],
            "bfloat16_rank": published.greater,
            "bfloat16_ties": published.ties,
            "bfloat16_target_log_probability": published.target_log_probability,
            "bfloat16_entropy": published.entropy,
            "residual_norm": states.float().norm(dim=-1),
            "update_similarity": update_similarity(states),
            "repeats_input": (batch.ids[scored.row, scored.position] == scored.target).to(torch.int8),
            "target": scored.target,
            "text": torch.tensor(batch.texts)[scored.row.cpu()],
        }
        return {name: values.cpu().numpy() for name, values in arrays.items()}


def update_similarity(states: Tensor) -> Tensor:
    """Cosine of each layer's update with that of the layer before [L, n], from states [L + 1, n, d]; NaN at layer 0."""
    similarity = torch.full((len(states) - 1, states.shape[1]), np.nan, device=states.device)
    before = states[1].float() - states[0].float()
    for layer in range(1, len(states) - 1):
        update = states[layer + 1].float() - states[layer].float()
        similarity[layer] = torch.cosine_similarity(update, before, dim=-1)
        before = update
    return similarity
