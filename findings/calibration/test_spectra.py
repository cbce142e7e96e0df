"""Known answers of the spectral statistics: planted spectra, random matrices, invariances, and storage grids."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lab import published
from lab.statistics.random_matrices import (
    gaussian_effective_rank_ratio,
    gaussian_spectrum,
    product_effective_rank_ratio,
    spiked_singular_value,
)
from lab.statistics.spectra import (
    GRAM_LIMIT,
    TAIL,
    Spectrum,
    circuit_energies,
    effective_rank_of_gram,
    gram,
    participation_ratio,
    singular_values,
    subspace_overlap,
    top_right_subspace,
)
from lab.statistics.storage_grid import levels, rounded_again, rounding_share, steps

pytestmark = pytest.mark.calibration

SHAPES = [(384, 256), (256, 384), (300, 300), (640, 128)]
shapes = st.sampled_from([(24, 16), (16, 24), (20, 20), (48, 8)])
seeds = st.integers(0, 2**32 - 1)


def random_matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(size, seed=0):
    return np.linalg.qr(random_matrix((size, size), seed))[0]


def planted(values, shape, seed=0):
    """A matrix with these singular values and random directions."""
    k = len(values)
    return orthogonal(shape[0], seed)[:, :k] * values @ orthogonal(shape[1], seed + 1)[:k]


def spectrum_of(matrix):
    return Spectrum(singular_values(matrix), *matrix.shape)


def statistics(spectrum):
    """Everything that does not depend on scale."""
    exponent, fit = spectrum.power_law
    return np.array(
        [
            spectrum.effective_rank,
            spectrum.stable_rank,
            spectrum.spectral_entropy,
            *(spectrum.energy_rank(percent) for percent in (50, 90, 99)),
            exponent,
            fit,
            spectrum.condition_number,
            spectrum.outliers,
            spectrum.outlier_energy_share,
            spectrum.tail_exponent,
        ]
    )


# ---- planted spectra


@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormal_rows_use_all_of_their_rank(shape):
    matrix = planted(np.ones(min(shape)), shape)
    found, k = spectrum_of(matrix), min(shape)
    assert found.effective_rank == pytest.approx(k)
    assert found.stable_rank == pytest.approx(k)
    assert found.spectral_entropy == pytest.approx(1)
    assert found.power_law == pytest.approx((0, 1), abs=1e-9)
    assert found.condition_number == pytest.approx(1)
    assert found.energy_rank(90) == int(np.ceil(0.9 * k - 1e-9))


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_a_projector_has_its_rank(rank):
    basis = orthogonal(96)[:, :rank]
    found = spectrum_of(basis @ basis.T)
    assert found.effective_rank == pytest.approx(rank)
    assert found.numerical_rank == rank
    assert found.energy_rank(99) == rank if rank > 1 else found.energy_rank(50) == 1


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.0])
def test_a_planted_power_law_is_found(exponent):
    values = np.arange(1, 129) ** -exponent
    found, fit = spectrum_of(planted(values, (160, 128))).power_law
    assert found == pytest.approx(exponent, abs=1e-6)
    assert fit == pytest.approx(1, abs=1e-9)


def test_the_smallest_singular_value_survives_a_condition_number_beyond_the_gram_matrix():
    for smallest in (1e-4, 1e-5, 1e-7):  # on both sides of GRAM_LIMIT
        values = np.geomspace(1, smallest, 64)
        found = singular_values(planted(values, (96, 64)))
        assert np.allclose(found, values, rtol=2e-5)
    assert 1e4 < GRAM_LIMIT < 1e7


def test_zeros_have_no_rank():
    found = Spectrum(np.zeros(8), 8, 12)
    assert np.isnan([found.effective_rank, found.stable_rank, found.spectral_entropy, found.condition_number]).all()
    assert found.numerical_rank == 0


# ---- random matrices


@pytest.mark.parametrize("shape", [(1536, 960), (640, 256), (1216, 320), (576, 576)])
def test_a_gaussian_matrix_meets_its_baseline(shape):
    found, null = spectrum_of(random_matrix(shape)), gaussian_spectrum(*shape)
    assert found.effective_rank / min(shape) == pytest.approx(float(gaussian_effective_rank_ratio(*shape)), rel=0.02)
    assert null.effective_rank / min(shape) == pytest.approx(float(gaussian_effective_rank_ratio(*shape)), rel=2e-3)
    assert found.power_law == pytest.approx(null.power_law, abs=0.01)
    assert found.spectral_entropy == pytest.approx(null.spectral_entropy, rel=2e-3)


def test_baselines_equal_those_that_come_with_the_published_figures():
    figures = published.dataset("weight_spectra")
    for name in figures["matrix"].values:
        at = figures.sel(matrix=name)
        null, rank = gaussian_spectrum(int(at["rows"]), int(at["columns"])), int(min(at["rows"], at["columns"]))
        found = {
            "effective_rank_ratio": gaussian_effective_rank_ratio(int(at["rows"]), int(at["columns"])),
            "power_law_exponent": null.power_law[0],
            "power_law_r_squared": null.power_law[1],
            "stable_rank_ratio": null.stable_rank / rank,
            "spectral_entropy": null.spectral_entropy,
            **{f"energy_rank_{percent}": null.energy_rank(percent) for percent in (50, 90, 99)},
        }
        for quantity, value in found.items():
            assert float(value) == pytest.approx(float(at[f"gaussian_{quantity}"]), rel=2e-4), quantity


@pytest.mark.parametrize("share", [0.5, 1.5, 3])
def test_a_spike_stands_out_beyond_the_known_threshold(share):
    shape = (600, 400)
    threshold = (shape[0] * shape[1]) ** 0.25
    left, right = (random_matrix(size, seed) for seed, size in enumerate(shape, 1))
    spike = share * threshold * np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    found = spectrum_of(random_matrix(shape) + spike)
    assert found.values[0] == pytest.approx(spiked_singular_value(share * threshold, *shape), rel=0.02)
    assert found.outliers == (1 if share > 1 else 0)
    assert (found.outlier_energy_share > 0) == (share > 1)


def test_random_matrices_rarely_have_outliers():
    """1 % by construction; 3 or more of 40 would happen once in 150 times."""
    assert sum(spectrum_of(random_matrix((96, 64), seed)).outliers > 0 for seed in range(40)) <= 2


def test_circuits_of_random_factors_meet_their_baseline():
    first, second = random_matrix((64, 576), 1), random_matrix((64, 400), 2)
    ratio = participation_ratio(circuit_energies(first, second)) / 64
    assert ratio == pytest.approx(product_effective_rank_ratio(64, 576, 400), rel=0.02)


def test_random_subspaces_overlap_by_chance():
    first, second = (top_right_subspace(random_matrix((500, 400), seed), 50) for seed in (1, 2))
    assert subspace_overlap(first, second) == pytest.approx(50 / 400, rel=0.1)
    assert subspace_overlap(first, first) == pytest.approx(1)
    turned = first @ orthogonal(50)
    assert subspace_overlap(first, turned) == pytest.approx(1)


def test_the_top_subspace_is_that_of_the_largest_singular_values():
    values = np.r_[10, 9, 8, np.linspace(1, 0.5, 27)]
    matrix = planted(values, (50, 40))
    _, _, directions = np.linalg.svd(matrix)
    assert subspace_overlap(top_right_subspace(matrix, 3), directions[:3].T) == pytest.approx(1)


# ---- routes and invariances


@given(shapes, seeds)
@settings(max_examples=40, deadline=None)
def test_both_routes_give_the_same_spectrum(shape, seed):
    matrix = random_matrix(shape, seed)
    found, plain = spectrum_of(matrix), Spectrum(np.linalg.svd(matrix, compute_uv=False), *shape)
    assert np.allclose(found.values, plain.values, rtol=1e-6)
    assert statistics(found)[:3] == pytest.approx(statistics(plain)[:3], rel=1e-9)
    assert effective_rank_of_gram(gram(matrix)) == pytest.approx(found.effective_rank, rel=1e-10)


def test_float32_svd_agrees():
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix).double().numpy()
    found, plain = spectrum_of(matrix.numpy()), Spectrum(values, 300, 200)
    assert statistics(found)[:3] == pytest.approx(statistics(plain)[:3], rel=1e-6)
    assert found.values[0] == pytest.approx(plain.values[0], rel=1e-6)


@given(shapes, seeds, st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_scale_orientation_and_basis_do_not_matter(shape, seed, scale):
    matrix = random_matrix(shape, seed)
    expected = statistics(spectrum_of(matrix))
    shuffled = matrix[np.random.default_rng(seed).permutation(shape[0])]
    turned = orthogonal(shape[0], seed % 1000) @ matrix @ orthogonal(shape[1], seed % 1000 + 1)
    for other in (scale * matrix, matrix.T, shuffled, turned):
        assert statistics(spectrum_of(other)) == pytest.approx(expected, rel=1e-6)


@given(shapes, seeds, st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_ranks_are_ordered(shape, seed, skew):
    values = np.sort(np.random.default_rng(seed).random(min(shape)) ** (1 + skew) + 1e-3)[::-1]
    found = Spectrum(values, *shape)
    spread = len(values) ** found.spectral_entropy
    close = 1 + 1e-9
    assert 1 <= found.stable_rank * close <= found.effective_rank * close**2
    assert found.effective_rank <= spread * close
    assert spread <= found.numerical_rank * close <= len(values) * close
    ranks = [found.energy_rank(percent) for percent in (50, 90, 99)]
    assert ranks == sorted(ranks)
    for percent, rank in zip((50, 90, 99), ranks, strict=True):
        assert rank >= percent / 100 * found.stable_rank - 1e-9


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_a_circuit_has_the_singular_values_of_its_product(seed):
    first, second = random_matrix((6, 24), seed), random_matrix((6, 17), seed + 1)
    plain = np.linalg.svd(first.T @ second, compute_uv=False)[:6] ** 2
    assert circuit_energies(first, second) == pytest.approx(plain, rel=1e-6, abs=1e-9 * plain[0])


# ---- storage grids


def quantized(weight, bits, block=32):
    """Rounded to nearest with a step and an offset of each block."""
    blocks = weight.reshape(len(weight), -1, block)
    low = blocks.min(-1, keepdims=True)
    step = (blocks.max(-1, keepdims=True) - low) / (2**bits - 1)
    return (low + step * np.round((blocks - low) / step)).reshape(weight.shape).astype(np.float32)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_grid_of_stored_weights_is_read_back(bits):
    weight = random_matrix((128, 512)).astype(np.float32)
    stored = quantized(weight, bits)
    found = steps(stored)
    lost = float(np.square(stored - weight).sum() / np.square(stored).sum())
    assert (found > 0).mean() >= 0.99
    assert rounding_share(stored, found) == pytest.approx(lost, rel=0.1)
    assert levels(stored, found) <= 2**bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_were_not_quantized_lie_on_no_grid(dtype):
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)).to(dtype).float().numpy()
    found = steps(weight)
    assert (found > 0).mean() < 0.01
    assert np.isnan(levels(weight, found))


def test_a_block_with_one_large_weight_does_not_count_as_all_rounding():
    weight = random_matrix((64, 512)).astype(np.float32)
    weight[::8, 5] = 300
    stored = quantized(weight, 4)
    lost = float(np.square(stored - weight).sum() / np.square(stored).sum())
    assert rounding_share(stored, steps(stored)) <= 2 * lost  # 100 times that by the step alone


def test_rounding_again_adds_what_rounding_took():
    weight = random_matrix((128, 512)).astype(np.float32)
    stored = quantized(weight, 4)
    again = rounded_again(stored, steps(stored), seed=1)
    assert np.square(again - stored).sum() == pytest.approx(np.square(stored - weight).sum(), rel=0.1)
    assert np.array_equal(again, rounded_again(stored, steps(stored), seed=1))


def test_rounding_again_moves_ranks_as_rounding_did():
    weight = planted(np.arange(1, 257) ** -0.8, (512, 256)).astype(np.float32)
    stored = quantized(weight, 4)
    ranks = [spectrum_of(w).effective_rank for w in (weight, stored, rounded_again(stored, steps(stored), seed=1))]
    first, second = np.diff(ranks)
    assert second == pytest.approx(first, rel=0.5)


# ---- an independent implementation


@pytest.fixture
def stored(smollm2_folder):
    """Reads a matrix of SmolLM2-135M-Instruct from its file."""
    with safe_open(smollm2_folder / "model.safetensors", "np") as tensors:
        yield lambda layer, name: tensors.get_tensor(f"model.layers.{layer}.{name}.weight")


def test_the_tail_exponent_is_that_of_the_powerlaw_package(stored):
    """Alstott's powerlaw (2014) on the same matrices, with the same threshold, within 1e-6."""
    powerlaw = pytest.importorskip("powerlaw", reason="a development dependency: pip install -e .[dev]")
    for layer in (0, 15, 29):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            found = spectrum_of(stored(layer, name))
            count = round(TAIL * len(found.values))
            threshold, wide = found.energies[count - 1], {"alpha": [1.0001, 100]}  # its own range ends at 3
            fit = powerlaw.Fit(found.energies, xmin=threshold, parameter_ranges=wide, verbose=False)
            assert found.tail_exponent == pytest.approx(fit.power_law.alpha, rel=1e-6)


