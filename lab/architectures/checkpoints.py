"""Models of several parts, which no executor runs: known by their configuration, and by a checkpoint's headers.

They are not in the catalog, whose subjects are decoders that can be fetched, pinned and run. Their published
subject is described by the configuration in `data/published/`; a checkpoint is a folder on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lab import published
from lab.architectures import ace_step, fish_speech, headers
from lab.architectures.shapes import parameters
from lab.errors import UserError
from lab.subjects import catalog
from lab.subjects.configuration import read_config, safetensors_of, slug
from lab.subjects.facts import Facts, Hub, Local

Configs = Mapping[str, Mapping[str, Any]]

#: condition of a record that was read from headers
CONDITION = "headers"
CONFIG = "config.json"


@dataclass(frozen=True)
class Architecture:
    """A model of several parts, and the one experiment that is about it.

    Attributes:
        subject: name of the published model.
        experiment: name of the experiment.
        model_type: of its configuration.
        hub: where it was published.
        geometry: role and key of the sizes that stand for the model, and how they are called there.
        tensors: builds the tables of all tensors from the configurations by role; KeyError if a field is missing.
    """

    subject: str
    experiment: str
    model_type: str
    hub: str
    geometry: Callable[[Configs], dict[str, Any]]
    tensors: Callable[[Configs], object]


def _fish_geometry(configs: Configs) -> dict[str, Any]:
    own = configs["model"]["text_config"]
    names = {
        "layers": "n_layer",
        "width": "dim",
        "heads": "n_head",
        "kv_heads": "n_local_heads",
        "head_dim": "head_dim",
        "mlp_width": "intermediate_size",
        "vocabulary": "vocab_size",
        "tied": "tie_word_embeddings",
    }
    return {field: own[name] for field, name in names.items()}


def _ace_geometry(configs: Configs) -> dict[str, Any]:
    own = configs["dit"]
    names = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp_width": "intermediate_size",
        "vocabulary": "vocab_size",
    }
    return {field: own[name] for field, name in names.items()} | {"tied": False}


ARCHITECTURES = (
    Architecture(
        subject="fish-speech-s2-pro",
        experiment="fish_speech_s2_pro",
        model_type="fish_qwen3_omni",
        hub="fishaudio/s2-pro",
        geometry=_fish_geometry,
        tensors=lambda configs: fish_speech.tensors(configs["model"]),
    ),
    Architecture(
        subject="ace-step-1.5",
        experiment="acestep_v15",
        model_type="acestep",
        hub="ACE-Step/Ace-Step1.5",
        geometry=_ace_geometry,
        tensors=ace_step.components,
    ),
)


def architecture_of(facts: Facts) -> Architecture | None:
    """The architecture that a subject is of; None for a decoder."""
    return next((known for known in ARCHITECTURES if known.model_type == facts.architecture), None)


def suits(experiment: str, facts: Facts) -> bool:
    """Whether an experiment is about a subject: those of an architecture about it alone, all others about decoders."""
    known = architecture_of(facts)
    if known is not None:
        return experiment == known.experiment
    return experiment not in {known.experiment for known in ARCHITECTURES}


def subjects() -> tuple[str, ...]:
    """Names of the published models."""
    return tuple(known.subject for known in ARCHITECTURES)


@cache
def facts(name: str) -> Facts:
    """Facts of a published model, or of the catalogued subject of this name; UserError if there is none."""
    known = next((known for known in ARCHITECTURES if known.subject == name), None)
    if known is None:
        return catalog.facts(name)
    settings = json.loads(published.dataset(known.experiment).attrs["provenance"])["settings"]
    configs = settings["configs"] if "configs" in settings else {"model": settings["config"]}
    return _facts(known, name, Hub(known.hub), configs, None, None)


def named_checkpoint(model: str | Path) -> Facts | None:
    """Facts of a folder that holds a checkpoint of one of the architectures, from its headers; None for other models.

    Raises:
        UserError: configuration or weights of such a checkpoint are damaged, or only its hub id is given.
    """
    hub = next((known for known in ARCHITECTURES if known.hub == str(model)), None)
    folder = Path(model).expanduser()
    if hub is not None and not folder.exists():
        raise UserError(f"{model} is judged from a checkpoint's headers: download it and give --model its folder")
    known = _recognised(folder) if folder.is_dir() else None
    if known is None:
        return None
    folder = folder.resolve()
    found = parts(folder)
    tables = {role: headers.read(part) for role, part in found.items()}
    counted = sum(parameters(headers.shapes(table)) for table in tables.values())
    size = sum(file.stat().st_size for part in found.values() for file in safetensors_of(part))
    name = slug(folder.name)
    taken = name in catalog.catalog() or name in subjects()
    return _facts(known, f"{name}-local" if taken else name, Local(folder), configurations(folder), counted, size)


def parts(folder: Path) -> dict[str, Path]:
    """The folders of a checkpoint by role: itself (`model`, or `dit` alone), or those below it if it is no model.

    Raises:
        UserError: two of them have one role.
    """
    found: dict[str, Path] = {}
    whole = (folder / CONFIG).is_file()
    for place in [folder] if whole else sorted(path for path in folder.iterdir() if path.is_dir()):
        role = _role(place)
        if role is None:
            continue
        if role in found:
            raise UserError(f"{found[role]} and {place} are both a {role}; give a folder with one of them")
        found[role] = place
    return found


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """A checkpoint's configurations by role."""
    return {role: read_config(part / CONFIG) for role, part in parts(folder).items()}


def _recognised(folder: Path) -> Architecture | None:
    types = {config.get("model_type") for config in configurations(folder).values()}
    return next((known for known in ARCHITECTURES if known.model_type in types), None)


def _role(place: Path) -> str | None:
    if not (place / CONFIG).is_file():
        return None
    config, name = read_config(place / CONFIG), place.name.lower()
    kind = config.get("model_type")
    if kind == "fish_qwen3_omni":
        return "model"
    if kind == "acestep":
        return "dit"
    if config.get("_class_name") == "AutoencoderOobleck":
        return "vae"
    if kind == "qwen3":  # planner and text embedder are of one type; folders tell them apart
        return "lm" if "hz-lm" in name else "text_embedder" if "embedding" in name else None
    return None


def _facts(
    known: Architecture, name: str, source: Hub | Local, configs: Configs, counted: int | None, size: int | None
) -> Facts:
    frame: Literal["plain"] = "plain"
    try:
        known.tensors(configs)
        geometry = known.geometry(configs)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the configuration of {name} is none of a {known.model_type} ({type(error).__name__}: {error}); "
            "fetch the model again"
        ) from error
    return Facts(
        name=name,
        architecture=known.model_type,
        parameters=counted,
        licence="unknown",
        size_bytes=size,
        frame=frame,
        device="cpu",
        source=source,
        published=(known.experiment,),
        **geometry,
    )
