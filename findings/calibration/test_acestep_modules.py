"""ACE-Step's closed forms, masks, lengths and data flow against the modules of diffusers (the extra `audio`)."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab import published
from lab.architectures import ace_step, headers, oobleck, shapes
from lab.architectures.shapes import Shapes
from lab.experiments.architectures.acestep_v15 import AceStep

pytestmark = [
    pytest.mark.calibration,
    pytest.mark.skipif(
        find_spec("diffusers") is None, reason="install the extra `audio` to hold the closed forms against diffusers"
    ),
]

few = settings(max_examples=6, deadline=None)
SKIPPED = ("architectures", "dtype")  #: entries of a configuration that Qwen3Config takes otherwise
SLIDING, FULL = "sliding_attention", "full_attention"


def diffusers(module: str) -> Any:
    """A module of diffusers, imported when a test needs it: collection would take seconds longer."""
    return import_module(f"diffusers.{module}")


def record() -> AceStep:
    return AceStep(published.dataset("acestep_v15"))


def flow(name: str) -> Any:
    return record().setting("data_flow")[name]


def build(kind: type, config: dict[str, Any], device: str = "cpu") -> Any:
    """A module from those entries of a configuration that it takes."""
    known = inspect.signature(kind.__init__).parameters
    torch.manual_seed(0)
    with torch.device(device):
        return kind(**{name: value for name, value in config.items() if name in known}).eval()


def parts(config: dict[str, Any], device: str = "meta") -> dict[str, nn.Module]:
    """The modules of the file that holds the DiT, under the names that they have there."""
    modules = diffusers("pipelines.ace_step.modeling_ace_step")
    return {
        "decoder": build(diffusers("models").AceStepTransformer1DModel, config, device),
        "encoder": build(modules.AceStepConditionEncoder, config, device),
        "tokenizer": build(modules.AceStepAudioTokenizer, config, device),
        "detokenizer": build(modules.AceStepAudioTokenDetokenizer, config, device),
    }


def dit_file(config: dict[str, Any]) -> Shapes:
    """Shapes by name, as diffusers builds them; it keeps the null condition in the condition encoder."""
    named: Shapes = {}
    for prefix, module in parts(config).items():
        for name, shape in shapes_of(module).items():
            named[name if name == "null_condition_emb" else f"{prefix}.{name}"] = shape
    return named


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


def census(config: dict[str, Any]) -> dict[str, list[shapes.Shape]]:
    """Shapes by component, as diffusers builds them."""
    return {name: sorted(table.values()) for name, table in ace_step.census("dit", dit_file(config)).items()}


def qwen3(config: dict[str, Any]) -> Shapes:
    """Shapes by name, as Transformers builds them."""
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        return shapes_of(Qwen3Model(Qwen3Config(**{k: v for k, v in config.items() if k not in SKIPPED})))


def published_autoencoder() -> Any:
    config = {name: value for name, value in record().config("vae").items() if not name.startswith("_")}
    return build(diffusers("models").AutoencoderOobleck, config, "meta")


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    small = st.integers(1, 3)
    kv_heads, layers = draw(small), draw(small)
    own = {
        "hidden_size": 8 * draw(small),
        "intermediate_size": 12 * draw(small),
        "num_attention_heads": kv_heads * draw(small),
        "num_key_value_heads": kv_heads,
        "head_dim": 4 * draw(small),
        "num_hidden_layers": layers,
        "layer_types": [(SLIDING, FULL)[index % 2] for index in range(layers)],
        "num_lyric_encoder_hidden_layers": draw(small),
        "num_timbre_encoder_hidden_layers": draw(small),
        "num_attention_pooler_hidden_layers": draw(small),
        "audio_acoustic_hidden_dim": 2 * draw(small),
        "timbre_hidden_dim": 2 * draw(small),
        "text_hidden_dim": 4 * draw(small),
        "in_channels": 6 * draw(small),
        "patch_size": draw(small),
        "pool_window_size": draw(st.integers(2, 5)),
        "fsq_input_levels": draw(st.lists(st.integers(2, 5), min_size=1, max_size=4)),
        "sliding_window": 4,
    }
    return own | {"fsq_dim": own["hidden_size"]}


@given(config=configs())
@few
def test_every_component_has_the_modules_shapes(config):
    # a stack's own list of layer types is as long as the stack in diffusers
    config_of_modules = {name: value for name, value in config.items() if name != "layer_types"}
    expected = {n: sorted(t.values()) for n, t in ace_step.census("dit", ace_step.dit_file(config)).items()}
    assert census(config_of_modules) == expected


def test_the_published_components_have_the_modules_shapes():
    found = record()
    built = census(dict(found.config("dit")))
    assert {name: len(table) for name, table in built.items()} == {
        name: found.tensors(name) for name in ace_step.COMPONENTS if ace_step.COMPONENTS[name][0] == "dit"
    }
    assert all(sorted(found.implied[name].values()) == table for name, table in built.items())
    assert {name: sum(map(prod, table)) for name, table in built.items()} == {
        name: found.parameters(name) for name in built
    }


@pytest.mark.parametrize("role", ace_step.ROLES)
def test_the_published_groups_are_the_modules(role):
    """The record's table of tensors, which claims on names and shapes read, is that of the modules built now."""
    config = dict(record().config(role))
    tables = {"dit": dit_file, "vae": lambda _: shapes_of(published_autoencoder())}
    assert record().setting("tensor_groups")[role] == headers.grouped(tables.get(role, qwen3)(config))


