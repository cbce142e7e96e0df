"""Facts of a model outside the catalog, read from its configuration and tensor headers; nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from lab import files
from lab.errors import UserError
from lab.subjects.facts import Facts, Source

#: a subject whose weights take more than this in bfloat16 is marked as needing a GPU
CPU_LIMIT_BYTES = 4 * 2**30

#: the field's name in most configurations, then in older ones
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "mlp_width": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "vocabulary": ("vocab_size",),
}

#: no model has a size beyond; larger numbers are damage
LARGEST_SIZE = 2**31


def slug(text: str) -> str:
    """A name in the catalog's style: lowercase letters, digits, dots and single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def safetensors_of(folder: Path) -> list[Path]:
    """The folder's weight files: those that its index names, `model.safetensors`, or all there are.

    Raises:
        UserError: there are none or one is missing; pickles are not read, because unpickling runs
            whatever code they hold.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        named = _named_in(index)
        missing = [name for name in named if not (folder / name).exists()]
        if missing or not named:
            raise UserError(f"{folder} lacks {' and '.join(missing) or 'its weights'}; fetch or copy the model again")
        return [folder / name for name in named]
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read; "
            "save the model again with save_pretrained, which writes safetensors"
        )
    raise UserError(f"{folder} holds no *.safetensors; give a folder written by save_pretrained, or a .gguf file")


def _named_in(index: Path) -> list[str]:
    """The files that an index names; names that lead out of the folder are refused."""
    table = read_config(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index} has no proper weight_map; fetch or copy the model again")
    outside = sorted(name for name in table.values() if Path(name).name != name or name in ("", "..") or "\0" in name)
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, which is no file of its folder; fetch or copy the model again")
    return sorted(set(table.values()))


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, from its header; no tensor is read."""
    return {name: shape for name, (shape, _) in tensor_headers(file).items()}


def tensor_headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype (safetensors' name of it, `BF16`) of every tensor of a file.

    Raises:
        UserError: the file is damaged or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks that names, offsets and the file's length fit each other; a tensor is read when asked for.
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return {name: (tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{file} is not a whole safetensors file ({what}); fetch or save it again") from error


def facts_of_folder(folder: Path, source: Source, name: str) -> Facts:
    """Facts of a folder as `save_pretrained` writes it.

    Raises:
        UserError: no configuration, pickled weights only, or a configuration without the sizes a decoder has.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    weights = safetensors_of(folder)
    for file in weights:
        shapes |= tensor_shapes(file)
    return facts_from_config(
        read_config(folder / "config.json"),
        name=name,
        source=source,
        shapes=shapes,
        size_bytes=sum(file.stat().st_size for file in weights),
        chat=_has_chat_template(folder),
    )


def facts_from_config(
    config: Mapping[str, Any],
    *,
    name: str,
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    size_bytes: int | None,
    chat: bool,
) -> Facts:
    """Facts from a parsed `config.json` (its `text_config`, if the model has towers) and its tensors' shapes."""
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise UserError(f"the configuration of {name} has a text_config that is no object; fetch the model again")
    sizes = {field: _size(text, field, name) for field in _NAMES}
    for field in ("layers", "width", "heads", "vocabulary"):
        if sizes[field] is None:
            raise UserError(f"the configuration of {name} has no {_NAMES[field][0]}; it does not describe a decoder")
    layers, width, heads, vocabulary = (int(sizes[field] or 0) for field in ("layers", "width", "heads", "vocabulary"))
    parameters = sum(prod(shape) for shape in shapes.values())
    return Facts(
        name=name,
        architecture=str(text.get("model_type", config.get("model_type", "unknown"))),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=sizes["kv_heads"] or heads,
        head_dim=sizes["head_dim"] or width // heads,
        mlp_width=sizes["mlp_width"] or 4 * width,  # GPT-2 writes null for four times the width
        vocabulary=vocabulary,
        tied=not any(tensor.endswith(("lm_head.weight", "embed_out.weight")) for tensor in shapes),
        parameters=parameters,
        licence="unknown",
        size_bytes=size_bytes,
        frame="chat" if chat else "plain",
        device="gpu" if 2 * parameters > CPU_LIMIT_BYTES else "cpu",
        source=source,
    )


def _size(config: Mapping[str, Any], field: str, model: str) -> int | None:
    key = next((name for name in _NAMES[field] if config.get(name) is not None), None)
    if key is None:
        return None
    # Some hybrids give one entry per layer; the largest stands for the model.
    values = config[key] if isinstance(config[key], list) else [config[key]]
    if not values or not all(type(value) is int and 0 < value < LARGEST_SIZE for value in values):
        raise UserError(f"the configuration of {model} says {key} {config[key]!r:.40}, which is no size; mend it")
    return int(max(values))


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object that comes with a model; UserError if it is none."""
    config = files.read_json(path, "model configuration")
    if not isinstance(config, dict):
        raise UserError(f"the model configuration {path} is not a JSON object; fetch the model again")
    return config


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.exists() and bool(read_config(settings).get("chat_template"))
