"""Known answers of the clouds of T-4: synthetic points whose shape is planted."""

import numpy as np
import pytest
import scipy
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.experiments.layers.measuring.residual_geometry import cloud
from lab.experiments.layers.measuring.residual_geometry_variables import RECORDED
from lab.experiments.layers.residual_geometry import ResidualGeometry
from lab.records import variable
from lab.residual.scatter import deflated, scatter_products, scatters
from lab.statistics.category_cosines import largest_gap_p_value, memberships, within_and_between
from lab.statistics.geometry_figures import Draw
from lab.statistics.point_clouds import participation_ratio, spectral_flatness

pytestmark = pytest.mark.calibration

CENTRED = ("participation_ratio", "cosine_centered_mean", "cosine_centered_std", "directional_dimension")
RAW = ("cosine_raw_mean", "cosine_raw_std")


def geometry(rows, counts=None, categories=None, rank=None):
    """The record of one cloud [N, d]."""
    rows = np.asarray(rows, dtype=float)
    counts = [len(rows)] if counts is None else counts
    kept = cloud(torch.from_numpy(rows), counts, 5.0)
    norms = [np.linalg.norm(part, axis=1) for part in np.split(rows, np.cumsum(counts)[:-1])]
    arrays = {name: np.asarray(values)[None] for name, values in kept.items()}
    arrays |= {"norm_max": np.array([[norm.max() for norm in norms]]), "scored_tokens": np.array(counts)}
    arrays |= {"norm_min": np.array([[norm.min() for norm in norms]]), "flatness_rank": rank or min(rows.shape)}
    data = {name: variable(RECORDED[name][0], values, "", "") for name, values in arrays.items()}
    labels = categories if categories is not None else ["one"] * len(counts)
    coords = {"site": [0], "layer": [0], "gap": [1], "category": ("prompt", labels)}
    attributes = {"subject": "synthetic", "source": "measured", "condition": "full"}
    return ResidualGeometry(xr.Dataset(data, coords, attributes))


def value(record, name):
    return float(record.variable(name)[0])


def resampled(record, draws):
    return ResidualGeometry(record.data, Draw(record._draw.kept, np.asarray(draws, dtype=float)))