@pytest.mark.parametrize("role", ["lm", "text_embedder"])
def test_language_models_are_qwen3(role):
    config = dict(record().config(role))
    assert qwen3(config) == ace_step.language_model(config)


def test_one_layer_adds_its_own_parameters():
    config = dict(record().config("dit"))
    more = config | {"num_hidden_layers": 25, "layer_types": [*config["layer_types"], SLIDING]}
    added = shapes.parameters(ace_step.transformer(more)) - shapes.parameters(ace_step.transformer(config))
    assert added == record().layer_parameters("dit") == 62_933_504


# ---- the autoencoder


@st.composite
def oobleck_configs(draw: st.DrawFn) -> dict[str, Any]:
    stages = draw(st.integers(1, 3))
    width = 2 * draw(st.integers(1, 3))
    return {
        "audio_channels": draw(st.integers(1, 2)),
        "encoder_hidden_size": 2 * width,
        "decoder_channels": draw(st.integers(1, 4)),
        "decoder_input_channels": width,
        "channel_multiples": draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)),
        "downsampling_ratios": [2 * draw(st.integers(1, 3)) for _ in range(stages)],
        "sampling_rate": 48_000,
    }


@given(config=oobleck_configs(), more=st.integers(0, 400))
@few
def test_autoencoder_is_the_module(config, more):
    """Tensors by name and shape, and the lengths that the module's convolutions give, without memory."""
    samples = 2 * oobleck.downsampling(config) + more  # a latent or two at the least
    module = build(diffusers("models").AutoencoderOobleck, config, "meta")
    assert oobleck.autoencoder(config) == {n: tuple(p.shape) for n, p in module.named_parameters()}
    audio = torch.zeros(1, config["audio_channels"], samples, device="meta")
    latents = module.encode(audio).latent_dist.mode()
    assert latents.shape[-1] == oobleck.latents_of(config, samples)
    decoded = module.decode(torch.zeros(1, config["decoder_input_channels"], latents.shape[-1], device="meta")).sample
    assert decoded.shape[-1] == oobleck.samples_of(config, latents.shape[-1])


@given(count=st.integers(1, 2000))
@few
def test_round_trip_of_the_published_autoencoder(count):
    config = record().config("vae")
    samples = count * oobleck.downsampling(config)
    assert oobleck.latents_of(config, samples) == count
    assert oobleck.samples_of(config, count) == samples
    assert oobleck.latents_of(config, samples - 1) == count - 1


def test_ten_seconds_through_the_published_autoencoder():
    config = dict(record().config("vae"))
    module = published_autoencoder()
    assert oobleck.autoencoder(config) == shapes_of(module)
    stated = record().variable("vae_shape_check")
    latents = module.encode(torch.zeros(*stated[0].values.tolist(), device="meta")).latent_dist.mode()
    assert list(latents.shape) == stated.sel(tensor="latent").values.tolist()
    assert latents.shape[1] == record().latent_channels
    assert list(module.decode(latents).sample.shape) == stated.sel(tensor="decoded").values.tolist()


# ---- lengths of a song


