"""AS ACE-Step 1.5: what is a planning and synthesis music system made of?

A census of what was counted: in modules that maintained libraries build from four configurations (planner, diffusion
transformer with its encoders, audio autoencoder, text embedder), or in the tensor headers of a checkpoint (`--model
FOLDER`). What the configurations imply by closed forms is `implied...`, and controls hold the counts against it. What
runs through the modules is in the settings, and calibration runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from lab import published
from lab.architectures import ace_step, headers, oobleck, shapes
from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.records import Record
from lab.subjects import catalog

COMPONENTS = tuple(ace_step.COMPONENTS)
STACKS = tuple(ace_step.STACKS)
DIT_FILE = tuple(name for name, (role, _) in ace_step.COMPONENTS.items() if role == "dit")
PLAIN_STACKS = ("lm_planner", "lyric_encoder", "timbre_encoder", "attention_pooler", "audio_detokenizer")
QWEN3_1_7B = "qwen3-1.7b"
SONG_SECONDS = 600
#: rest of a name, shape, how many
Group = tuple[str, shapes.Shape, int]
PRINTED = ("parameters_stated", "parameters_resolution", "tensors_stated")


class AceStep(Record):
    """Parameters, stacks and rates of a music system.

    Dimensions: `component` (of the census), `layer` (of the DiT), `stream` (audio, latents, patches, tokens).
    """

    sampling: ClassVar[Mapping[str, str | None]] = {}

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What the record was made from: configurations, and what is public of tokenizers and data flow."""
        return dict(self.provenance["settings"])

    def setting(self, name: str) -> Mapping[str, Any]:
        """A part of the settings; NotApplicable where a checkpoint's headers do not tell it."""
        if name not in self.settings:
            what = name.replace("_", " ")
            raise NotApplicable(f"{what}: the configurations and headers of {self.subject} do not tell it")
        return dict(self.settings[name])

    @cached_property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """The configurations by role."""
        return dict(self.settings["configs"])

    def config(self, role: str) -> Mapping[str, Any]:
        """One configuration: `dit`, `lm`, `vae` or `text_embedder`; NotApplicable where the folder lacks it."""
        if role not in self.configs:
            raise NotApplicable(f"the folder of {self.subject} holds no {role}")
        return self.configs[role]

    # ---- census

    @cached_property
    def implied(self) -> dict[str, shapes.Shapes]:
        """The tensors that the configurations imply, by component."""
        return ace_step.components(self.configs)

    def implied_parameters(self, component: str) -> int:
        """Parameters of a component by the configuration."""
        self.config(ace_step.COMPONENTS[component][0])
        return shapes.parameters(self.implied[component])

    def implied_tensors(self, component: str) -> int:
        """Number of a component's parameter tensors by the configuration."""
        self.config(ace_step.COMPONENTS[component][0])
        return len(self.implied[component])

    def printed(self, name: str) -> xr.DataArray:
        """A figure that the source prints; what a checkpoint is held against, too."""
        return self.data[name] if self.has(name) else published.dataset("acestep_v15")[name]

    def of(self, name: str, component: str) -> float:
        """A variable of the census, or a printed one, at one component; NotApplicable where it is not here."""
        found = self.printed(name) if name in PRINTED else self.variable(name)
        if component not in found.component.values or np.isnan(float(found.sel(component=component))):
            who = "the source prints" if name in PRINTED else f"the {self.source} record of {self.subject} holds"
            raise NotApplicable(f"{who} no {name.removesuffix('_stated')} of the {component.replace('_', ' ')}")
        return float(found.sel(component=component))

    def parameters(self, component: str) -> int:
        """Parameters of a component as counted in modules or headers."""
        return self._counted("parameters", component)

    def together(self, *components: str) -> int:
        """Parameters of several components as counted."""
        return sum(map(self.parameters, components))

    def tensors(self, component: str) -> int:
        """Number of a component's parameter tensors as counted."""
        return self._counted("tensors", component)

    def _counted(self, name: str, component: str) -> int:
        self.config(ace_step.COMPONENTS[component][0])
        return int(self.of(name, component))

    @cached_property
    def dit_tensors(self) -> int:
        """Tensors of the file that holds the DiT, encoders, tokenizer and detokenizer."""
        return sum(map(self.tensors, DIT_FILE))

    @cached_property
    def printed_dit_tensors(self) -> int:
        """Those of them whose component has a row in the printed census."""
        rows = self.printed("parameters_stated").dropna("component").component.values
        return sum(self.tensors(name) for name in DIT_FILE if name in rows)

    @cached_property
    def quantizer_parameters(self) -> dict[str, int]:
        """Parameters of the quantizer: weights, which have two axes, and biases."""
        parts, found = {"weights": 2, "biases": 1}, self.groups("dit", "tokenizer.quantizer.")
        return {
            part: sum(prod(shape) * count for _, shape, count in found if len(shape) == axes)
            for part, axes in parts.items()
        }

    @cached_property
    def total(self) -> int:
        """All parameters without the text embedder's."""
        return self.together(*(name for name in COMPONENTS if name != "text_embedder"))

    @cached_property
    def condition_encoder(self) -> int:
        """Text projector, lyric encoder and timbre encoder."""
        return self.together("text_projector", "lyric_encoder", "timbre_encoder")

    @cached_property
    def models(self) -> dict[str, int]:
        """Parameters of the planner, the DiT proper, each encoder, the tokenizer's parts and the autoencoder."""
        dit = [name for name in COMPONENTS if name.startswith("dit_")]
        parts = {name: self.parameters(name) for name in COMPONENTS if name not in (*dit, "text_embedder")}
        vae = parts.pop("vae_encoder") + parts.pop("vae_decoder")
        return parts | {"dit": self.together(*dit), "vae": vae}

    @cached_property
    def groups_beyond(self) -> list[str]:
        """Components in which the shapes that were counted, and their numbers, are not those of the configuration."""
        wrong = []
        for role, groups in self.setting("tensor_groups").items():
            tables = {name: table for name, table in self.implied.items() if ace_step.COMPONENTS[name][0] == role}
            here = _by_component(role, groups)
            implied = {name: _by_component(role, headers.grouped(table)).get(name) for name, table in tables.items()}
            wrong += sorted(name for name in here.keys() | implied.keys() if here.get(name) != implied.get(name))
        return wrong

    # ---- tensors by name

    def groups(self, role: str, start: str) -> list[Group]:
        """Tensors whose name starts so: the rest of the name, shape, and how many, layers as `{i}`; as counted.

        Args:
            role: whose tensors, e.g. `dit` for the file that holds the DiT.
            start: e.g. `decoder.time_embed.`.
        """
        self.config(role)
        found = self.setting("tensor_groups")[role]
        here = [group for group in found if group["name"].startswith(start)]
        return [(group["name"][len(start) :], tuple(group["shape"]), group["count"]) for group in here]

    def shapes_of(self, name: str) -> list[tuple[shapes.Shape, int]]:
        """Shapes of the tensors of one name in the DiT's file, and how many have each; none if it has no such name."""
        return [(shape, count) for rest, shape, count in self.groups("dit", name) if not rest]

    # ---- stacks

    def stack(self, name: str) -> shapes.Widths:
        """Sizes of a layer of a stack by the configuration."""
        return ace_step.widths(self.config(ace_step.STACKS[name][0]))

    def depth(self, name: str) -> int:
        """Layers of a stack."""
        role, field, _ = ace_step.STACKS[name]
        return int(self.config(role)[field])

    def layer_shapes(self, name: str) -> dict[shapes.Shape, float]:
        """Shapes of a stack's tensors, and how many of each a layer has on average."""
        found: dict[shapes.Shape, float] = {}
        for _, shape, count in self.groups(ace_step.STACKS[name][0], ace_step.layers_of(name)):
            found[shape] = found.get(shape, 0) + count / self.depth(name)
        return found

    def layer_parameters(self, name: str) -> float:
        """Parameters of one layer of a stack, on average over its layers."""
        found = self.groups(ace_step.STACKS[name][0], ace_step.layers_of(name))
        return _per(sum(prod(shape) * count for _, shape, count in found), self.depth(name))

    def shapes_beyond_dit(self, name: str) -> list[shapes.Shape]:
        """Shapes of which a layer of a stack has more than a DiT layer, which has a second attention and a table."""
        own, dit = self.layer_shapes(name), self.layer_shapes("dit")
        return sorted(shape for shape, count in own.items() if count > dit.get(shape, 0))

    def sliding_layers(self, name: str) -> int:
        """Layers of a stack that see a band only."""
        self.config(ace_step.STACKS[name][0])
        return ace_step.sliding_layers(self.configs, name)

    def is_causal(self, name: str) -> bool:
        """Whether a stack's attention looks back only."""
        return ace_step.STACKS[name][2]

    @cached_property
    def dit_layer_parameters(self) -> xr.DataArray:
        """Parameters of each DiT layer [layer]: its own where headers were read, else an equal part of all layers'."""
        return self._of_layers("dit_layer_parameters", self.parameters)

    @cached_property
    def dit_layer_tensors(self) -> xr.DataArray:
        """Tensors of each DiT layer [layer]: its own where headers were read, else an equal part of all layers'."""
        return self._of_layers("dit_layer_tensors", self.tensors)

    @cached_property
    def keys_seen(self) -> int:
        """Most keys that a query sees in a sliding layer."""
        window = self.config("dit")["sliding_window"]
        return max(shapes.band(4 * window + 2, window))

    def _of_layers(self, name: str, count: Callable[[str], int]) -> xr.DataArray:
        if self.has(name):
            return self.data[name]
        depth = self.depth("dit")
        one = _per(count("dit_layers"), depth)
        return xr.DataArray([one] * depth, dims="layer", coords={"layer": range(depth)})

    # ---- tokens, codes and rates

    @cached_property
    def fsq_codes(self) -> int:
        """Codes of the quantizer: the product of its levels."""
        return ace_step.fsq_codes(self.config("dit"))

    @cached_property
    def rates(self) -> dict[str, float]:
        """Samples, latents, patches and tokens per second."""
        self.config("vae")
        return ace_step.rates(self.configs)

    def frames(self, stream: str, seconds: float = SONG_SECONDS) -> float:
        """Length of a song in a stream."""
        return self.rates[stream] * seconds

    @cached_property
    def downsampling(self) -> int:
        """Samples per latent."""
        return oobleck.downsampling(self.config("vae"))

    def latents_of(self, samples: int) -> int:
        """Latents of so many samples."""
        return oobleck.latents_of(self.config("vae"), samples)

    @cached_property
    def latent_channels(self) -> int:
        """Channels of a latent: half of what the encoder writes, the other half being spreads."""
        return int(self.config("vae")["encoder_hidden_size"]) // 2

    def samples_of(self, latents: int) -> int:
        """Samples decoded from so many latents."""
        return oobleck.samples_of(self.config("vae"), latents)

    @cached_property
    def planner_vocabulary(self) -> int:
        """Rows of the planner's embedding."""
        return int(self.config("lm")["vocab_size"])

    @cached_property
    def audio_code_tokens(self) -> int:
        """Tokens of the planner that name an audio code."""
        found = self.setting("audio_code_tokens")
        return int(found["last"] - found["first"] + 1)

    @cached_property
    def rows_beyond_qwen3(self) -> int:
        """Entries of the planner's vocabulary beyond Qwen3-1.7B's."""
        return self.planner_vocabulary - catalog.facts(QWEN3_1_7B).vocabulary

    @cached_property
    def parameters_beyond_qwen3(self) -> int:
        """Parameters of the planner beyond Qwen3-1.7B's."""
        known = catalog.facts(QWEN3_1_7B).parameters
        assert known is not None
        return self.parameters("lm_planner") - known

    # ---- figures

    @cached_property
    def budget(self) -> xr.DataArray:
        """Parameters by component [component], 10^6; of those whose configuration is here."""
        found = {name: self.parameters(name) / 1e6 for name in self.implied}
        return xr.DataArray(list(found.values()), dims="component", coords={"component": list(found)})

    @cached_property
    def misprint(self) -> xr.DataArray:
        """Printed count's distance from the exact one in units of its last digit [component]; above 0.5 it is wrong."""
        found, unit = (self.printed(name).dropna("component") for name in PRINTED[:2])
        here = [str(name) for name in unit.component.values if name in self.implied]
        exact = xr.DataArray(list(map(self.parameters, here)), dims="component", coords={"component": here})
        return abs(found.sel(component=here) - exact) / unit.sel(component=here)

    @cached_property
    def rate(self) -> xr.DataArray:
        """Frames per second [stream]."""
        return xr.DataArray(list(self.rates.values()), dims="stream", coords={"stream": list(self.rates)})


def _per(total: int, count: int) -> float:
    """An equal part of a count, whole where it is."""
    return total // count if total % count == 0 else total / count


def _by_component(role: str, groups: list[dict[str, Any]]) -> dict[str, dict[tuple[int, ...], int]]:
    """Number of tensors of each shape by component; names within a component differ between implementations."""
    found: dict[str, dict[tuple[int, ...], int]] = {}
    for group in groups:
        counts = found.setdefault(ace_step.component_of(role, group["name"]) or "unclassified", {})
        shape = tuple(group["shape"])
        counts[shape] = counts.get(shape, 0) + group["count"]
    return found


def measure(folder: Path) -> xr.Dataset:
    """Count the tensors of a checkpoint from its headers; nothing is loaded."""
    from lab.experiments.architectures.measuring import acestep_v15

    return acestep_v15.measure(folder)


EXPERIMENT = Experiment(
    id="AS",
    title="ACE-Step 1.5",
    question="What is a planning and synthesis music system made of, and do its stated sizes follow from it?",
    record=AceStep,
    measure=measure,
    budgets={},
    tolerances={"": Tolerance(0, 0, "counts are whole numbers, and published figures do not move")},
)
