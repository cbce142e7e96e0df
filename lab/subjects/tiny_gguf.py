"""A tiny GGUF file to calibrate conversion on: a Qwen2 of two layers over bytes, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

LAYERS, WIDTH, HEADS, MLP = 2, 32, 4, 48
SHAPES = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_q.bias": (WIDTH,),
    "attn_k.weight": (WIDTH // 2, WIDTH),
    "attn_k.bias": (WIDTH // 2,),
    "attn_v.weight": (WIDTH // 2, WIDTH),
    "attn_v.bias": (WIDTH // 2,),
    "attn_output.weight": (WIDTH, WIDTH),
    "ffn_norm.weight": (WIDTH,),
    "ffn_gate.weight": (MLP, WIDTH),
    "ffn_up.weight": (MLP, WIDTH),
    "ffn_down.weight": (WIDTH, MLP),
}


def tokens() -> list[str]:
    """The vocabulary: every byte, two merges, two special tokens.

    A list of a single merge is read as a string by some versions of Transformers.
    """
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "ab", "<|endoftext|>", "<|im_end|>"]


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by GGUF's names; the head is a slightly disturbed copy of the embedding, as quantizers leave it."""
    generator = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (0.2 * generator.standard_normal(shape)).astype(np.float32)

    found = {f"blk.{layer}.{name}": draw(shape) for layer in range(LAYERS) for name, shape in SHAPES.items()}
    embedding = draw((len(tokens()), WIDTH))
    head = (embedding * (1 + 0.02 * draw(embedding.shape))).astype(np.float32)
    return found | {"token_embd.weight": embedding, "output.weight": head, "output_norm.weight": draw((WIDTH,))}


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write these weights with the metadata that conversion needs; the path."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens())
    writer.add_token_types([1] * (len(tokens()) - 2) + [3, 3])
    writer.add_token_merges(["Ġ a", "a b"])
    writer.add_bos_token_id(len(tokens()) - 2)
    writer.add_eos_token_id(len(tokens()) - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