def test_ten_minutes_through_the_published_modules():
    """15,000 latents make 3,000 tokens, and the DiT gives 15,000 latents back."""
    found, config = record(), dict(record().config("dit"))
    latents = int(found.frames("vae_latent"))
    built = parts(config)
    _, indices = built["tokenizer"].tokenize(torch.zeros(1, latents, 64, device="meta"))
    assert indices.shape[1] == found.frames("fsq_token") == 3000
    seen = []
    built["decoder"].layers[0].register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    one = torch.zeros(1, device="meta")
    states = [torch.zeros(1, latents, width, device="meta") for width in (64, 128)]
    condition = torch.zeros(1, 3, 2048, device="meta")
    velocity = built["decoder"](states[0], one, one, condition, states[1]).sample
    assert velocity.shape == (1, latents, 64)
    assert seen[0]["hidden_states"].shape[1] == found.frames("dit_patch") == 7500


# ---- what runs through the modules

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "layer_types": [SLIDING, FULL],
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 2,
    "num_attention_pooler_hidden_layers": 2,
    "audio_acoustic_hidden_dim": 4,
    "timbre_hidden_dim": 4,
    "text_hidden_dim": 8,
    "in_channels": 12,
    "patch_size": 2,
    "pool_window_size": 5,
    "fsq_dim": 16,
    "fsq_input_levels": [8, 8, 8, 5, 5, 5],
    "sliding_window": 4,
}


TRANSFORMER = "self.transformer"  #: how the pipeline calls the DiT
GATES = [2, 5]  #: of shift, scale and gate, twice


@cache
def tiny(name: str) -> Any:
    return parts(TINY, "cpu")[name]


def test_the_second_time_embedding_sees_the_difference():
    model, seen = tiny("decoder"), []
    handle = model.time_embed_r.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    states, condition, context = torch.randn(1, 6, 4), torch.randn(1, 3, 16), torch.randn(1, 6, 8)
    for t, r in ((0.7, 0.7), (0.2, 0.2), (0.7, 0.2)):
        model(states, torch.tensor([t]), torch.tensor([r]), condition, context)
    handle.remove()
    assert flow("time_embed_r_input") == "t - r"
    assert [float(value) for value in seen] == pytest.approx([0, 0, 0.5])


def test_the_sampler_passes_one_time_twice():
    """In the pipeline's source: every call of the transformer has one expression for `timestep` and `timestep_r`."""
    pipeline = diffusers("pipelines.ace_step.pipeline_ace_step").AceStepPipeline
    tree = ast.parse(textwrap.dedent(inspect.getsource(pipeline.__call__)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == TRANSFORMER]
    times = [{one.arg: ast.unparse(one.value) for one in call.keywords} for call in calls]
    assert flow("sampler_timestep_r") == "t"
    assert len(times) >= 1
    assert [time["timestep_r"] for time in times] == [time["timestep"] for time in times]


def test_cross_attention_is_not_modulated():
    """With both gates at 0 a block adds its cross-attention, of a norm that no shift or scale moved, whatever these."""
    block, states, condition = tiny("decoder").layers[1], torch.randn(1, 6, 16), torch.randn(1, 3, 16)
    added = []
    for seed in range(2):
        vectors = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed))
        vectors[:, GATES] = 0
        rotary = (torch.ones(6, 8), torch.zeros(6, 8))
        # what a block adds its table to, so that their sum is `vectors`
        given = vectors - block.scale_shift_table
        added.append(block(states, rotary, given, None, condition) - states)
    own = block.cross_attn(hidden_states=block.cross_attn_norm(states), encoder_hidden_states=condition)
    assert own.abs().min() > 0
    for found in added:
        torch.testing.assert_close(found, own)


