"""mutual_score against a loop in float64, scipy's distances, and the reference code's interval average."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eff_kernels.mutual_score import cpu, mutual_distances, mutual_score, reference
from eff_kernels.mutual_score.library import mutual_distances_op

# Relative to norms of about sqrt(C): half dtypes are widened before anything is computed.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


@pytest.fixture(params=["reference", "cpu"])
def path(request, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", request.param)
    return request.param


def features(images, patches, channels, dtype=torch.float32, seed=0):
    return torch.randn(images, patches, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_loop(z):
    """The definition, one pair of patches at a time."""
    z = z.double().numpy()
    out = np.full((len(z), len(z), z.shape[1]), np.inf)
    for i, j, m in np.ndindex(out.shape):
        if i != j:
            out[i, j, m] = min(np.linalg.norm(z[i, m] - other) for other in z[j])
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_distances_are_those_of_the_definition(path, dtype):
    z = features(4, 7, 5, dtype)
    torch.testing.assert_close(
        mutual_distances(z).double(), by_loop(z), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )  # fmt: skip


def test_distances_are_scipys():
    distance = pytest.importorskip("scipy.spatial.distance")
    z = features(3, 40, 16, torch.float64)
    found = mutual_distances(z)
    for i, j in ((0, 1), (2, 0)):
        np.testing.assert_allclose(found[i, j], distance.cdist(z[i], z[j]).min(1), rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(images=st.integers(2, 6), patches=st.integers(1, 40), channels=st.integers(1, 20), seed=st.integers(0, 100))
def test_the_cpu_path_is_the_reference(images, patches, channels, seed):
    z = features(images, patches, channels, torch.float64, seed)
    torch.testing.assert_close(cpu.mutual_distances(z), reference.mutual_distances(z), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("tile", [1, 10, 33, 64, 1000])
def test_the_size_of_a_tile_does_not_matter(tile, monkeypatch):
    z = features(5, 8, 3, torch.float64)
    monkeypatch.setattr(cpu, "TILE", tile)
    torch.testing.assert_close(cpu.mutual_distances(z), reference.mutual_distances(z), rtol=1e-9, atol=1e-7)


def test_patches_that_coincide_are_near_zero_within_the_stated_bound(path):
    z = torch.nn.functional.normalize(features(3, 20, 64), dim=-1)
    z[1] = z[0].flip(0)
    found = mutual_distances(z)
    assert float(found[0, 1].max()) <= 1e-3 and float(found[1, 0].max()) <= 1e-3
    assert float(found[0, 2].min()) > 0.5


def test_the_score_is_the_interval_average_of_the_reference_code():
    z = features(11, 6, 4, torch.float64)
    found = mutual_distances(z)
    for low, high, first, last in ((0.0, 0.3, 0, 3), (0.1, 0.5, 1, 5), (2, 7, 2, 7), (0.0, 1.0, 0, 1), (0, 0.01, 0, 1)):
        ordered = found.sort(dim=1).values
        torch.testing.assert_close(mutual_score(z, low, high), ordered[:, first:last].mean(1))


def test_two_images_have_a_score():
    z = features(2, 3, 4)
    torch.testing.assert_close(mutual_score(z), mutual_distances(z)[[0, 1], [1, 0]])


def test_an_odd_patch_scores_highest():
    z = features(1, 30, 8).repeat(8, 1, 1) + 0.05 * features(8, 30, 8, seed=1)
    z[3, 12] += 3
    score = mutual_score(z)
    assert divmod(int(score.argmax()), 30) == (3, 12)


def test_the_operator_is_registered_properly():
    torch.library.opcheck(mutual_distances_op, (features(3, 5, 4),))
    torch.library.opcheck(mutual_distances_op, (features(3, 5, 4, torch.bfloat16),))


def test_it_works_under_compile():
    z = features(4, 9, 5)
    compiled = torch.compile(lambda value: mutual_score(value * 2), backend="aot_eager")
    torch.testing.assert_close(compiled(z), mutual_score(z * 2))


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (torch.ones(2, 3, 4, dtype=torch.int32), TypeError, "mutual_distances: z is int32, expected float32"),
        (torch.ones(2, 3), ValueError, r"z has shape \(2, 3\), expected \(images, patches, channels\)"),
        (torch.ones(1, 3, 4), ValueError, "number of images is 1, expected at least 2"),
        (torch.ones(2, 0, 4), ValueError, r"z is empty, shape \(2, 0, 4\)"),
        (torch.full((2, 3, 4), torch.nan), ValueError, "z holds NaN or infinity, expected finite features"),
    ],
)
def test_wrong_features_are_refused(z, error, message):
    with pytest.raises(error, match=message):
        mutual_distances(z)


def test_features_without_dimensions_are_refused_by_the_score():
    with pytest.raises(ValueError, match=r"mutual_score: z has shape \(\), expected \(images, patches, channels\)"):
        mutual_score(torch.tensor(1.0))


@pytest.mark.parametrize("exponent", [-130, -70, 41, 66, 120])
def test_features_whose_squares_leave_float32_have_the_distances_of_scaled_ones(path, exponent):
    z = features(3, 5, 4)
    scaled = torch.ldexp(z.double(), torch.tensor(exponent)).float()
    expected = torch.ldexp(by_loop(z), torch.tensor(exponent))
    assert scaled.isfinite().all()
    torch.testing.assert_close(mutual_distances(scaled).double(), expected, rtol=2e-5, atol=2e-5 * 2.0**exponent)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ({"low": None}, TypeError, "mutual_score: low is None, expected a number"),
        ({"high": "1"}, TypeError, "high is '1', expected a number"),
        ({"high": math.inf}, ValueError, "high is inf, expected a finite number"),
        ({"low": math.nan}, ValueError, "low is nan, expected a finite number"),
        ({"high": True}, TypeError, "high is True, expected a number"),
    ],
)
def test_bounds_that_are_no_numbers_are_refused(bounds, error, message):
    with pytest.raises(error, match=message):
        mutual_score(torch.ones(3, 2, 2), **bounds)


def test_without_values_there_is_the_shape():
    assert mutual_score(torch.ones(3, 2, 4, device="meta")).shape == (3, 2)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (0.3, 0.3), (0.5, 0.2)])
def test_a_wrong_interval_is_refused(low, high):
    with pytest.raises(ValueError, match="expected 0 <= low < high"):
        mutual_score(torch.ones(3, 2, 2), low, high)
