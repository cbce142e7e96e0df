"""Every instrument on a pretended CUDA device: full budgets on tiny random decoders, shrunk in size alone.

What fails here would fail on a real device: operations between devices, NumPy views of device memory, generators of the
wrong device. What only a real one shows (kernels, their times, its memory) is not seen.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from findings.calibration.pretended_device import CPU, CUDA, pretended_device
from findings.calibration.small_budgets import small_budget, small_corpus
from lab.corpora.contrastive_groups import CONTRASTS, PREFIXES, Group
from lab.corpora.contrastive_tokens import ContrastivePair, TokenGroups, TokenSequence
from lab.corpora.minimal_pairs import TokenPair
from lab.experiments import experiment
from lab.experiments.layers.measuring import activation_patching, contrastive_trajectories
from lab.normalization.settings import NORM_TYPES
from lab.quantization import libraries
from lab.quantization.whole_models import LIBRARIES
from lab.store import Sweep
from lab.subjects.facts import Local
from lab.subjects.products import WIDE, widen_slow_products
from lab.subjects.tiny import VOCABULARY, loaded, tiny

pytestmark = pytest.mark.calibration

#: what texts of one category, short decoders, and weights that lie on no grid do not have
UNKNOWN = {"category_gap_p_value", "kendall_tau_late", "grid_levels"}
#: NaN where a second series of calls disagrees, which on a busy machine all may
DISTURBED = {"forward_latency", "backward_latency", "total_latency"}
#: libraries with CUDA kernels of their own
ABSENT = ("bitsandbytes", "torchao")
MEASURED_HERE = (
    "logit_lens",
    "layer_knockout",
    "layer_swap_cost",
    "residual_geometry",
    "linearization_gap",
    "weight_spectra",
    "layer_shuffle_recovery",
    "quantization",
    "normalization",
)


def subject_of(architecture="llama", folder=None, **changes):
    """A tiny decoder in bfloat16 on the pretended device."""
    heads = {"head_dim": 16} if architecture in ("qwen3", "gemma3_text") else {}
    model = tiny(architecture, hidden_size=64, intermediate_size=128, **heads, **changes).bfloat16()
    if folder is not None:
        model.save_pretrained(folder)
    subject = loaded(model.to("cuda"))
    assert subject.device == CUDA
    words = ("7", " word", " the", ".", "\n")
    tokenizer = SimpleNamespace(decode=lambda ids: words[ids[0] % len(words)])
    facts = subject.facts if folder is None else replace(subject.facts, source=Local(folder))
    return replace(subject, tokenizer=tokenizer, facts=facts)


@pytest.fixture
def device(monkeypatch):
    """A pretended device on a machine that has no libraries with CUDA kernels of their own."""
    there = {f"no-{name}" if name in ABSENT else name: methods for name, methods in LIBRARIES.items()}
    monkeypatch.setattr(libraries, "LIBRARIES", there)
    with pretended_device() as mode:
        yield mode


# ---- the device refuses what CUDA refuses


def test_the_device_is_no_processor(device):
    there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
    assert (there.device, here.device, (2 * there)[1:].device, here.to("cuda").device) == (CUDA, CPU, CUDA, CUDA)
    assert there.cpu().device == CPU
    assert there.is_cuda
    assert not here.is_cuda
    assert torch.arange(3, device=there.device).device == CUDA
    assert there.new_zeros(2).device == CUDA
    assert torch.zeros_like(there).device == CUDA
    assert device.place(torch.nn.Linear(2, 2).to("cuda").weight) == CUDA
    assert there.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([here, there]),
        lambda there, here: torch.nn.functional.linear(there, here[None]),
        lambda there, here: there.index_add_(0, torch.arange(3), there),
        lambda there, here: here[there.long()],
        lambda there, here: there.__setitem__(torch.arange(3), here),
        lambda there, here: here.sum() + here * there.sum(),
    ],
)
def test_devices_do_not_mix(device, mixed):
    with pytest.raises(RuntimeError, match="same device"):
        mixed(torch.zeros(3, device="cuda"), torch.zeros(3))


def test_what_cuda_allows_is_allowed(device):
    there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
    assert (there + here.sum()).device == CUDA
    assert there[torch.arange(2)].device == CUDA
    there[1:] = here[1:]
    here.copy_(there)
    assert (there.device, here.device) == (CUDA, CPU)


@pytest.mark.parametrize("view", [np.asarray, lambda there: there.numpy(), lambda there: there[1:].detach().numpy()])
def test_numpy_sees_no_device_memory(device, view):
    with pytest.raises(TypeError, match="convert cuda:0 device type tensor to numpy"):
        view(torch.zeros(3, device="cuda"))
    assert np.asarray(torch.zeros(3, device="cuda").cpu()).shape == (3,)


def test_generators_belong_to_a_device(device):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
        torch.randn(3, generator=torch.Generator("cuda"))
    assert torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).device == CUDA
    with pytest.raises(TypeError, match="to numpy"):
        torch.func.vmap(torch.sin)(torch.zeros(2, 2, device="cuda")).numpy()


def test_products_are_widened_on_processors_only(device):
    model = subject_of().model
    assert widen_slow_products(model) == 0
    assert not any(type(module) in WIDE.values() for module in model.modules())


# ---- every experiment on the device


@pytest.mark.filterwarnings("ignore:not installed")
@pytest.mark.parametrize("name", MEASURED_HERE)
def test_every_experiment_measures_on_the_device(device, name, tmp_path):
    # Norms of heads too, and few layers: everything is trained and replaced one by one.
    other = name == "normalization"
    made = {"architecture": "qwen3", "num_hidden_layers": 2} if other else {}
    subject = subject_of(folder=tmp_path if name == "weight_spectra" else None, **made)
    corpus = small_corpus(name)
    data = experiment(name).measure(subject, corpus, small_budget(name), Sweep())
    missing = [name for name, values in data.data_vars.items() if np.isnan(values.values).all()]
    assert set(missing) <= UNKNOWN | DISTURBED
    if name == "normalization":
        assert np.isfinite(data["qk_norm_removed_loss"]).all()
        assert data.sizes["norm_type"] == len(NORM_TYPES) - 1
        assert torch.cuda.synchronize.call_count > 2 * data.sizes["norm_type"]


def test_sliding_windows_are_replayed_on_the_device(device):
    data = experiment("layer_knockout").measure(
        subject_of("gemma3_text"), small_corpus("layer_knockout"), small_budget("layer_knockout"), Sweep()
    )
    assert np.isfinite(data["knockout_loss"]).all()


def test_patching_measures_on_the_device(device):
    decoder, pairs = subject_of().decoder, random_pairs()
    assert len(list(activation_patching._answers(decoder, pairs))) == len(pairs)
    assert all(np.isfinite(values).all() for values in activation_patching.patched(decoder, pairs).values())


def random_pairs(count=4, length=7, span=2):
    draw = np.random.default_rng(0)
    pairs = []
    for index in range(count):
        clean = draw.integers(3, VOCABULARY, length).tolist()
        other = [*clean[:span], (clean[span] + 1) % VOCABULARY, *clean[span + 1 :]]
        pairs.append(TokenPair(f"p{index}", "factual", tuple(clean), tuple(other), (span, span + 1), 20, 30 + index))
    return pairs


def test_trajectories_measure_on_the_device(device):
    found = contrastive_trajectories.measured(
        subject_of().decoder, layout(), small_budget("contrastive_trajectories"), Sweep()
    )
    assert np.isfinite(found["kl_divergence"].values).all()


def layout(families=6, entries=2):
    """Families of one-token words behind random prompts, and style entries of nine tokens."""
    draw = np.random.default_rng(0)

    def ids(count):
        return tuple(draw.integers(3, VOCABULARY, count).tolist())

    sequences, pairs = [], []

    def add(family, kind, prefix, a, b, at):
        pivot = next(
            place for place, (x, y) in enumerate(zip(sequences[a].ids, sequences[b].ids, strict=True)) if x != y
        )
        group = Group(f"{family}/{kind}/{prefix}", kind, prefix, "p", ("a", "b"), family)
        pairs.append(ContrastivePair(group, a, b, pivot, 2, pivot - at))

    for family in range(families):
        prompt, words = ids(4 + family % 3), draw.permutation(np.arange(3, VOCABULARY))[:4].tolist()
        for prefix in PREFIXES:
            first = len(sequences)
            front = prompt + (ids(2) if prefix == "shared" else ())
            sequences += [TokenSequence((*front, word), len(prompt)) for word in words]
            for place, kind in enumerate(CONTRASTS):
                add(f"f{family}", kind, prefix, first, first + 1 + place, len(prompt))
    for entry in range(2 * entries):
        prompt, first = ids(5) + (ids(3) if entry % 2 else ()), len(sequences)
        heads = draw.permutation(np.arange(3, VOCABULARY))[:2].tolist()
        sequences += [TokenSequence((*prompt, head, *ids(8)), 5) for head in heads]
        add(f"s{entry}", "style", PREFIXES[entry % 2], first, first + 1, 5)
    names = [f"f{family}" for family in range(families)], [f"s{entry}" for entry in range(2 * entries)]
    return contrastive_trajectories.Layout(TokenGroups(tuple(sequences), tuple(pairs), {}), *names)
