"""Tiny decoders with random weights, one per architecture: systems on which instruments are calibrated.

Weights are drawn much wider than a fresh model's, so that every layer matters and a wrong mask or a
wrong rotary embedding shows in the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lab.subjects.facts import Facts, Local

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.subjects.loading import LoadedSubject

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
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
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


def loaded(model: Any, name: str = "tiny") -> LoadedSubject:
    """A tiny model as a loaded subject, without tokenizer or files."""
    from lab.subjects.anatomy import Decoder
    from lab.subjects.loading import LoadedSubject

    decoder = Decoder(model)
    config = decoder.config
    facts = Facts(
        name=name,
        architecture=config.model_type,
        layers=decoder.n_layers,
        width=decoder.width,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        head_dim=getattr(config, "head_dim", None) or decoder.width // config.num_attention_heads,
        mlp_width=getattr(config, "intermediate_size", 4 * decoder.width),
        vocabulary=decoder.vocabulary,
        tied=bool(config.tie_word_embeddings),
        parameters=sum(weight.numel() for weight in model.parameters()),
        licence="none",
        size_bytes=sum(weight.nbytes for weight in model.parameters()),
        frame="plain",
        device="cpu",
        source=Local(Path()),
    )
    return LoadedSubject(facts, model, None, decoder, name, decoder.dtype, decoder.device)


def random_corpus(lengths: Sequence[tuple[int, int]] = ((7, 5), (4, 9), (9, 3)), seed: int = 0) -> Corpus:
    """Texts of random tokens with so many prompt and completion tokens; the user's words begin at token 2."""
    from lab.corpora.corpus import Corpus, Text

    generator = torch.Generator().manual_seed(seed)
    texts = []
    for index, (prompt, completion) in enumerate(lengths):
        ids = tuple(torch.randint(VOCABULARY, (prompt + completion,), generator=generator).tolist())
        texts.append(Text(f"p{index}", "random", ids[:prompt], ids[prompt:], (2, prompt), (True,) * completion))
    return Corpus("tiny", tuple(texts), None, {}, {}, ("random",))