def test_a_gate_closes_each_of_the_other_two():
    """The six vectors in threes: with one gate at 1 the block adds something more than its cross-attention."""
    block, states, condition = tiny("decoder").layers[1], torch.randn(1, 6, 16), torch.randn(1, 3, 16)
    rotary = (torch.ones(6, 8), torch.zeros(6, 8))
    found = []
    for opened in ([], [GATES[0]], [GATES[1]]):
        vectors = torch.zeros(1, 6, 16)
        vectors[:, opened] = 1
        found.append(block(states, rotary, vectors - block.scale_shift_table, None, condition))
    assert (found[1] - found[0]).abs().max() > 1e-3
    assert (found[2] - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lyric_encoder", "timbre_encoder"])
def test_encoders_look_both_ways(name):
    """The first frame moves when one after it changes, and the other way round: within the band and in both layers."""
    encoder, frames = getattr(tiny("encoder"), name), torch.randn(1, 3, 8 if name == "lyric_encoder" else 4)
    seen: list[torch.Tensor] = []
    handle = encoder.norm.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    for place in (None, 0, 2):
        changed = frames.clone()
        if place is not None:
            changed[:, place] += 3
        second = None if name == "lyric_encoder" else torch.zeros(1, dtype=torch.long)
        encoder(changed, second)
    handle.remove()
    assert (seen[1] - seen[0]).abs().amax(-1)[2] > 1e-4
    assert (seen[2] - seen[0]).abs().amax(-1)[0] > 1e-4
    assert not record().is_causal(name)


def test_the_timbre_encoder_takes_the_first_frame():
    """Its special token has no gradient at all, and the output is that of the first frame."""
    encoder, frames = tiny("encoder").timbre_encoder, torch.randn(1, 7, 4)
    last: list[torch.Tensor] = []
    handle = encoder.norm.register_forward_hook(lambda module, arguments, output: last.append(output))
    pooled, _ = encoder(frames, torch.zeros(1, dtype=torch.long))
    handle.remove()
    pooled.sum().backward()
    assert flow("timbre_pooling") == "first frame"
    assert encoder.special_token.grad is None
    assert encoder.embed_tokens.weight.grad.abs().sum() > 0
    torch.testing.assert_close(pooled[0, 0], last[0][0, 0])


@pytest.mark.parametrize("window", range(4))
def test_a_token_sees_its_own_window(window):
    tokenizer, latents = tiny("tokenizer"), torch.randn(1, 20, 4)
    changed = latents.clone()
    changed[:, 5 * window : 5 * window + 5] += 3
    pooled = [
        tokenizer.attention_pooler(tokenizer.audio_acoustic_proj(x.reshape(1, 4, 5, 4))) for x in (latents, changed)
    ]
    moved = (pooled[0] - pooled[1]).abs().amax(-1)[0] > 1e-6
    assert flow("pooling_sees") == "own window"
    assert moved.nonzero().flatten().tolist() == [window]


def test_the_pooling_token_is_used():
    """Unlike the timbre encoder's."""
    tokenizer = tiny("tokenizer")
    tokenizer.attention_pooler(torch.randn(1, 2, 5, 16)).sum().backward()
    assert tokenizer.attention_pooler.special_token.grad.abs().sum() > 0


def test_encoders_slide_in_every_other_layer():
    found, encoders = record(), diffusers("pipelines.ace_step.modeling_ace_step")
    for name in ("lyric_encoder", "timbre_encoder"):
        stack = getattr(build(encoders.AceStepConditionEncoder, dict(found.config("dit")), "meta"), name)
        types = stack._layer_types[: len(stack.layers)]  # the DiT's whole list, of which a layer takes its own entry
        assert types.count(SLIDING) == found.sliding_layers(name)
        assert types[0] == SLIDING


@given(length=st.integers(1, 24), window=st.integers(0, 30))
@few
def test_band_of_the_mask(length, window):
    transformer = diffusers("models.transformers.ace_step_transformer")
    mask = transformer._create_4d_mask(length, torch.float32, torch.device("cpu"), None, window, True, False)[0, 0] == 0
    assert mask.sum(1).tolist() == shapes.band(length, window)
    assert torch.equal(mask, mask.T)


def test_the_quantizer_knows_every_code():
    """All 64,000 indices come back from their codes; quantising twice changes nothing; each level is taken."""
    quantizer, levels = tiny("tokenizer").quantizer, TINY["fsq_input_levels"]
    indices = torch.arange(record().fsq_codes)
    codes = quantizer._indices_to_codes(indices)
    assert torch.equal(quantizer._codes_to_indices(codes), indices)
    torch.testing.assert_close(quantizer._quantize(codes), codes)
    assert [len(column.unique()) for column in codes.T] == levels
    assert quantizer.codebook_size == record().fsq_codes


def test_the_sampler_takes_eight_steps():
    pipeline = diffusers("pipelines.ace_step.pipeline_ace_step")
    default = inspect.signature(pipeline.AceStepPipeline.__call__).parameters["num_inference_steps"].default
    assert default == flow("sampler_default_steps")