def gaussian(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


# ---- planted shapes


def test_an_isotropic_gaussian_has_the_dimension_that_its_sample_size_allows():
    d = 40
    n = 20 * d
    record = geometry(gaussian(n, d))
    assert value(record, "participation_ratio") == pytest.approx((n - 1) * d / (n + d), rel=0.03)
    assert value(record, "cosine_centered_std") == pytest.approx(1 / np.sqrt(d), rel=0.02)
    assert value(record, "directional_dimension") == pytest.approx(d, rel=0.03)
    assert abs(value(record, "cosine_centered_mean")) < 0.01
    assert value(record, "outlier_tokens") == 0


def test_flatness_of_an_exact_identity_is_one():
    record = geometry(np.vstack([np.eye(12), -np.eye(12)]))
    assert value(record, "spectral_flatness") == pytest.approx(1)
    assert value(record, "spectral_flatness_leading") == pytest.approx(1)
    assert value(record, "num_nonzero_singular_values") == 12


def two_levels(p, a, q, b, d):
    """Points on the axes of a random basis, with p variances a and q variances b."""
    basis = scipy.stats.ortho_group.rvs(d, random_state=1)
    scaled = np.concatenate([np.sqrt(a) * np.eye(d)[:p], np.sqrt(b) * np.eye(d)[p : p + q]])
    return np.vstack([scaled, -scaled]) @ basis


@pytest.mark.parametrize(("p", "a", "q", "b"), [(5, 2.0, 0, 1.0), (1, 50.0, 9, 1.0), (3, 4.0, 12, 0.5)])
def test_a_planted_spectrum_gives_its_dimension_shares_and_rank(p, a, q, b):
    record = geometry(two_levels(p, a, q, b, 20) + 7)
    total = p * a + q * b
    assert value(record, "participation_ratio") == pytest.approx(total**2 / (p * a**2 + q * b**2))
    assert value(record, "variance_top1") == pytest.approx(a / total)
    assert value(record, "variance_top5") == pytest.approx((min(p, 5) * a + max(5 - p, 0) * b) / total)
    assert value(record, "num_nonzero_singular_values") == p + q
    assert float(record.variable("singular_values")[0, 0]) == pytest.approx(np.sqrt(2 * a))
    spectrum = [a] * p + [b] * q
    flat = np.exp(np.mean(np.log(spectrum))) / np.mean(spectrum)
    assert float(spectral_flatness(np.array([*spectrum, 0.0]))) == pytest.approx(flat)
    assert float(spectral_flatness(np.array([2.0, 2.0, 0.0]), floor=0)) == pytest.approx(1)  # what is above the floor


@pytest.mark.parametrize("removed", [1, 2])
def test_projecting_out_directions_leaves_the_rest_of_the_spectrum(removed):
    spectrum = np.array([90.0, 30.0, 3.0, 2.0, 1.0])
    points = np.diag(np.sqrt(spectrum)) @ scipy.stats.ortho_group.rvs(8, random_state=2)[:5]
    rest = spectrum[removed:]
    record = geometry(np.vstack([points, -points]))
    expected = rest.sum() ** 2 / (rest**2).sum()
    assert value(record, f"participation_ratio_without_top{removed}") == pytest.approx(expected)


def test_one_outlier_rules_the_raw_dimension_and_no_robust_one():
    n, d, distance = 2000, 100, 60
    scale = 0.96 ** np.arange(d)
    points = gaussian(n, d, 3) * scale
    points /= np.sqrt((points**2).sum(1).mean())
    plain = geometry(points)
    far = np.vstack([points, distance * gaussian(1, d, 4) / np.linalg.norm(gaussian(1, d, 4))])
    record = geometry(far, [1000, 1001])
    p0, total = value(plain, "participation_ratio"), n * 1.0
    expected = (total + distance**2) ** 2 / (total**2 / p0 + distance**4)
    assert value(record, "participation_ratio") == pytest.approx(expected, rel=0.06)
    assert value(record, "participation_ratio") < 0.25 * p0
    for robust, limit in [("unit", 0.01), ("trimmed", 0.01), ("without_top1", 0.1)]:
        name = f"participation_ratio_{robust}"
        assert value(record, name) == pytest.approx(value(plain, name if robust == "unit" else CENTRED[0]), rel=limit)
    assert value(record, "directional_dimension") == pytest.approx(value(plain, "directional_dimension"), rel=0.01)
    assert value(record, "top1_as_single_token") == pytest.approx(1, abs=0.02)
    assert value(record, "outlier_tokens") == 1


# ---- exact means over pairs


def test_pair_means_are_those_of_all_pairs_and_the_sampled_ones_agree():
    points = gaussian(300, 9, 5) + 1
    record = geometry(points, [100, 120, 80])
    for centring, rows in [("raw", points), ("centered", points - points.mean(0))]:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[~np.eye(300, dtype=bool)]
        mean, std = value(record, f"cosine_{centring}_mean"), value(record, f"cosine_{centring}_std")
        assert mean == pytest.approx(cosines.mean(), abs=1e-9)
        assert std == pytest.approx(cosines.std(), abs=1e-9)
        generator = np.random.default_rng(42)
        first, second = generator.integers(300, size=(2, 5000))
        second = np.where(first == second, (second + 1) % 300, second)
        assert abs((unit[first] * unit[second]).sum(1).mean() - mean) <= 4 * std / np.sqrt(5000)


def test_norm_weighted_centred_products_are_an_identity():
    """Why a mean centred cosine of zero shows no isotropy: with norms as weights it is -tr(C)/N for any cloud."""
    points = gaussian(50, 4, 6) * [9, 1, 1, 1] + 3
    centred = points - points.mean(0)
    products = (centred @ centred.T)[~np.eye(50, dtype=bool)]
    assert products.sum() == pytest.approx(-(centred**2).sum())


# ---- invariants

clouds = st.builds(
    lambda n, d, seed, shift: gaussian(n, d, seed) * np.random.default_rng(seed).uniform(0.2, 3, d) + shift,
    st.integers(4, 30),
    st.integers(2, 12),
    st.integers(0, 10**6),
    st.floats(-2, 2),
)


@settings(max_examples=25, deadline=None)
@given(rows=clouds, scale=st.floats(0.01, 100))
def test_shape_is_unchanged_by_rotation_and_scale(rows, scale):
    # Two leading directions: beyond N - 1 of them eigenvalues are rounding, and so is their geometric mean.
    turned = geometry(scale * rows @ scipy.stats.ortho_group.rvs(rows.shape[1], random_state=7), rank=2)
    plain = geometry(rows, rank=2)
    for name in (*CENTRED, *RAW, "spectral_flatness_leading", "variance_top1", "participation_ratio_unit"):
        assert value(turned, name) == pytest.approx(value(plain, name), rel=1e-6, abs=1e-7), name


@settings(max_examples=25, deadline=None)
@given(rows=clouds, shift=st.floats(-50, 50))
def test_centred_figures_are_unchanged_by_a_shift(rows, shift):
    for name in CENTRED:
        assert value(geometry(rows + shift), name) == pytest.approx(value(geometry(rows), name), rel=1e-6, abs=1e-7)


@settings(max_examples=25, deadline=None)
@given(rows=clouds, seed=st.integers(0, 1000))
def test_unit_weighting_ignores_each_tokens_norm(rows, seed):
    factors = np.random.default_rng(seed).uniform(0.01, 100, (len(rows), 1))
    name = "participation_ratio_unit"
    assert value(geometry(factors * rows), name) == pytest.approx(value(geometry(rows), name), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=clouds)
def test_ranges(rows):
    record = geometry(rows)
    dimension, share = value(record, "participation_ratio"), value(record, "variance_top1")
    assert 1 - 1e-9 <= dimension <= min(len(rows) - 1, rows.shape[1]) + 1e-9
    assert 1 / share - 1e-9 <= dimension <= 1 / share**2 + 1e-9
    shares = [value(record, f"variance_top{count}") for count in (1, 5, 10, 50, 100)]
    assert all(np.diff(shares) >= -1e-9)
    assert shares[-1] == pytest.approx(1)
    assert 0 < value(record, "spectral_flatness") <= 1 + 1e-9


# ---- inner products of scatter matrices


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), d=st.integers(2, 11), block=st.integers(1, 12))
def test_scatter_products_are_those_of_the_matrices(seed, d, block):
    rows, counts = torch.from_numpy(gaussian(12, d, seed)), [5, 0, 4, 3]
    matrices = torch.stack([part.T @ part for part in rows.split(counts)]).flatten(1)
    products = scatter_products(rows, counts, block)
    assert torch.allclose(products, matrices @ matrices.T)
    direction = torch.linalg.qr(rows.T[:, :2]).Q
    rest = rows - rows @ direction @ direction.T
    expected = scatter_products(rest, counts), scatters(rest, counts)
    found = deflated(products, scatters(rows, counts), rows, counts, direction)
    assert all(torch.allclose(*pair, atol=1e-9) for pair in zip(found, expected, strict=True))


