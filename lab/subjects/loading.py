"""A subject in memory: model, tokenizer and anatomy, ready to be measured and never to be trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

from lab.errors import UserError, first_line
from lab.memory import release_freed_memory
from lab.subjects.anatomy import Decoder
from lab.subjects.configuration import read_config
from lab.subjects.facts import Facts
from lab.subjects.gguf import quiet_transformers
from lab.subjects.products import widen_slow_products
from lab.subjects.weights import required_location, weights_digest

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedSubject:
    """A subject in memory.

    Attributes:
        facts: what the catalog or the configuration says.
        model: the Transformers model, in evaluation mode, without gradients.
        tokenizer: its tokenizer.
        decoder: the model's decoder, taken apart.
        digest: digest of weights and configuration, part of every record's address.
        dtype: dtype of the weights.
        device: where they are.
    """

    facts: Facts
    model: Any
    tokenizer: Any
    decoder: Decoder
    digest: str
    dtype: torch.dtype
    device: torch.device


def load(facts: Facts, dtype: str = "bfloat16", device: str = "cpu") -> LoadedSubject:
    """Load a subject whose weights are here; nothing is downloaded.

    Raises:
        UserError: the weights are not here, are damaged or not finite, do not fit in memory, or need
            code of their own; or dtype or device are not to be had.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    folder = required_location(facts)
    model = _model(folder, facts.name, DTYPES[dtype], place)
    require_finite(model, facts.name)
    widen_slow_products(model)
    release_freed_memory()
    return LoadedSubject(
        facts=facts,
        model=model,
        tokenizer=_tokenizer(folder, facts.name),
        decoder=Decoder(model),
        digest=weights_digest(folder),
        dtype=DTYPES[dtype],
        device=place,
    )


def require_finite(model: torch.nn.Module, name: str) -> None:
    """Raise UserError, naming the tensor, if a weight is NaN or infinite.

    The extremes of a tensor are finite only if all of it is (NaN spreads to both), and finding them
    takes one pass and no second copy of the weights.
    """
    for tensor, parameter in model.named_parameters():
        if parameter.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(parameter.detach())):
            bad = int((~torch.isfinite(parameter)).sum())
            raise UserError(f"{name}: {bad} entries of {tensor} are NaN or infinite; fetch or save the model again")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: choose cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the device {name} is not to be had: PyTorch finds no CUDA device here; choose --device cpu")
    return device


def _model(folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    _require_known_code(folder, name)
    try:
        with quiet_transformers():
            model, outcome = _model_class(folder, name).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        model = model.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name} does not fit into the memory of {device}; use a smaller model or dtype") from error
    except MemoryError as error:
        raise UserError(f"{name} does not fit into this machine's memory; use a smaller model or dtype") from error
    except UserError:
        raise
    except Exception as error:  # whatever a library makes of a damaged folder is one line to the user
        raise UserError(
            f"Transformers cannot load {name} from {folder} ({first_line(error)}); fetch or save it again"
        ) from error
    missing = sorted(outcome["missing_keys"])
    if missing:
        # Transformers would carry on with random weights in their place.
        raise UserError(
            f"{folder} lacks {len(missing)} tensors of {name}, {missing[0]} first; fetch or save the model again"
        )
    return model


def _model_class(folder: Path, name: str) -> Any:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise UserError(f"{name} is a {config.model_type}, which Transformers does not know as a language model")


def _require_known_code(folder: Path, name: str) -> None:
    config = read_config(folder / "config.json")
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise UserError(
            f"{name} ({kind}) needs code that comes with the model, which is never run; choose another model"
        )
    raise UserError(f"{name} has the model type {kind!r}, which this version of Transformers does not know; update it")


def _tokenizer(folder: Path, name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above: missing and damaged files end in many kinds of exceptions
        raise UserError(
            f"cannot load the tokenizer of {name} from {folder} ({first_line(error)}); save it beside the model"
        ) from error
