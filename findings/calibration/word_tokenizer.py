"""A tokenizer that knows every word of the committed minimal pairs and contrastive groups, each as one token."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lab.corpora.byte_tokenizer import CHAT, END, START
from lab.corpora.contrastive_groups import load_contrastive_groups
from lab.corpora.minimal_pairs import load_minimal_pairs


def word_tokenizer() -> Any:
    """A byte-level BPE tokenizer that has merged what it was trained on to the end: no pair and no family is unfit."""
    groups, pairs = load_contrastive_groups(), load_minimal_pairs()
    texts = [groups.system_message, *(group.prompt for group in groups.groups)]
    texts += [lead + text for group in groups.groups for text in group.completions for lead in ("", " ")]
    texts += [text for pair in pairs for text in (pair.clean + pair.answer, pair.corrupted + pair.corrupted_answer)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=10_000, min_frequency=0, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, additional_special_tokens=[START])
    tokenizer.chat_template = CHAT
    return tokenizer