@settings(max_examples=20, deadline=None)
@given(draws=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any))
def test_a_resample_is_the_cloud_of_the_drawn_tokens_about_the_same_centre(draws):
    rows, counts = gaussian(40, 6, 8) + 1, [12, 8, 14, 6]
    record = resampled(geometry(rows, counts), draws)
    parts = np.split(rows - rows.mean(0), np.cumsum(counts)[:-1])
    drawn = np.concatenate([part for part, times in zip(parts, draws, strict=True) for _ in range(times)])
    scatter = drawn.T @ drawn
    expected = participation_ratio(np.trace(scatter), np.sum(scatter**2))
    assert value(record, "participation_ratio") == pytest.approx(expected)
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    # Copies of a token are no pair of tokens.
    who = np.concatenate(
        [np.arange(start, start + n) for start, n, times in _spans(counts, draws) for _ in range(times)]
    )
    pairs = (unit @ unit.T)[who[:, None] != who[None, :]]
    assert value(record, "cosine_centered_mean") == pytest.approx(pairs.mean())
    assert value(record, "norm_max") == pytest.approx(max(_norms(rows, counts, draws)))
    # Along fixed directions the leading share is a lower bound of the resample's own.
    assert value(record, "variance_top1") <= np.linalg.eigvalsh(scatter)[-1] / np.trace(scatter) + 1e-9


def _spans(counts, draws):
    starts = np.cumsum(counts) - counts
    return zip(starts, counts, draws, strict=True)


def _norms(rows, counts, draws):
    return [np.linalg.norm(rows[start : start + n], axis=1).max() for start, n, times in _spans(counts, draws) if times]


def test_a_resample_of_many_prompts_has_nearly_its_own_leading_share():
    """First-order perturbation: along the sample's directions, a resample's leading share is off by a few percent."""
    counts = [20] * 40
    rows = gaussian(800, 30, 9) * 0.8 ** np.arange(30)
    record = geometry(rows, counts)
    generator = np.random.default_rng(0)
    for _ in range(20):
        draws = np.bincount(generator.integers(40, size=40), minlength=40)
        drawn = np.repeat(rows - rows.mean(0), np.repeat(draws, counts), axis=0)
        own = np.linalg.eigvalsh(drawn.T @ drawn)
        assert value(resampled(record, draws), "variance_top1") == pytest.approx(own[-1] / own.sum(), rel=0.05)


