"""The tensors of a planning and synthesis music system (`acestep`), from its four configurations.

A language model plans, a diffusion transformer (DiT) denoises latents under conditions from lyrics, timbre and
text, a quantizer and a detokenizer translate between latents and the planner's codes, and an autoencoder turns
latents into audio. One file holds DiT, encoders, tokenizer and detokenizer; names are that file's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from lab.architectures import oobleck, shapes
from lab.architectures.shapes import Shape, Shapes, Widths, attention, gated_mlp, joined, linear, rms_norm, stack, under

#: roles of the configurations, each a folder of its own
ROLES = ("dit", "lm", "vae", "text_embedder")

#: component -> role and how the names of its tensors begin; the first that fits
COMPONENTS: dict[str, tuple[str, str]] = {
    "lm_planner": ("lm", ""),
    "dit_layers": ("dit", "decoder.layers."),
    "dit_time_embeddings": ("dit", "decoder.time_embed"),
    "dit_other": ("dit", "decoder."),
    "lyric_encoder": ("dit", "encoder.lyric_encoder."),
    "timbre_encoder": ("dit", "encoder.timbre_encoder."),
    "text_projector": ("dit", "encoder.text_projector."),
    "attention_pooler": ("dit", "tokenizer.attention_pooler."),
    "audio_acoustic_projection": ("dit", "tokenizer.audio_acoustic_proj."),
    "fsq_quantizer": ("dit", "tokenizer.quantizer."),
    "audio_detokenizer": ("dit", "detokenizer."),
    "null_condition_embedding": ("dit", "null_condition_emb"),
    "vae_encoder": ("vae", "encoder."),
    "vae_decoder": ("vae", "decoder."),
    "text_embedder": ("text_embedder", ""),
}

#: stack -> role, field that says how many layers it has, and whether its attention is causal
STACKS: dict[str, tuple[str, str, bool]] = {
    "lm_planner": ("lm", "num_hidden_layers", True),
    "dit": ("dit", "num_hidden_layers", False),
    "lyric_encoder": ("dit", "num_lyric_encoder_hidden_layers", False),
    "timbre_encoder": ("dit", "num_timbre_encoder_hidden_layers", False),
    "attention_pooler": ("dit", "num_attention_pooler_hidden_layers", False),
    "audio_detokenizer": ("dit", "num_attention_pooler_hidden_layers", False),
    "text_embedder": ("text_embedder", "num_hidden_layers", True),
}
SLIDING = "sliding_attention"
TIME_CHANNELS = 256  #: sinusoidal features of a timestep
MODULATED = 6  #: shift, scale and gate of self-attention and MLP

Config = Mapping[str, Any]
Configs = Mapping[str, Config]


def widths(config: Config) -> Widths:
    """Sizes of a layer of any of the stacks."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return Widths(*(config[name] for name in names))


def layers_of(name: str) -> str:
    """How the names of the tensors in a stack's layers begin, layers as `{i}`."""
    start = COMPONENTS["dit_layers"][1] if name == "dit" else f"{COMPONENTS[name][1]}layers."
    return f"{start}{{i}}."


def component_of(role: str, name: str) -> str | None:
    """The component that a tensor of a role's checkpoint belongs to; None if it is none of the census."""
    return next((part for part, (own, start) in COMPONENTS.items() if own == role and name.startswith(start)), None)


def census(role: str, table: Mapping[str, Shape]) -> dict[str, Shapes]:
    """A checkpoint's tensors by component."""
    found: dict[str, Shapes] = {}
    for name, shape in table.items():
        found.setdefault(component_of(role, name) or "unclassified", {})[name] = shape
    return found


def components(configs: Configs) -> dict[str, Shapes]:
    """The tensors of every component whose configuration is here, in the order of the census."""
    built = {"dit": dit_file, "lm": language_model, "vae": oobleck.autoencoder, "text_embedder": language_model}
    found: dict[str, Shapes] = {}
    for role in ROLES:
        if role in configs:
            found |= census(role, built[role](configs[role]))
    return {name: found[name] for name in COMPONENTS if name in found}


def language_model(config: Config) -> Shapes:
    """A Qwen3 without head, under the names that it has as a model of its own."""
    table = shapes.decoder(widths(config), config["num_hidden_layers"], config["vocab_size"], qk_norm=True, head=False)
    return {name.removeprefix("model."): shape for name, shape in table.items()}


