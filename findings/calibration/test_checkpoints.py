"""Checkpoints of several parts: recognised by their folder, judged by their headers, and apart from all decoders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fixtures import collection
from fixtures.options import Options
from lab import experiments, published
from lab.architectures import ace_step, checkpoints, fish_speech
from lab.architectures.headers import group_parameters
from lab.architectures.shapes import Shapes, parameters
from lab.errors import NotApplicable, UserError
from lab.experiments.architectures import acestep_v15, fish_speech_s2_pro
from lab.experiments.architectures.acestep_v15 import AceStep
from lab.experiments.architectures.fish_speech_s2_pro import FishSpeech
from lab.subjects import catalog
from lab.subjects.tiny import tiny
from lab.subjects.uncatalogued import named_model

pytestmark = pytest.mark.calibration

REPOSITORY = Path(__file__).parents[2]
SIZES = {"dim": 16, "intermediate_size": 24, "n_head": 4, "n_local_heads": 2, "head_dim": 4}


def fish_config() -> dict:
    """The published configuration, with small sizes."""
    config = json.loads(published.dataset("fish_speech_s2_pro").attrs["provenance"])["settings"]["config"]
    config["text_config"] |= SIZES | {"n_layer": 3, "vocab_size": 128}
    config["audio_decoder_config"] |= SIZES | {"n_layer": 2, "vocab_size": 24, "text_dim": 16}
    return config


def ace_configs() -> dict[str, dict]:
    """The published configurations, with small sizes."""
    configs = json.loads(published.dataset("acestep_v15").attrs["provenance"])["settings"]["configs"]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"head_dim": 4, "num_hidden_layers": 2, "vocab_size": 64}
    configs["dit"] |= small | {"num_lyric_encoder_hidden_layers": 2, "num_timbre_encoder_hidden_layers": 1}
    configs["dit"] |= {"text_hidden_dim": 8, "fsq_dim": 16}
    for role in ("lm", "text_embedder"):
        configs[role] |= small
    configs["vae"] |= {"encoder_hidden_size": 4, "decoder_channels": 2}
    return configs


def save(folder: Path, config: dict, table: Shapes, name: str = "model.safetensors", shards: int = 1) -> Path:
    """A checkpoint of zeros in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in table.items()}
    if shards == 1:
        save_file(tensors, folder / name)
        return folder
    index = {key: f"model-{number % shards}.safetensors" for number, key in enumerate(tensors)}
    for file in set(index.values()):
        save_file({key: tensors[key] for key in tensors if index[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture
def fish(tmp_path: Path) -> Path:
    return save(tmp_path / "My Speech", fish_config(), fish_speech.tensors(fish_config()), shards=2)


@pytest.fixture
def ace(tmp_path: Path) -> Path:
    configs, root = ace_configs(), tmp_path / "music"
    save(root / "acestep-v15-tiny", configs["dit"], ace_step.dit_file(configs["dit"]))
    save(root / "acestep-5Hz-lm-tiny", configs["lm"], ace_step.language_model(configs["lm"]))
    save(root / "Qwen3-Embedding", configs["text_embedder"], ace_step.language_model(configs["text_embedder"]))
    save(
        root / "vae",
        configs["vae"],
        ace_step.oobleck.autoencoder(configs["vae"]),
        "diffusion_pytorch_model.safetensors",
    )
    (root / "assets").mkdir()
    return root


def fish_record(folder: Path) -> FishSpeech:
    return FishSpeech(named(fish_speech_s2_pro.measure(folder)))


def ace_record(folder: Path) -> AceStep:
    return AceStep(named(acestep_v15.measure(folder)))


def named(data):
    provenance = json.dumps({"settings": json.loads(data.attrs["settings"])})
    return data.assign_attrs(subject="mine", source="measured", condition="headers", provenance=provenance)


# ---- recognising


def test_a_speech_checkpoint_is_recognised(fish):
    facts = checkpoints.named_checkpoint(fish)
    assert facts is not None
    assert (facts.name, facts.architecture, facts.published) == (
        "my-speech",
        "fish_qwen3_omni",
        ("fish_speech_s2_pro",),
    )
    assert (facts.layers, facts.width, facts.heads, facts.kv_heads, facts.vocabulary) == (3, 16, 4, 2, 128)
    assert facts.parameters == parameters(fish_speech.tensors(fish_config()))


def test_a_music_checkpoint_is_recognised_whole_and_by_its_dit(ace):
    whole, dit = checkpoints.named_checkpoint(ace), checkpoints.named_checkpoint(ace / "acestep-v15-tiny")
    assert whole is not None
    assert dit is not None
    assert (whole.architecture, whole.layers, dit.layers) == ("acestep", 2, 2)
    assert whole.parameters == sum(map(parameters, ace_step.components(ace_configs()).values()))
    assert dit.parameters == parameters(ace_step.dit_file(ace_configs()["dit"]))
    assert checkpoints.named_checkpoint(ace / "vae") is None


def test_a_name_that_is_taken_becomes_another(tmp_path):
    for name in (checkpoints.subjects()[0], catalog.default_subject()):
        folder = save(tmp_path / name, fish_config(), fish_speech.tensors(fish_config()))
        facts = checkpoints.named_checkpoint(folder)
        assert facts is not None
        assert facts.name == f"{name}-local"


def test_decoders_are_left_to_others(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    assert checkpoints.named_checkpoint(tmp_path / "llama") is None
    assert checkpoints.named_checkpoint(tmp_path) is None
    assert checkpoints.named_checkpoint("owner/some-model") is None


def test_published_models_are_described_by_their_configurations():
    speech, music = map(checkpoints.facts, checkpoints.subjects())
    assert (speech.layers, speech.width, speech.vocabulary, speech.tied) == (36, 2560, 155_776, True)
    assert (music.layers, music.width, music.heads) == (24, 2048, 16)
    assert checkpoints.facts(catalog.default_subject()) == catalog.facts(catalog.default_subject())


# ---- one line for every mistake


def test_a_hub_id_asks_for_a_folder():
    with pytest.raises(UserError, match="fishaudio/s2-pro is judged from a checkpoint's headers: download it"):
        checkpoints.named_checkpoint("fishaudio/s2-pro")


@pytest.mark.parametrize("field", ["text_config", "audio_decoder_config"])
def test_a_configuration_without_a_part_is_named(fish, field):
    config = fish_config()
    del config[field]
    (fish / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"none of a fish_qwen3_omni .KeyError: '{field}'"):
        checkpoints.named_checkpoint(fish)


def test_damaged_headers_are_named(fish):
    file = fish / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model-1\.safetensors is not a whole safetensors file"):
        checkpoints.named_checkpoint(fish)


def test_two_models_of_one_role_are_named(ace):
    save(ace / "acestep-v15-turbo", ace_configs()["dit"], ace_step.dit_file(ace_configs()["dit"]))
    with pytest.raises(UserError, match=r"acestep-v15-tiny and .*acestep-v15-turbo are both a dit"):
        checkpoints.named_checkpoint(ace)


# ---- judging by headers


def test_a_speech_checkpoint_follows_from_its_configuration(fish):
    record = fish_record(fish)
    assert record.groups == record.expected_groups
    assert record.slow_layer.values.tolist() == [record.expected_layer["slow_ar"]] * 3
    assert record.expected_layer["slow_ar"] - record.expected_layer["fast_ar"] == 2 * SIZES["head_dim"]
    assert int(record.kind_parameters.sum()) == record.parameters
    assert record.gigabytes == 2 * record.parameters / 1e9


def test_a_tensor_too_many_or_too_few_is_seen(tmp_path):
    table = fish_speech.tensors(fish_config())
    name = "text_model.model.layers.1.attention.wo.weight"
    fewer = fish_record(save(tmp_path / "fewer", fish_config(), {key: table[key] for key in table if key != name}))
    more = fish_record(save(tmp_path / "more", fish_config(), table | {name.replace("weight", "bias"): (16,)}))
    assert fewer.groups != fewer.expected_groups
    assert len(set(fewer.slow_layer.values.tolist())) == 2
    assert more.groups - more.expected_groups == {("text_model.model.layers.{i}.attention.wo.bias", (16,), 1)}
    assert more.named("bias")


def test_what_headers_do_not_tell_is_not_applicable(fish, ace):
    speech, music = fish_record(fish), ace_record(ace / "acestep-v15-tiny")
    for ask in (lambda: speech.codec, lambda: speech.frobenius, lambda: speech.setting("data_flow")):
        with pytest.raises(NotApplicable):
            ask()
    for ask in (lambda: music.parameters("lm_planner"), lambda: music.rates, lambda: music.total):
        with pytest.raises(NotApplicable, match=r"the folder of mine holds no (lm|vae)"):
            ask()


def test_a_music_checkpoint_follows_from_its_configurations(ace):
    record = ace_record(ace)
    assert record.groups_beyond == []
    assert all(record.parameters(name) == record.implied_parameters(name) for name in acestep_v15.COMPONENTS)
    assert all(record.tensors(name) == record.implied_tensors(name) for name in acestep_v15.COMPONENTS)
    assert record.dit_layer_parameters.values.tolist() == [record.layer_parameters("dit")] * 2
    assert record.dit_tensors == len(ace_step.dit_file(ace_configs()["dit"]))
    own, parts = ace_step.widths(ace_configs()["dit"]), acestep_v15.PLAIN_STACKS
    assert [record.layer_parameters(name) for name in parts] == [parameters(ace_step.plain_layer(own))] * len(parts)
    assert record.quantizer_parameters == {"weights": 2 * 6 * 16, "biases": 6 + 16}
    assert record.shapes_of("decoder.layers.{i}.scale_shift_table") == [((1, 6, 16), 2)]
    assert record.shapes_of("decoder.layers.{i}.scale_shift") == []
    assert not any(record.shapes_beyond_dit(name) for name in acestep_v15.STACKS)


def test_what_is_counted_is_not_what_is_implied(ace):
    """Counts are of the file: a tensor less, a component less and a wider MLP are seen in each figure that is read."""
    config = ace_configs()["dit"]
    table = ace_step.dit_file(config)
    wide, gone = "encoder.lyric_encoder.layers.1.mlp.up_proj.weight", "encoder.timbre_encoder.special_token"
    fewer = {name: shape for name, shape in table.items() if name != gone and "text_projector" not in name}
    record = ace_record(save(ace / "acestep-v15-tiny", config, fewer | {wide: (40, 16)}))
    plain = parameters(ace_step.plain_layer(ace_step.widths(config)))
    assert record.layer_parameters("lyric_encoder") == plain + 16 * 16 / 2
    assert record.shapes_beyond_dit("lyric_encoder") == [(40, 16)]
    assert record.shapes_beyond_dit("timbre_encoder") == record.shapes_of(gone) == []
    assert (record.parameters("text_projector"), record.tensors("text_projector")) == (0, 0)
    assert record.implied_parameters("text_projector") == 16 * 8
    assert record.tensors("timbre_encoder") == record.implied_tensors("timbre_encoder") - 1
    assert record.groups_beyond == ["lyric_encoder", "text_projector", "timbre_encoder"]


def test_published_counts_are_read():
    """Layers without counts of their own have an equal part of their component's; another count is another answer."""
    data = published.dataset("acestep_v15")
    assert AceStep(data).dit_layer_parameters.values.tolist() == [62_933_504] * 24
    assert AceStep(data).dit_layer_tensors.values.tolist() == [19] * 24
    changed = data.assign(parameters=data.parameters + 12, tensors=data.tensors + 12)
    more = AceStep(changed)
    assert more.dit_layer_parameters.values.tolist() == [62_933_504.5] * 24
    assert more.dit_layer_tensors.values.tolist() == [19.5] * 24
    assert more.total - AceStep(data).total == 14 * 12
    assert more.dit_tensors == 677 + 11 * 12
    assert more.implied_parameters("dit_layers") == AceStep(data).parameters("dit_layers")


def test_published_groups_are_the_counts():
    """The table of tensors adds up to the counted parameters and tensors of every component."""
    record = AceStep(published.dataset("acestep_v15"))
    for name, (role, _) in ace_step.COMPONENTS.items():
        own = [g for g in record.setting("tensor_groups")[role] if ace_step.component_of(role, g["name"]) == name]
        assert group_parameters(own) == record.parameters(name)
        assert sum(group["count"] for group in own) == record.tensors(name)


def test_a_checkpoint_of_two_dtypes_is_none_in_bfloat16(tmp_path):
    folder = save(tmp_path / "mixed", fish_config(), fish_speech.tensors(fish_config()))
    tensors = {
        key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in fish_speech.tensors(fish_config()).items()
    }
    tensors["text_model.model.norm.weight"] = tensors["text_model.model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    record = fish_record(folder)
    assert record.weight_dtype == "bfloat16, float32"
    with pytest.raises(NotApplicable, match="a size follows from one dtype"):
        assert record.gigabytes


@pytest.mark.parametrize(
    ("name", "shape", "component"),
    [
        ("decoder.layers.0.mlp.up_proj.weight", (24, 15), "dit_layers"),
        ("encoder.lyric_encoder.embed_tokens.bias", None, "lyric_encoder"),
        ("decoder.extra", (3,), "dit_other"),
        ("extra", (3,), "unclassified"),
    ],
)
def test_a_component_with_other_tensors_is_named(ace, name, shape, component):
    config = ace_configs()["dit"]
    table = ace_step.dit_file(config)
    table = {key: table[key] for key in table if key != name} | ({name: shape} if shape else {})
    record = ace_record(save(ace / "acestep-v15-tiny", config, table))
    assert record.groups_beyond == [component]


# ---- which tests there are


def options(*measured) -> Options:
    unset = dict.fromkeys(field.name for field in fields(Options))
    chosen = {"measured": measured, "published": False, "chosen": True, "model": measured[0].name}
    return Options(**unset | chosen | {"budget": "quick", "dtype": "bfloat16"})


def test_an_experiment_is_about_decoders_or_about_one_architecture(fish, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    decoder, speech = named_model(tmp_path / "llama"), checkpoints.named_checkpoint(fish)
    own = {known.experiment for known in checkpoints.ARCHITECTURES}
    for name in experiments.modules():
        assert bool(collection.cases([name], options(decoder), None)) == (name not in own)
        assert bool(collection.cases([name], options(speech), None)) == (name == "fish_speech_s2_pro")
    assert options(speech).condition_of(speech) == "headers"
    assert options(decoder).condition_of(decoder) == "quick-bfloat16"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "findings", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"DL_FINDINGS_CACHE": str(folder / "cache")}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)


def test_a_run_on_a_checkpoint(fish, tmp_path):
    """What a user sees: the claims about this architecture, and no others; general ones hold, exact sizes do not."""
    ended = run("-m", "measured", "--model", str(fish), "--verdicts", str(tmp_path / "verdicts.json"), folder=tmp_path)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "verdicts.json").read_text())
    assert {row["experiment"] for row in found} == {"fish_speech_s2_pro"}
    assert {row["subject"] for row in found} == {"my-speech"}
    verdicts = {row["claim"]: row["verdict"] for row in found}
    assert {name: verdicts[name] for name in ("FS-1", "FS-1b", "FS-4b", "FS-9", "FS-17", "FS-22d")} == {
        "FS-1": "refuted",
        "FS-1b": "holds",
        "FS-4b": "holds",
        "FS-9": "holds",
        "FS-17": "not applicable",
        "FS-22d": "not applicable",
    }
    assert None not in verdicts.values()


def test_a_published_name_is_no_subject_to_measure(tmp_path):
    ended = run("--subject", "fish-speech-s2-pro", folder=tmp_path)
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
    assert ended.returncode == 4
    assert [line for line in lines if "judge a checkpoint of it with --model FOLDER" in line]
    assert len(lines) < 4
