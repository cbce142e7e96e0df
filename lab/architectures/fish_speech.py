"""The tensors of a dual autoregressive speech model (`fish_qwen3_omni`), from its configuration.

A Slow AR over frames (a decoder with norms on queries and keys, embedding tied to its head) and a Fast AR over
the codebooks of one frame (the same layer without those norms, with a head of its own). Projections of queries,
keys and values are packed into one matrix. Names are those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lab.architectures import shapes
from lab.architectures.shapes import Shapes, Widths, joined, linear, rms_norm, under

SLOW, FAST = "text_model", "audio_decoder"
CODEBOOK_TABLE = f"{FAST}.codebook_embeddings.weight"
KINDS = ("attention", "mlp", "norm", "embedding", "output_head")
STACKS = {SLOW: f"{SLOW}.model.layers", FAST: f"{FAST}.layers"}

Config = Mapping[str, Any]


def widths(part: Config) -> Widths:
    """Sizes of a layer from `text_config` or `audio_decoder_config`."""
    return Widths(part["dim"], part["intermediate_size"], part["n_head"], part["n_local_heads"], part["head_dim"])


def layer(part: Config) -> Shapes:
    """One layer, of either stack."""
    own = widths(part)
    packed = (own.heads + 2 * own.kv_heads) * own.head_dim
    norms = [under(name, rms_norm(own.head_dim)) for name in ("q_norm", "k_norm")]
    attention = joined(
        under("wqkv", linear(own.width, packed, bias=part["attention_qkv_bias"])),
        under("wo", linear(own.heads * own.head_dim, own.width, bias=part["attention_o_bias"])),
        *(norms if part["attention_qk_norm"] else []),
    )
    mlp = joined(
        under("w1", linear(own.width, own.mlp_width, bias=False)),
        under("w2", linear(own.mlp_width, own.width, bias=False)),
        under("w3", linear(own.width, own.mlp_width, bias=False)),
    )
    return joined(
        under("attention", attention),
        under("feed_forward", mlp),
        under("attention_norm", rms_norm(own.width)),
        under("ffn_norm", rms_norm(own.width)),
    )


def slow_ar(config: Config) -> Shapes:
    """All tensors of the Slow AR."""
    part = config["text_config"]
    model = joined(
        {"embeddings.weight": (part["vocab_size"], part["dim"])},
        shapes.stack(layer(part), part["n_layer"]),
        under("norm", rms_norm(part["dim"])),
        {} if part["tie_word_embeddings"] else {"output.weight": (part["vocab_size"], part["dim"])},
    )
    return under(f"{SLOW}.model", model)


def fast_ar(config: Config) -> Shapes:
    """All tensors under the Fast AR's name: its own, and the table with a row per codebook and code."""
    part = config["audio_decoder_config"]
    same = part["text_dim"] == part["dim"]
    projection = {} if same else under("project_in", linear(part["text_dim"], part["dim"]))
    model = joined(
        {"codebook_embeddings.weight": (part["num_codebooks"] * part["vocab_size"], part["text_dim"])},
        {"embeddings.weight": (part["vocab_size"], part["dim"])},
        projection,
        shapes.stack(layer(part), part["n_layer"]),
        under("norm", rms_norm(part["dim"])),
        {} if part["tie_word_embeddings"] else {"output.weight": (part["vocab_size"], part["dim"])},
    )
    return under(FAST, model)


def tensors(config: Config) -> Shapes:
    """All tensors of the checkpoint's safetensors files; the codec lies in a file of its own."""
    return joined(slow_ar(config), fast_ar(config))


def kind(name: str) -> str:
    """What a tensor is for: one of `KINDS`; norms on queries and keys are norms."""
    if "norm" in name:
        return "norm"
    if "embeddings" in name:
        return "embedding"
    if ".attention." in name:
        return "attention"
    return "mlp" if ".feed_forward." in name else "output_head"


def multiply_adds(config: Config) -> dict[str, int]:
    """Multiplications with weights per frame of either stack, lookups and attention scores left out.

    The Slow AR runs once, head included. The Fast AR runs once per codebook: the hidden state, then the codes;
    the first codebook's code comes from the Slow AR, so that it predicts one fewer.
    """
    slow, fast = config["text_config"], config["audio_decoder_config"]
    own = {name: widths(part) for name, part in (("slow_ar", slow), ("fast_ar", fast))}
    layers = {name: found.attention_parameters + found.mlp_parameters for name, found in own.items()}
    heads = {"slow_ar": slow["vocab_size"] * slow["dim"], "fast_ar": fast["vocab_size"] * fast["dim"]}
    books = fast["num_codebooks"]
    return {
        "slow_ar": slow["n_layer"] * layers["slow_ar"] + heads["slow_ar"],
        "fast_ar": books * fast["n_layer"] * layers["fast_ar"] + (books - 1) * heads["fast_ar"],
    }