def test_spectra_are_those_of_numpys_svd_on_stored_matrices(stored):
    """Relative 1e-6 on s_1, effective rank and entropy, the largest and smallest of the matrices' shapes."""
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        weight = stored(7, name)
        plain = Spectrum(np.linalg.svd(weight.astype(np.float64), compute_uv=False), *weight.shape)
        found = spectrum_of(weight)
        assert found.values[0] == pytest.approx(plain.values[0], rel=1e-6)
        assert statistics(found)[:3] == pytest.approx(statistics(plain)[:3], rel=1e-6)
        assert found.condition_number == pytest.approx(plain.condition_number, rel=1e-3)


def test_the_tail_is_a_tenth_and_at_least_two():
    """The four largest of 40 energies are 8, 4, 2 and 1: alpha = 1 + 4 / (ln 8 + ln 4 + ln 2)."""
    energies = np.r_[8.0, 4, 2, 1, np.full(36, 0.5)]
    assert Spectrum(np.sqrt(energies), 40, 50).tail_exponent == pytest.approx(1 + 4 / (6 * np.log(2)))
    assert Spectrum(np.sqrt([9.0, 3, 1]), 3, 3).tail_exponent == pytest.approx(1 + 2 / np.log(3))
    assert np.isnan(Spectrum(np.array([2.0]), 1, 1).tail_exponent)


def test_a_circuit_of_one_direction_has_one_energy():
    """A'B with all rows of A equal; the eigenvalues of AA' that should be 0 come out on either side of it."""
    for seed in range(5):
        generator = np.random.default_rng(seed)
        first, second = np.tile(generator.normal(size=7), (6, 1)), generator.normal(size=(6, 9))
        energies = circuit_energies(first, second)
        assert energies[0] == pytest.approx(np.square(first.T @ second).sum())
        assert energies[1:] == pytest.approx(0, abs=1e-9 * energies[0])


def test_a_value_that_was_rounded_twice_is_one_value():
    """A grid of step 5 up to 75: two values 0.00001 apart are no step, and a step may be larger than 1."""
    row = (5 * np.arange(16)).astype(np.float32)[None]
    row[0, 3] = row[0, 2] + np.float32(1e-5)
    assert row[0, 3] > row[0, 2]
    assert steps(row).tolist() == [[5.0]]
    assert levels(row, steps(row)) == 16
    assert rounding_share(row, steps(row)) == pytest.approx(16 * 25 / 12 / np.square(row.astype(float)).sum())