# ---- categories


def texts(categories, of_category, of_prompt, seed=10):
    """Tokens of so many prompts, 10 of each, which share a direction by category and one by prompt."""
    generator = np.random.default_rng(seed)
    names = sorted(set(categories))
    centres = {name: generator.standard_normal(24) for name in names}
    rows = [
        of_category * centres[name] + of_prompt * generator.standard_normal(24) + generator.standard_normal((10, 24))
        for name in categories
    ]
    return geometry(np.concatenate(rows), [10] * len(categories), categories)


CATEGORIES = list("abcd") * 5


def test_planted_categories_are_found_beyond_chance():
    record = texts(CATEGORIES, 1.0, 1.0)
    kept = record._draw.kept
    assert value(record, "category_gap") > 0.1
    assert largest_gap_p_value(record._draw["cosine_sum"][:, 0], kept.tokens, kept.member) <= 0.002


def test_labels_without_meaning_have_no_gap_unless_pairs_within_a_prompt_count():
    other, own, p_values = [], [], []
    for seed in range(25):
        record = texts(CATEGORIES, 0.0, 1.0, seed)
        kept = record._draw.kept
        other.append(value(record, "category_gap"))
        own.append(value(record, "intra_category_cosine") - value(record, "inter_category_cosine"))
        if seed < 6:
            p_values.append(largest_gap_p_value(record._draw["cosine_sum"][:, 0], kept.tokens, kept.member))
    assert abs(np.mean(other)) < 3 * np.std(other) / 5
    assert np.mean(own) > 10 * np.std(own) / 5
    assert np.mean(p_values) > 0.1


def test_category_cosines_are_those_of_the_listed_pairs():
    record = texts(list("aabbb"), 0.5, 1.0)
    kept, sums = record._draw.kept, record._draw["cosine_sum"][0, 0]
    cosine = sums / 100
    within, between = within_and_between(
        sums, kept.tokens, memberships(np.array(list("aabbb"))), np.ones(5), other_prompts=True
    )
    assert within == pytest.approx((cosine[0, 1] + np.mean([cosine[2, 3], cosine[2, 4], cosine[3, 4]])) / 2)
    assert between == pytest.approx(cosine[:2, 2:].mean())
    separation = value(record, "intra_category_cosine") / value(record, "inter_category_cosine") - 1
    assert value(record, "category_separation") == pytest.approx(np.sign(between) * separation)


@pytest.mark.parametrize("other_prompts", [True, False])
def test_category_cosines_of_a_resample_are_those_of_its_tokens(other_prompts):
    """Copies of a prompt are that prompt: their tokens are no pairs of different prompts, a token and its copy none."""
    counts, categories, draws = [3, 4, 2, 5, 3], list("aabab"), np.array([2, 0, 1, 1, 3])
    rows = gaussian(17, 6, 12) + 0.5
    record = geometry(rows, counts, categories)
    prompt = np.repeat(np.arange(5), counts)
    drawn = np.repeat(np.arange(17), draws[prompt])
    unit = rows[drawn] / np.linalg.norm(rows[drawn], axis=1, keepdims=True)
    cosines, label = unit @ unit.T, np.array(categories)[prompt[drawn]]
    apart = prompt[drawn] if other_prompts else drawn
    pairs = apart[:, None] != apart[None, :]
    within = [cosines[pairs & (label[:, None] == name) & (label[None, :] == name)].mean() for name in "ab"]
    between = cosines[(label[:, None] == "a") & (label[None, :] == "b")].mean()
    kept, sums = record._draw.kept, record._draw["cosine_sum"][0, 0]
    found = within_and_between(sums, kept.tokens, kept.member, draws.astype(float), other_prompts=other_prompts)
    assert found == pytest.approx((np.mean(within), between))


def test_centroids_of_mean_states():
    rows = gaussian(30, 5, 11) + 1
    record = geometry(rows, [10, 10, 10], ["a", "b", "a"])
    a, b = rows[[*range(10), *range(20, 30)]].mean(0), rows[10:20].mean(0)
    assert value(record, "centroid_cosine_mean") == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_one_category_has_no_gap():
    record = texts(["a"] * 4, 1.0, 1.0)
    assert np.isnan(value(record, "category_gap"))
    assert np.isnan(largest_gap_p_value(record._draw["cosine_sum"][:, 0], record._draw.kept.tokens, np.ones((1, 4))))
