"""The core instruments against implementations that are not ours, on SmolLM2-135M in float32.

The extra `peers` installs them: TransformerLens and nnsight for the lens and the knockouts (T-1, T-2), scikit-dimension
for participation ratios (T-4), pytorch-cka for alignment (T-17), weightwatcher for spectra (T-9).
"""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lab.corpora.corpus import load_corpus
from lab.experiments.layers import logit_lens, residual_geometry
from lab.experiments.layers.residual_geometry import ResidualGeometry
from lab.residual.executor import Executor
from lab.residual.programs import identity, skip
from lab.residual.sweeps import ProgramLosses, sample
from lab.statistics.alignment import linear_cka, unbiased_cka
from lab.statistics.spectra import Spectrum, hill, singular_values
from lab.store import Sweep
from lab.subjects.catalog import facts
from lab.subjects.loading import load

pytestmark = pytest.mark.calibration

MISSING = [name for name in ("transformer_lens", "nnsight", "skdim", "cka", "weightwatcher") if find_spec(name) is None]
if MISSING:
    pytest.skip(
        f"not installed: {', '.join(MISSING)}; pip install -c constraints.txt -e .[peers]", allow_module_level=True
    )

#: two texts of different lengths, so that ours are padded to one batch; a peer sees each alone
PROMPTS, TOKENS, BATCH_TOKENS = 2, 12, 1024
#: the first, whose absence moves every later state far; the last; and between
KNOCKED_OUT = [0, 1, 14, 28, 29]
#: Fused attention here and eager attention in TransformerLens move logits by up to 4e-5 at these tokens. Our sums over
#: 49,152 entries are float32, theirs here float64: 1.3e-5 of divergences that exceed 100 nat at the embedding.
FLOAT32 = {"atol": 2e-4, "rtol": 5e-5}


# ---- lens and knockouts


@pytest.fixture(scope="module")
def texts(smollm2_folder):
    """Token ids and targets, which ours read from the same corpus."""
    return sample(load_corpus(facts("smollm2-135m-instruct"), None), PROMPTS, TOKENS).texts


@pytest.fixture(scope="module", params=["transformer_lens", "nnsight"])
def peer(request, ask, smollm2_folder, texts):
    """What another implementation says about these tokens."""
    asked = [{"ids": text.ids, "targets": text.targets} for text in texts]
    return ask(
        request.param,
        {"model": str(smollm2_folder), "texts": asked, "layers": KNOCKED_OUT, "compare": True, "rounds": 1},
    )


@pytest.fixture(scope="module")
def targets(peer, texts):
    """Per text the peer's states one position before the targets, and at them, float64 [depth, n, d]."""
    ends = np.cumsum([len(text.ids) for text in texts])
    of_texts = np.split(peer["states"].astype(np.float64), ends[:-1], axis=1)
    places = [np.array(text.targets) for text in texts]
    return [(states[:, at - 1], states[:, at]) for states, at in zip(of_texts, places, strict=True)]


@pytest.fixture(scope="module")
def subject(smollm2_folder):
    return load(facts("smollm2-135m-instruct"), "float32")


@pytest.fixture(scope="module")
def corpus(subject):
    return load_corpus(subject.facts, subject.tokenizer)


@pytest.fixture(scope="module")
def lens(subject, corpus):
    return logit_lens.measure(subject, corpus, logit_lens.Budget(PROMPTS, TOKENS, 1, BATCH_TOKENS), Sweep())


@pytest.fixture(scope="module")
def knockouts(subject, corpus):
    n = subject.decoder.n_layers
    programs = {"intact": identity(n)} | {f"without layer {layer}": skip(n, [layer]) for layer in KNOCKED_OUT}
    losses = ProgramLosses(Executor(subject.decoder), Sweep(), BATCH_TOKENS, "float32")
    return losses("layers", sample(corpus, PROMPTS, TOKENS), programs, compare=True)


def test_ranks_of_the_lens_are_the_peers(peer, lens):
    """At all depths and tokens, but for entries whose logit lies within 2e-4 of the target's: rounding orders those."""
    assert lens.sizes["token"] == peer["rank"].shape[1] == PROMPTS * TOKENS
    assert (np.abs(lens["rank"].values - peer["rank"]) <= peer["near"]).all()


@pytest.mark.parametrize("reading", ["target_log_probability", "entropy", "top_probability", "kl"])
def test_readings_of_the_lens_are_the_peers(peer, lens, reading):
    np.testing.assert_allclose(lens[reading].values, peer[reading], **FLOAT32)


def test_norms_of_the_residual_stream_are_the_peers(lens, targets):
    """Where the lens reads: one position before each target."""
    before = np.concatenate([of_text[0] for of_text in targets], axis=1)
    np.testing.assert_allclose(lens["residual_norm"].values, norms_of(before)[..., 0], rtol=1e-5)


