"""FS Fish Speech S2 Pro: what is a two-level autoregressive speech model built of?

A Slow AR (a decoder over frames, with text and the first code in its vocabulary), a Fast AR (a small decoder over
the ten codebooks of one frame) and a neural codec. Every number of parameters follows from the configuration, and
is held against the tensor headers: those that the source saved, or those of a checkpoint (`--model FOLDER`).
The codec has no header here: its parameters and buffers are arithmetic on its public configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lab import published
from lab.architectures import fish_codec, fish_speech, headers, shapes
from lab.architectures.weight_statistics import WeightStatistics
from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.subjects import catalog

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
QWEN3_4B = "qwen3-4b-instruct-2507"

Group = tuple[str, tuple[int, ...], int]


class FishSpeech(WeightStatistics):
    """Tensors, configuration and codec of a dual autoregressive speech model.

    Dimensions: `prefix` (`text_model` is the Slow AR, `audio_decoder` the Fast AR), `kind` (see
    `lab.architectures.fish_speech`), `layer`, `fast_layer`.
    """

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What the record was made from: configuration, tensor groups, and what is public of codec and data flow."""
        return dict(self.provenance["settings"])

    def _printed(self, name: str) -> xr.DataArray:
        """A figure that the source prints; what a checkpoint is held against, too."""
        return self.data[name] if self.has(name) else published.dataset("fish_speech_s2_pro")[name]

    def setting(self, name: str) -> Mapping[str, Any]:
        """A part of the settings; NotApplicable where a checkpoint's headers do not tell it."""
        if name not in self.settings:
            what = name.replace("_", " ")
            raise NotApplicable(f"{what}: the configuration and headers of {self.subject} do not tell it")
        return dict(self.settings[name])

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's configuration."""
        return dict(self.settings["config"])

    @property
    def slow(self) -> Mapping[str, Any]:
        """Configuration of the Slow AR."""
        return dict(self.config["text_config"])

    @property
    def fast(self) -> Mapping[str, Any]:
        """Configuration of the Fast AR."""
        return dict(self.config["audio_decoder_config"])

    # ---- tensors

    @cached_property
    def groups(self) -> set[Group]:
        """Tensors of one name and shape: name, shape, how many [as the checkpoint holds them]."""
        return {(group["name"], tuple(group["shape"]), group["count"]) for group in self.settings["tensor_groups"]}

    @cached_property
    def expected_groups(self) -> set[Group]:
        """The groups of tensors that the configuration implies."""
        found = headers.grouped(fish_speech.tensors(self.config))
        return {(group["name"], tuple(group["shape"]), group["count"]) for group in found}

    @cached_property
    def names(self) -> list[str]:
        """Names of the tensors, layers as `{i}`."""
        return sorted({name for name, _, _ in self.groups})

    def named(self, *fragments: str) -> list[str]:
        """Tensors whose name contains one of the fragments."""
        return [name for name in self.names if any(fragment in name for fragment in fragments)]

    @cached_property
    def sides(self) -> set[int]:
        """Every length of an axis that occurs in a tensor."""
        return {side for _, shape, _ in self.groups for side in shape}

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return int(self.variable("parameters_total"))

    @property
    def weight_dtype(self) -> str:
        """Dtype of the tensors; several, in alphabetical order, where they differ."""
        return str(self.settings["weight_dtype"])

    @cached_property
    def gigabytes(self) -> float:
        """Size of all tensors, 10^9 bytes."""
        if self.weight_dtype not in ITEM_BYTES:
            raise NotApplicable(f"the tensors of {self.subject} are {self.weight_dtype}: a size follows from one dtype")
        return ITEM_BYTES[self.weight_dtype] * self.parameters / 1e9

    @cached_property
    def prefix_share(self) -> xr.DataArray:
        """Share of all parameters [prefix]."""
        return self.variable("parameters_by_prefix") / self.parameters

    @cached_property
    def kind_share(self) -> xr.DataArray:
        """Share of the parameters under a prefix [prefix, kind]."""
        return self.variable("parameters_by_kind") / self.variable("parameters_by_prefix")

    @cached_property
    def kind_parameters(self) -> xr.DataArray:
        """Parameters [prefix, kind]."""
        return self.variable("parameters_by_kind")

    @cached_property
    def slow_layer(self) -> xr.DataArray:
        """Parameters of each Slow AR layer [layer]."""
        return self.variable("slow_layer_parameters")

    @cached_property
    def fast_layer(self) -> xr.DataArray:
        """Parameters of each Fast AR layer [fast_layer]."""
        return self.variable("fast_layer_parameters")

    @cached_property
    def expected_layer(self) -> dict[str, int]:
        """Parameters of a layer by the configuration, Slow AR and Fast AR."""
        return {name: shapes.parameters(fish_speech.layer(part)) for name, part in self._stacks.items()}

    @property
    def _stacks(self) -> dict[str, Mapping[str, Any]]:
        return {"slow_ar": self.slow, "fast_ar": self.fast}

    @cached_property
    def role_parameters(self) -> dict[str, int]:
        """Parameters by what they do: the codebook table counts with the Slow AR, whose input it embeds."""
        slow, fast = (int(count) for count in self.variable("parameters_by_prefix"))
        table = self.fast["num_codebooks"] * self.fast["vocab_size"] * self.fast["text_dim"]
        return {"slow_ar": slow + table, "fast_ar": fast - table}

    @cached_property
    def qwen3_parameters(self) -> int:
        """Parameters of a Qwen3 with the Slow AR's sizes."""
        part = self.slow
        own, tied = fish_speech.widths(part), part["tie_word_embeddings"]
        table = shapes.decoder(own, part["n_layer"], part["vocab_size"], qk_norm=True, head=not tied)
        return shapes.parameters(table)

    @cached_property
    def llama_parameters(self) -> int:
        """Parameters of a Llama with the Fast AR's sizes, without the table of all codebooks."""
        part = self.fast
        own, tied = fish_speech.widths(part), part["tie_word_embeddings"]
        table = shapes.decoder(own, part["n_layer"], part["vocab_size"], qk_norm=False, head=not tied)
        return shapes.parameters(table)

    @cached_property
    def rows_beyond_qwen3_4b(self) -> float:
        """What the Slow AR has more than Qwen3-4B, in rows of the embedding."""
        known = catalog.facts(QWEN3_4B)
        assert known.parameters is not None
        slow = int(self.variable("parameters_by_prefix").sel(prefix=fish_speech.SLOW))
        return (slow - known.parameters) / int(self.slow["dim"])

    @cached_property
    def vocabulary_beyond_qwen3_4b(self) -> int:
        """Entries of the vocabulary beyond Qwen3-4B's."""
        return int(self.slow["vocab_size"] - catalog.facts(QWEN3_4B).vocabulary)

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the five matrices of a layer."""
        table = fish_speech.layer(self.slow)
        return {name.removesuffix(".weight"): (s[0], s[1]) for name, s in table.items() if len(s) == 2}

    @cached_property
    def work(self) -> dict[str, int]:
        """Multiply-adds with weights per frame, Slow AR and Fast AR."""
        return fish_speech.multiply_adds(self.config)

    # ---- tokens

    @cached_property
    def semantic_tokens(self) -> int:
        """Ids from the first to the last semantic token, both included."""
        return int(self.config["semantic_end_token_id"] - self.config["semantic_start_token_id"] + 1)

    @cached_property
    def listed_ranges(self) -> list[tuple[int, int]]:
        """The ranges of token ids that the source lists, both ends included, in order."""
        return sorted((int(first), int(last)) for first, last in self._printed("token_ranges").values)

    @cached_property
    def listed_ids(self) -> int:
        """Ids in those ranges."""
        return sum(last - first + 1 for first, last in self.listed_ranges)

    # ---- codec

    @cached_property
    def codec(self) -> dict[str, fish_codec.Part]:
        """Encoder, decoder and quantizer by shape arithmetic on the codec's public configuration."""
        return fish_codec.codec(self.setting("codec_config"))

    @cached_property
    def codec_parameters(self) -> dict[str, int]:
        """Trainable parameters by component, and their total."""
        return _with_total({name: part.parameters for name, part in self.codec.items()})

    @cached_property
    def codec_elements(self) -> dict[str, int]:
        """What a state dict holds by component, and in total: parameters, masks and rotary tables."""
        return _with_total({name: part.parameters + part.buffer_elements for name, part in self.codec.items()})

    @cached_property
    def codec_layers(self) -> dict[str, int]:
        """Transformer layers by component."""
        return {name: part.transformer_layers for name, part in self.codec.items()}

    def codec_stated(self, component: str) -> float:
        """Parameters that the source prints for a component, or for the `total`."""
        return float(self._printed("codec_elements_stated").sel(component=component))

    def codec_resolution(self, component: str) -> float:
        """One unit of that number's last digit."""
        return float(self._printed("codec_elements_resolution").sel(component=component))

    @cached_property
    def codebook_sizes(self) -> list[int]:
        """Entries per codebook: the semantic one, then the residual ones."""
        return fish_codec.codebook_sizes(self.setting("codec_config"))

    @cached_property
    def frame_rate(self) -> float:
        """Frames per second."""
        codec = self.setting("codec_config")
        return float(codec["sample_rate"] / fish_codec.downsampling(codec))

    @cached_property
    def kilobits_per_second(self) -> float:
        """Rate of the codes: log2 of each codebook's size, summed, per frame."""
        return float(self.frame_rate * np.log2(self.codebook_sizes).sum() / 1000)

    @cached_property
    def addressable_rows(self) -> float:
        """Share of the codebook table's rows that a code can name."""
        return sum(self.codebook_sizes) / int(self.fast["num_codebooks"] * self.fast["vocab_size"])

    # ---- figures

    @cached_property
    def budget(self) -> xr.DataArray:
        """Parameters by part of the two stacks [part], 10^6."""
        found = self.kind_parameters
        parts = {
            f"{name}_{kind}": int(found.sel(prefix=prefix, kind=kind)) / 1e6
            for name, prefix in (("slow", fish_speech.SLOW), ("fast", fish_speech.FAST))
            for kind in fish_speech.KINDS
            if kind != "norm" and int(found.sel(prefix=prefix, kind=kind))
        }
        return xr.DataArray(list(parts.values()), dims="part", coords={"part": list(parts)})

    @cached_property
    def codec_budget(self) -> xr.DataArray:
        """Elements of the codec's state dict by component, parameters and buffers apart [part], 10^6."""
        parts = {f"{name}_parameters": part.parameters / 1e6 for name, part in self.codec.items()}
        parts |= {f"{name}_buffers": part.buffer_elements / 1e6 for name, part in self.codec.items()}
        return xr.DataArray(list(parts.values()), dims="part", coords={"part": list(parts)})


def _with_total(counts: dict[str, int]) -> dict[str, int]:
    return counts | {"total": sum(counts.values())}


def measure(folder: Path) -> xr.Dataset:
    """Count the tensors of a checkpoint from its headers; nothing is loaded."""
    from lab.experiments.architectures.measuring import fish_speech_s2_pro

    return fish_speech_s2_pro.measure(folder)


EXPERIMENT = Experiment(
    id="FS",
    title="Fish Speech S2 Pro",
    question="What is a two-level autoregressive speech model built of, and do its weights show structure over depth?",
    record=FishSpeech,
    measure=measure,
    budgets={},
    tolerances={"": Tolerance(0, 0, "counts are whole numbers, and published figures do not move")},
)
