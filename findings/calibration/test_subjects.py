"""The catalog, facts read from configurations, and what loading refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lab import experiments
from lab.architectures.checkpoints import ARCHITECTURES
from lab.errors import UserError
from lab.subjects import hub, weights
from lab.subjects.catalog import catalog, default_subject, facts, facts_of_model
from lab.subjects.configuration import facts_from_config, tensor_shapes
from lab.subjects.facts import Adapted, Facts, Hub, Local, Wheels
from lab.subjects.gguf import require_facts
from lab.subjects.loading import load, require_finite
from lab.training import specimens

pytestmark = pytest.mark.calibration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Llama as `save_pretrained` writes it, and an empty cache of our own."""
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    path = tmp_path / "My_Llama v1"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    vocabulary = {f"w{index}": index for index in range(48)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w0"))).save_pretrained(path)
    return path


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- the catalog


def test_the_catalog_loads_no_torch_and_no_transformers() -> None:
    program = (
        "import sys, time; start = time.process_time(); import lab.subjects.catalog, lab.subjects.weights;"
        "print(time.process_time() - start, *{'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    seconds, *loaded = min(runs, key=lambda run: float(run.stdout.split()[0])).stdout.split()
    assert loaded == []
    assert float(seconds) < 0.2


def test_every_subject_is_pinned_and_one_is_the_default() -> None:
    assert [subject.name for subject in catalog().values() if subject.default] == [default_subject()]
    for subject in catalog().values():
        match subject.source:
            case Hub(revision=revision):
                assert len(revision or "") == 40
            case Wheels(parts=parts, sha256=whole):
                assert {len(digest) for digest in (whole, *(part.sha256 for part in parts))} == {64}
            case Adapted(base=base, specimen=specimen):
                assert base in catalog()
                assert specimen in specimens.manifest()
            case Local():
                pytest.fail(f"{subject.name} lies on one machine only")


def test_published_experiments_are_experiments() -> None:
    """An experiment that is in the tree has the name that the catalog gives it on the model it was published on."""
    listed = {name for subject in catalog().values() for name in subject.published}
    listed |= {known.experiment for known in ARCHITECTURES}
    assert {path.stem for path in Path("data/published").glob("*.json")} <= listed
    assert listed & set(experiments.modules())


@pytest.mark.parametrize("name", list(catalog()))
def test_facts_are_those_of_the_architecture(name: str) -> None:
    """Sizes and parameter count of a model built (without memory) from the facts alone."""
    subject = facts(name)
    config = AutoConfig.for_model(
        subject.architecture,
        num_hidden_layers=subject.layers,
        hidden_size=subject.width,
        num_attention_heads=subject.heads,
        num_key_value_heads=subject.kv_heads,
        head_dim=subject.head_dim,
        intermediate_size=subject.mlp_width,
        vocab_size=subject.vocabulary,
        tie_word_embeddings=subject.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == subject.parameters
    require_facts(model.config, subject)


def test_an_unknown_subject_meets_its_near_misses() -> None:
    with pytest.raises(
        UserError, match=r"unknown subject 'smollm2-135m': did you mean .*\bsmollm2-135m-instruct( or |\?)"
    ):
        facts("smollm2-135m")
    with pytest.raises(UserError, match=r"unknown subject '\?\?': the catalog has smollm2-135m-instruct, "):
        facts("??")


# ---- facts of other models


def test_facts_of_a_folder(folder: Path) -> None:
    subject = facts_of_model(folder)
    assert (subject.name, subject.architecture, subject.source) == ("my-llama-v1", "llama", Local(folder))
    assert (subject.layers, subject.width, subject.heads, subject.kv_heads, subject.head_dim) == (3, 32, 4, 2, 8)
    assert (subject.mlp_width, subject.vocabulary, subject.tied) == (40, 48, False)
    assert (subject.frame, subject.device, subject.default) == ("plain", "cpu", False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert subject.parameters == sum(parameter.numel() for parameter in model.parameters())
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert facts_of_model(folder).frame == "chat"


def read(config: dict[str, object]) -> Facts:
    shapes = {"model.embed_tokens.weight": (100, 64)}
    return facts_from_config(config, name="x", source=Hub("a/x"), shapes=shapes, size_bytes=None, chat=False)


def test_facts_of_a_text_tower_and_of_an_old_configuration() -> None:
    tower = {"num_hidden_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "head_dim": 32}
    found = read(
        {"model_type": "many", "vision_config": {"hidden_size": 7}, "text_config": {"model_type": "t", **tower}}
    )
    assert (found.architecture, found.layers, found.width, found.head_dim, found.tied) == ("t", 5, 64, 32, True)
    old = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_inner": None, "vocab_size": 100}
    found = read(old)
    assert (found.layers, found.kv_heads, found.head_dim, found.mlp_width) == (2, 4, 16, 256)


def test_a_configuration_of_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="configuration of x has no num_hidden_layers; it does not describe a decoder"):
        read({"model_type": "resnet", "hidden_size": 64})


def test_pickles_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        facts_of_model(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors; fetch or copy"):
        facts_of_model(folder)


@pytest.mark.parametrize("size", [0, 4, 200])
def test_a_truncated_safetensors_header_is_one_line(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file \(.+\); fetch or save"):
        tensor_shapes(file)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "no-such-thing",
            "cannot find the model 'no-such-thing': no such folder or file, and a hub id reads OWNER/NAME",
        ),
        (__file__, "neither a folder with config.json and safetensors nor a .gguf file"),
    ],
)
def test_what_is_no_model_is_one_line(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        facts_of_model(model)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def silent(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    monkeypatch.setattr(hub, "cached_snapshot", lambda _: None)
    for ask in (hub.facts_of_hub, lambda model: hub.download(Hub(model))):
        with pytest.raises(UserError, match=r"^cannot get nobody/nothing from the hub \(ConnectionError\); try again"):
            ask("nobody/nothing")


# ---- digests


def test_the_digest_is_that_of_what_the_model_computes(folder: Path) -> None:
    """Another weight or another configuration is another digest; who wrote the files is not part of it."""
    digest = weights.weights_digest(folder)
    edit(folder / "config.json", transformers_version="0", _name_or_path="elsewhere", dtype="bfloat16")
    assert weights.weights_digest(folder) == digest
    edit(folder / "config.json", rms_norm_eps=0.25)
    changed = weights.weights_digest(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert len({digest, changed, weights.weights_digest(folder)}) == 3


# ---- loading


def test_a_loaded_subject_is_ready_to_be_measured(folder: Path) -> None:
    subject = load(facts_of_model(folder))
    assert (subject.dtype, subject.device, subject.digest) == (
        torch.bfloat16,
        torch.device("cpu"),
        weights.weights_digest(folder),
    )
    assert not subject.model.training
    assert {(parameter.dtype, parameter.requires_grad) for parameter in subject.model.parameters()} == {
        (torch.bfloat16, False)
    }
    assert len(subject.decoder.layers) == subject.facts.layers


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5:7] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_weights, r"2 entries of model\.layers\.1\.mlp\.up_proj\.weight are NaN or infinite; fetch or save"),
        (drop_a_tensor, r"lacks 1 tensors of my-llama-v1, model\.layers\.2\.mlp\.up_proj\.weight first"),
        (truncate, r"Transformers cannot load my-llama-v1 from .*; fetch or save it again"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load the tokenizer of my-llama-v1"),
        (
            lambda folder: edit(folder / "config.json", model_type="mine", auto_map={"AutoModel": "code.Mine"}),
            r"my-llama-v1 \(mine\) needs code that comes with the model, which is never run",
        ),
        (
            lambda folder: edit(folder / "config.json", model_type="llama9"),
            "model type 'llama9', which this version of Transformers does not know; update it",
        ),
        (
            lambda folder: edit(folder / "config.json", model_type="vit"),
            "my-llama-v1 is a vit, which Transformers does not know as a language model",
        ),
    ],
)
def test_a_damaged_model_is_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    subject = facts_of_model(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(subject)
    assert "\n" not in str(caught.value)


def test_sums_that_overflow_are_not_mistaken_for_bad_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.isfinite(model.model.layers[1].mlp.up_proj.weight.sum())
    require_finite(model, "large")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int3"}, "unknown dtype 'int3': choose one of bfloat16, float16, float32"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        pytest.param(
            {"device": "cuda"},
            "PyTorch finds no CUDA device here; choose --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_conditions_that_cannot_be_had_are_one_line(folder: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(facts_of_model(folder), **arguments)


def test_weights_that_are_not_here_come_with_the_command(folder: Path) -> None:
    """`folder` is used for its empty cache."""
    with pytest.raises(UserError, match="not here; fetch them with `python -m lab fetch gemma-3-270m`"):
        load(facts("gemma-3-270m"))