def test_knockout_losses_and_divergences_are_the_peers(peer, knockouts):
    np.testing.assert_allclose(knockouts["loss"], peer["loss"], **FLOAT32)
    np.testing.assert_allclose(knockouts["kl"], peer["knockout_kl"], **FLOAT32)
    assert (peer["loss"][1:] - peer["loss"][0]).max() > 1  # what is compared is large


# ---- geometry of the states


@pytest.fixture(scope="module")
def clouds(targets):
    """The peer's states of the completion's tokens, of the first and of the second text [depth, n, d]."""
    return [at for _, at in targets]


@pytest.fixture(scope="module")
def geometry(subject, corpus):
    data = residual_geometry.measure(
        subject, corpus, residual_geometry.Budget(PROMPTS, TOKENS, batch_tokens=BATCH_TOKENS), Sweep()
    )
    provenance = json.dumps({"settings": json.loads(data.attrs.pop("settings"))})
    named = {"subject": subject.facts.name, "source": "measured", "condition": "float32", "provenance": provenance}
    return ResidualGeometry(data.assign_attrs(named))


def test_participation_ratios_are_those_of_scikit_dimension(clouds, geometry):
    """Its PCA of the peer's states against our scatter matrices of ours, raw and of unit norm, at every depth."""
    import skdim

    states = np.concatenate(clouds, axis=1)
    for name, cloud in {"participation_ratio": states, "participation_ratio_unit": states / norms_of(states)}.items():
        theirs = [skdim.id.lPCA(ver="participation_ratio").fit(rows).dimension_ for rows in cloud]
        np.testing.assert_allclose(geometry.variable(name).values, theirs, rtol=1e-5, err_msg=name)


def norms_of(states):
    return np.linalg.norm(states, axis=-1, keepdims=True)


def test_unbiased_alignment_is_that_of_pytorch_cka(clouds):
    """Of every depth with every other, within one text and across two, which it clips to [0, 1]."""
    import cka

    for other in clouds:
        theirs = cka.cka_from_features(torch.tensor(clouds[0]), torch.tensor(other)).numpy()
        ours = np.array([[unbiased_cka(x, y) for y in other] for x in clouds[0]])
        np.testing.assert_allclose(ours.clip(0, 1), theirs, rtol=0, atol=1e-9)
        assert np.ptp(theirs) > 0.1


def test_biased_alignment_is_the_textbook_one(clouds):
    """tr(K H M H) / sqrt(tr(K H K H) tr(M H M H)) with the centring matrix H, term by term; and in feature space."""
    n = TOKENS
    centring = np.eye(n) - 1 / n
    for x, y in zip(*clouds, strict=True):
        k, m = (centring @ cloud @ cloud.T @ centring for cloud in (x, y))
        of_grams = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
        x, y = (cloud - cloud.mean(0) for cloud in (x, y))
        of_features = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
        assert float(linear_cka(x + 1, y - 1)) == pytest.approx(of_grams, rel=1e-9)
        assert of_features == pytest.approx(of_grams, rel=1e-9)


# ---- weights


def test_spectra_are_those_of_weightwatcher(smollm2_folder, tmp_path, monkeypatch):
    """Its float64 SVD against our float64 Gram matrices, the first of a condition number of 50,000: s_k within 1e-6.

    Its entropy adds a small constant to each share. Its exponent is Hill's on the tail that it finds best; ours is
    asked about as many energies.
    """
    import weightwatcher

    monkeypatch.chdir(tmp_path)  # it writes images where it is
    chosen = ((0, "self_attn.q_proj"), (7, "self_attn.k_proj"), (15, "self_attn.v_proj"), (29, "mlp.down_proj"))
    model = torch.nn.Sequential()
    with safe_open(smollm2_folder / "model.safetensors", "pt") as tensors:
        for layer, name in chosen:
            weight = tensors.get_tensor(f"model.layers.{layer}.{name}.weight").float()
            model.append(torch.nn.Linear(*weight.shape[::-1], bias=False)).requires_grad_(False)
            model[-1].weight.copy_(weight)
    details = weightwatcher.WeightWatcher(model=model).analyze()
    assert len(details) == len(chosen)
    for (_, theirs), linear in zip(details.iterrows(), model, strict=True):
        ours = Spectrum(singular_values(linear.weight.numpy()), *linear.weight.shape)
        assert ours.values[0] == pytest.approx(theirs.sv_max, rel=1e-9)
        assert ours.values[-1] == pytest.approx(theirs.sv_min, rel=1e-6)
        assert ours.frobenius_norm_squared == pytest.approx(theirs.norm, rel=1e-9)
        assert ours.stable_rank == pytest.approx(theirs.stable_rank, rel=1e-9)
        assert ours.spectral_entropy == pytest.approx(theirs.entropy, rel=1e-6)
        tail = int((ours.energies >= theirs.xmin * (1 - 1e-9)).sum())
        assert hill(ours.energies, tail) == pytest.approx(theirs.alpha, rel=1e-9)
