"""GGUF files as Transformers models: converted once to float32 safetensors, with what the format loses put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

from lab.errors import UserError, first_line
from lab.subjects.configuration import CPU_LIMIT_BYTES, slug
from lab.subjects.facts import Facts, Local, Wheels

#: raise it when a change below changes the converted model; copies of older conversions are made again
CONVERSION = 1

#: relative distance up to which two matrices count as one matrix, quantized twice (5 bits: about 0.04)
SAME_MATRIX = 0.1

#: GGUF architecture -> Transformers' model_type, where the two differ
_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


def convert(gguf: Path, folder: Path, facts: Facts) -> None:
    """Write the model and the tokenizer of a GGUF file to `folder`, dequantized to float32.

    Raises:
        UserError: Transformers cannot read the file, or the result is not the model that the catalog describes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"Transformers cannot convert {gguf} ({first_line(error)})") from error
        _forget_quantization(model)
        if facts.tied:
            tie(model, facts.name)
        repair_tokenizer(tokenizer, _fields(gguf), model.config.max_position_embeddings)
        if isinstance(facts.source, Wheels):
            require_facts(model.config, facts)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def tie(model: Any, name: str) -> None:
    """Make embedding and LM head one matrix again, if the file holds them as two quantized copies.

    The copy of the head is kept: quantizers give it more bits than the embedding.
    """
    import torch

    if model.config.tie_word_embeddings:
        return
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        distance = float(torch.linalg.norm(embedding - head) / torch.linalg.norm(head))
        if not distance < SAME_MATRIX:
            raise UserError(f"embedding and head of {name} should be one matrix, but differ by {distance:.0%}")
        embedding.copy_(head)
    model.config.tie_word_embeddings = True
    model.tie_weights()


def repair_tokenizer(tokenizer: Any, fields: dict[str, Any], context: int) -> None:
    """Put back what is lost between GGUF and Transformers for the tokenizers that we know.

    SmolLM's splits digits off before anything else (without it, spaces before numbers are other
    tokens); Qwen2's composes Unicode (NFC) and has no start token.
    """
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    scheme = fields.get("tokenizer.ggml.pre")
    if scheme == "smollm":
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif scheme == "qwen2":
        backend.normalizer = normalizers.NFC()
        tokenizer.bos_token = None
    tokenizer.model_max_length = context


def require_facts(config: Any, facts: Facts) -> None:
    """Raise UserError unless the configuration is that of the subject described."""
    width, heads = config.hidden_size, config.num_attention_heads
    found = {
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "width": width,
        "heads": heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or width // heads,
        "mlp_width": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "tied": config.tie_word_embeddings,
    }
    expected = {field: getattr(facts, field) for field in found}
    wrong = [f"{field} {found[field]} instead of {value}" for field, value in expected.items() if found[field] != value]
    if wrong:
        raise UserError(f"the weights of {facts.name} are of another model: {', '.join(wrong)}; mend its catalog entry")


def facts_of_gguf(path: Path) -> Facts:
    """Facts of a model given as a GGUF file, from its metadata."""
    fields = _fields(path)
    kind = fields["general.architecture"]

    def size(key: str, default: int | None = None) -> int:
        value = fields.get(f"{kind}.{key}", default)
        if value is None:
            raise UserError(f"{path} has no {kind}.{key}; it does not describe a decoder")
        return int(max(value) if isinstance(value, list) else value)

    shapes = fields["tensors"]
    width, heads = size("embedding_length"), size("attention.head_count")
    parameters = sum(prod(shape) for shape in shapes.values())
    return Facts(
        name=slug(path.stem),
        architecture=_MODEL_TYPES.get(kind, kind),
        layers=size("block_count"),
        width=width,
        heads=heads,
        kv_heads=size("attention.head_count_kv", heads),
        head_dim=size("attention.key_length", width // heads),
        mlp_width=size("feed_forward_length"),
        vocabulary=shapes["token_embd.weight"][-1],
        tied="output.weight" not in shapes,
        parameters=parameters,
        licence=str(fields.get("general.license", "unknown")),
        size_bytes=path.stat().st_size,
        frame="chat" if fields.get("tokenizer.chat_template") else "plain",
        device="gpu" if 2 * parameters > CPU_LIMIT_BYTES else "cpu",
        source=Local(path),
    )


def _fields(path: Path) -> dict[str, Any]:
    """Metadata of a GGUF file, long arrays left out, and under `tensors` the shapes of its tensors."""
    try:
        reader = _reader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if len(field.data) < 1000}
        tensors = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
    if "general.architecture" not in fields or "token_embd.weight" not in tensors:
        raise UserError(f"{path} is not the GGUF file of a language model")
    return {**fields, "tensors": tensors}


def _reader(path: Path) -> Any:
    """gguf's reader of a file, but one that does not read on behind its end.

    The library's takes what is missing there for empty, and an array of 2^60 numbers, which a damaged length promises,
    for 2^60 empty ones: it counts them until memory is full.
    """
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **named)
            if len(found) < int(count):
                raise ValueError(f"it ends before the field at byte {offset}")
            return found

    return Reader(path)


def _forget_quantization(model: Any) -> None:
    # The weights are plain float32 now; with these left, save_pretrained refuses or writes a lie.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers' own progress bars, one of which heeds no setting but the stream; ours tell more."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()
