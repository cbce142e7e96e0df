"""What is known about a subject before a single weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class WheelPart:
    """One file inside one wheel of a package index: a GGUF file, or the next part of one.

    Attributes:
        package: the distribution's name, as pip knows it.
        version: its exact version.
        sha256: digest of the wheel.
        member: the file's exact name inside the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Wheels:
    """A GGUF file that lies, whole or cut in parts, inside wheels; `sha256` is that of the whole file."""

    parts: tuple[WheelPart, ...]
    sha256: str

    def __str__(self) -> str:
        first, count = self.parts[0], len(self.parts)
        return f"wheel {first.package}=={first.version}" + (f" and {count - 1} more" if count > 1 else "")


@dataclass(frozen=True)
class Hub:
    """A repository on the Transformers hub; the catalog pins its revision (a commit)."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub {self.id}" + (f"@{self.revision[:8]}" if self.revision else "")


@dataclass(frozen=True)
class Local:
    """A folder with safetensors, or a single GGUF file, on this machine."""

    path: Path

    def __str__(self) -> str:
        return f"path {self.path}"


@dataclass(frozen=True)
class Adapted:
    """Another subject of the catalog with an adapter of `data/specimens/` merged into its weights."""

    base: str
    specimen: str

    def __str__(self) -> str:
        return f"{self.base} with the adapter {self.specimen}"


Source = Wheels | Hub | Local | Adapted


@dataclass(frozen=True)
class Facts:
    """A subject as the catalog or its configuration describes it.

    Attributes:
        name: catalog name; for other models a slug of the path's or hub id's last part.
        architecture: Transformers' `model_type` of the decoder: `llama`, `qwen2`, `gemma3_text`, ...
        layers: number of decoder layers.
        width: size of the residual stream.
        heads, kv_heads, head_dim: attention geometry of a full-attention layer.
        mlp_width: inner size of the MLP.
        vocabulary: rows of the embedding.
        tied: whether the LM head is the embedding.
        parameters: number of parameters, a tied matrix counted once; None if nobody has counted.
        licence: SPDX identifier or name; `unknown` for models that the catalog does not know.
        size_bytes: bytes to download, or bytes on disk of a local model; None if unknown.
        frame: how a prompt is put to the subject, in its chat template or as plain text.
        device: what the subject needs.
        source: where its weights come from.
        default: whether it is measured when no subject is named.
        published: experiments whose published figures were measured on it.
    """

    name: str
    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    tied: bool
    parameters: int | None
    licence: str
    size_bytes: int | None
    frame: Literal["chat", "plain"]
    device: Literal["cpu", "gpu"]
    source: Source
    default: bool = False
    published: tuple[str, ...] = ()
