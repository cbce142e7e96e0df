"""Subjects on the Transformers hub: which snapshot is here, how one comes here, and the facts of one that is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from lab.errors import UserError
from lab.subjects.configuration import facts_from_config, facts_of_folder, read_config, safetensors_of, slug
from lab.subjects.facts import Facts, Hub

#: safetensors, configuration and tokenizer; no pickles, no code, no copies in other formats
PATTERNS = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "chat_template.*",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
]


def cached_snapshot(hub: Hub) -> Path | None:
    """The hub cache's folder of this revision, or None if it is not here or not whole; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(hub.id, revision=hub.revision, allow_patterns=PATTERNS, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    return folder if _is_whole(folder) else None


def download(hub: Hub) -> Path:
    """Bring the pinned revision into the hub cache; an interrupted download resumes.

    Raises:
        UserError: the hub cannot be reached, knows no such model or revision, or has no safetensors of it.
    """
    from huggingface_hub import snapshot_download

    with _asking_for(hub.id):
        folder = Path(snapshot_download(hub.id, revision=hub.revision, allow_patterns=PATTERNS))
    safetensors_of(folder)
    return folder


def facts_of_hub(model: str) -> Facts:
    """Facts of a hub model: from the cached snapshot, else from the hub's configuration and tensor headers.

    Raises:
        UserError: not a hub id, or the hub cannot be reached or knows no such model.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        raise UserError(f"cannot find the model {model!r}: no such folder or file, and a hub id reads OWNER/NAME")
    name = slug(model.split("/")[1])
    folder = cached_snapshot(Hub(model))
    return facts_of_folder(folder, Hub(model, folder.name), name) if folder else _remote_facts(model, name)


def _remote_facts(model: str, name: str) -> Facts:
    from huggingface_hub import HfApi, hf_hub_download

    with _asking_for(model):
        info = HfApi().model_info(model)
        files = HfApi().get_safetensors_metadata(model, revision=info.sha).files_metadata.values()
        config = read_config(Path(hf_hub_download(model, "config.json", revision=info.sha)))
    shapes = {tensor: tuple(entry.shape) for file in files for tensor, entry in file.tensors.items()}
    names = {sibling.rfilename for sibling in info.siblings or ()}
    settings = (info.config or {}).get("tokenizer_config", {})
    return facts_from_config(
        config,
        name=name,
        source=Hub(model, info.sha),
        shapes=shapes,
        size_bytes=2 * sum(prod(shape) for shape in shapes.values()),
        chat="chat_template.jinja" in names or bool(settings.get("chat_template")),
    )


def _is_whole(folder: Path) -> bool:
    try:
        return bool(safetensors_of(folder)) and (folder / "config.json").exists()
    except UserError:  # it says what is missing, and here the answer to that is to download it
        return False


@contextmanager
def _asking_for(model: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line; it has no base class: each version uses another HTTP library."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{model} is gated: accept its licence on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub knows no model {model}; check the name, or log in with `hf auth login`") from error
    except Exception as error:
        raise UserError(
            f"cannot get {model} from the hub ({type(error).__name__}); try again where it is reached"
        ) from error
