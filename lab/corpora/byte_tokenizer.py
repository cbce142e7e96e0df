"""A tokenizer of one token per byte, on which corpora are calibrated: its ids and offsets can be checked by eye."""

from __future__ import annotations

from typing import Any

START, END = "<|im_start|>", "<|im_end|>"

#: a chat template in the style of Qwen and SmolLM2, without a system prompt of its own
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str = CHAT, **specials: str) -> Any:
    """A fast Transformers tokenizer: 256 bytes, a start and an end marker; nothing is ever merged.

    Args:
        template: its chat template; empty for none.
        specials: further special tokens by role, e.g. `bos_token`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, additional_special_tokens=[START], **specials
    )
    tokenizer.chat_template = template
    return tokenizer
