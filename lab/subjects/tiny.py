"""Tiny decoders with random weights, one per architecture: systems on which instruments are calibrated.

Weights are drawn much wider than a fresh model's, so that every layer matters and a wrong mask or a
wrong rotary embedding shows in the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 89
LAYERS = 5

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]

#: model type of Transformers -> what it needs beside the common settings
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": _ALTERNATING, "final_logit_softcapping": 5.0},
    "gpt2": {},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "lm_head_multiplier": 0.5,
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
}


def tiny(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny causal language model in float32, in evaluation mode.

    Args:
        architecture: a key of `ARCHITECTURES`.
        seed: of the random weights.
        changes: settings of the configuration to override.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _COMMON | ARCHITECTURES[architecture] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.25, generator=generator)
        else:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)