def dit_file(config: Config) -> Shapes:
    """Everything that lies in one file with the diffusion transformer."""
    d, text = config["hidden_size"], config["text_hidden_dim"]
    acoustic, levels = config["audio_acoustic_hidden_dim"], config["fsq_input_levels"]
    token, window = {"special_token": (1, 1, d)}, {"special_tokens": (1, config["pool_window_size"], d)}
    fsq = config["fsq_dim"]
    quantizer = joined(under("project_in", linear(fsq, len(levels))), under("project_out", linear(len(levels), fsq)))
    tokenizer = joined(
        under("audio_acoustic_proj", linear(acoustic, d)),
        under("attention_pooler", joined(_encoder(config, "attention_pooler", d), token)),
        under("quantizer", quantizer),
    )
    encoder = joined(
        {"text_projector.weight": (d, text)},
        under("lyric_encoder", _encoder(config, "lyric_encoder", text)),
        under("timbre_encoder", joined(_encoder(config, "timbre_encoder", config["timbre_hidden_dim"]), token)),
    )
    back = under("proj_out", linear(d, acoustic))
    return joined(
        under("decoder", transformer(config)),
        under("encoder", encoder),
        under("tokenizer", tokenizer),
        under("detokenizer", joined(_encoder(config, "audio_detokenizer", d), window, back)),
        {"null_condition_emb": (1, 1, d)},
    )


def transformer(config: Config) -> Shapes:
    """The diffusion transformer."""
    d, patch, acoustic = config["hidden_size"], config["patch_size"], config["audio_acoustic_hidden_dim"]
    return joined(
        stack(transformer_layer(widths(config)), config["num_hidden_layers"]),
        *(under(name, time_embedding(d)) for name in ("time_embed", "time_embed_r")),
        under("proj_in.1", shapes.convolution(config["in_channels"], d, patch)),
        under("condition_embedder", linear(d, d)),
        under("norm_out", rms_norm(d)),
        under("proj_out.1", shapes.transposed_convolution(d, acoustic, patch)),
        {"scale_shift_table": (1, 2, d)},
    )


def transformer_layer(own: Widths) -> Shapes:
    """Self-attention, cross-attention and MLP, each with a norm before it, and the table that AdaLN adds."""
    blocks = {
        "self_attn": attention(own, qk_norm=True),
        "cross_attn": attention(own, qk_norm=True),
        "mlp": gated_mlp(own),
    }
    norms = (under(f"{name}_norm", rms_norm(own.width)) for name in blocks)
    table = {"scale_shift_table": (1, MODULATED, own.width)}
    return joined(*(under(name, block) for name, block in blocks.items()), *norms, table)


def plain_layer(own: Widths) -> Shapes:
    """The layer of planner, encoders, pooler and detokenizer: Qwen3's."""
    return shapes.layer(own, qk_norm=True)


def time_embedding(d: int) -> Shapes:
    """Two dense layers on a timestep's sinusoidal features, and the projection that all layers share."""
    return joined(
        under("linear_1", linear(TIME_CHANNELS, d)),
        under("linear_2", linear(d, d)),
        under("time_proj", linear(d, MODULATED * d)),
    )


def sliding_layers(configs: Configs, name: str) -> int:
    """Layers of a stack whose attention sees a band only; every stack takes the first entries of one list."""
    role, field, _ = STACKS[name]
    types: Sequence[str] = configs[role].get("layer_types") or ["full_attention"] * configs[role][field]
    return types[: configs[role][field]].count(SLIDING)


def fsq_codes(config: Config) -> int:
    """Codes that the quantizer can tell apart: the product of its levels."""
    return prod(config["fsq_input_levels"])


def rates(configs: Configs) -> dict[str, float]:
    """Samples, latents, patches and tokens per second."""
    audio, own = configs["vae"]["sampling_rate"], configs["dit"]
    latent = audio / oobleck.downsampling(configs["vae"])
    return {
        "audio": audio,
        "vae_latent": latent,
        "dit_patch": latent / own["patch_size"],
        "fsq_token": latent / own["pool_window_size"],
    }


def _encoder(config: Config, name: str, inputs: int) -> Shapes:
    depth = config[STACKS[name][1]]
    d = config["hidden_size"]
    layers = stack(plain_layer(widths(config)), depth)
    return joined(under("embed_tokens", linear(inputs, d)), layers, under("norm", rms_norm(d)))
