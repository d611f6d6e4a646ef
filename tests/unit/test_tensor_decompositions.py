"""Decompositions against TensorLy and theory: bounds, guarantees, exact cases, and no backend left changed."""

import math
from itertools import pairwise

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker, tensor_train

from pquant_lightning import compress_model
from pquant_lightning.methods.tensor_networks._cp_als import cp_als, cp_dense, cp_full_rank, khatri_rao
from pquant_lightning.methods.tensor_networks._sizes import balanced_factors, matrix_modes
from pquant_lightning.methods.tensor_networks._tt_svd import tt_dense, tt_ranks, tt_svd
from pquant_lightning.methods.tensor_networks._tucker2 import tucker2, tucker2_dense, tucker2_ranks

pytestmark = pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs")


@pytest.fixture(autouse=True)
def _torch_backend():
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        yield


def tensor(*shape, seed=0):
    """Values whose unfoldings have falling singular values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    for axis, size in enumerate(shape[1:], start=1):
        mix = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1) ** -0.7
        values = torch.movedim(torch.movedim(values, axis, -1) @ mix, -1, axis)
    return values


def relative_errors(before, after):
    return (before - after).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)


# -- tensor train


@pytest.mark.parametrize("max_error", [0.5, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("shape", [(1, 12, 10, 14), (3, 6, 5, 4, 7), (1, 40, 9), (2, 3, 30, 3)])
def test_the_guarantee_of_tt_svd_holds_for_each_tensor_of_a_batch(shape, max_error):
    values = tensor(*shape)
    cores, squared = tt_svd(values, max_error=max_error)
    errors = relative_errors(values, tt_dense(cores))
    assert errors.max() <= max_error * (1 + 1e-4) + 1e-6
    torch.testing.assert_close(squared.sqrt().float(), errors * values.flatten(1).norm(dim=1), rtol=1e-2, atol=1e-4)


def test_max_error_spends_most_of_what_it_allows():
    values = tensor(1, 16, 16, 16)
    cores, _ = tt_svd(values, max_error=0.3)
    assert relative_errors(values, tt_dense(cores)).item() > 0.2
    assert sum(core.numel() for core in cores) < values.numel() / 2


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_tt_svd_has_tensorlys_error(rank):
    values = tensor(1, 8, 9, 10, 7)
    ranks = tt_ranks(list(values.shape[1:]), rank)
    cores, _ = tt_svd(values, ranks)
    theirs = tensorly.tt_to_tensor(tensor_train(values[0], rank=list(ranks)))[None]
    assert [core.shape[-1] for core in cores] == ranks[1:]
    torch.testing.assert_close(
        relative_errors(values, tt_dense(cores)), relative_errors(values, theirs), rtol=1e-4, atol=1e-5
    )


def test_two_modes_reach_the_eckart_young_optimum():
    values = tensor(1, 20, 30)
    cores, _ = tt_svd(values, [1, 5, 1])
    tail = torch.linalg.svdvals(values[0].double())[5:].norm()
    assert (values - tt_dense(cores)).norm().item() == pytest.approx(tail.item(), rel=1e-4)


def test_cores_are_balanced():
    values = tensor(1, 12, 12, 12)
    cores, _ = tt_svd(values, [1, 4, 4, 1])
    norms = [core.norm().item() for core in cores]
    assert max(norms) / min(norms) < 10
    assert cores[0].flatten(0, 2).norm(dim=0) == pytest.approx(
        torch.linalg.svdvals(values.reshape(12, -1))[:4].sqrt(), rel=1e-3
    )


def test_a_zero_tensor_stays_zero():
    cores, _ = tt_svd(torch.zeros(2, 4, 5, 6), tt_ranks([4, 5, 6], 3))
    assert not tt_dense(cores).any()
    assert all(core.isfinite().all() for core in cores)


# -- Tucker-2


@pytest.mark.parametrize("ranks", [(3, 4), (8, 8), (20, 5)])
def test_tucker2_has_tensorlys_error_after_three_sweeps(ranks):
    values = tensor(1, 24, 20, 9)
    ours = relative_errors(values, tucker2_dense(*tucker2(values, ranks)))
    (core, factors), _ = partial_tucker(values[0], rank=list(ranks), modes=[0, 1])
    theirs = relative_errors(values, tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])[None])
    assert ours.item() <= theirs.item() * 1.002


def test_sweeps_of_hooi_only_lower_the_error_of_hosvd():
    values = tensor(2, 16, 20, 9, seed=1)
    errors = [relative_errors(values, tucker2_dense(*tucker2(values, (4, 4), sweeps))) for sweeps in (0, 1, 2, 3)]
    assert all((later <= earlier + 1e-6).all() for earlier, later in pairwise(errors))
    assert (errors[-1] < errors[0] - 1e-4).any()


def test_hosvd_keeps_its_bound_and_full_ranks_are_exact():
    values = tensor(1, 10, 12, 4)
    tails = [torch.linalg.svdvals(m)[3:].square().sum() for m in (values[0].flatten(1), values[0].mT.flatten(1))]
    tails[1] = torch.linalg.svdvals(values[0].transpose(0, 1).flatten(1))[3:].square().sum()
    error = (values - tucker2_dense(*tucker2(values, (3, 3), sweeps=0))).square().sum()
    assert error <= sum(tails) * (1 + 1e-5)
    torch.testing.assert_close(tucker2_dense(*tucker2(values, (10, 12))), values, atol=1e-4, rtol=1e-4)


def test_factors_of_each_group_are_orthonormal():
    left, _, right = tucker2(tensor(3, 8, 9, 4), (2, 3))
    for factor, rank in ((left, 2), (right, 3)):
        torch.testing.assert_close(factor.mT @ factor, torch.eye(rank).expand(3, -1, -1), atol=1e-5, rtol=0)


def test_tucker2_ranks_are_the_best_that_fit():
    values = tensor(1, 12, 30, 9)
    values[:, 4:] *= 1e-3  # the first mode has four channels that matter
    limit = 0.3 * values.numel()
    first, second = tucker2_ranks(values, limit)
    assert first * 12 + first * second * 9 + second * 30 <= limit
    assert first == 4
    proportional = tucker2_dense(*tucker2(values, (5, 12)))
    assert relative_errors(values, tucker2_dense(*tucker2(values, (first, second)))) < relative_errors(
        values, proportional
    )
    assert tucker2_ranks(values, 20) is None


# -- CP


@pytest.mark.parametrize("rank", [4, 12, 40])
def test_cp_error_is_at_most_tensorlys(rank):
    values = tensor(1, 9, 16, 20)
    ours = relative_errors(values, cp_dense(cp_als(values, rank, num_rows=2)))
    torch.manual_seed(0)
    theirs = relative_errors(values, tensorly.cp_to_tensor(parafac(values[0], rank))[None])
    assert ours.item() <= theirs.item() * 1.02


def test_cp_finds_an_exact_sum_of_terms():
    generator = torch.Generator().manual_seed(0)
    values = cp_dense([torch.randn(2, n, 3, generator=generator) for n in (7, 8, 9)])
    factors = cp_als(values, 3, num_rows=2, sweeps=1000)
    assert relative_errors(values, cp_dense(factors)).max() < 0.02


@pytest.mark.parametrize(("modes", "num_rows"), [((9, 4, 6), 2), ((3, 4, 2, 5), 2), ((4, 6), 1)])
def test_cp_is_exact_at_its_full_rank(modes, num_rows):
    values = tensor(2, *modes)
    factors = cp_als(values, cp_full_rank(list(modes), num_rows), num_rows)
    assert relative_errors(values, cp_dense(factors)).max() < 1e-4


def test_the_start_is_the_sum_of_its_orthonormal_terms():
    """No sweeps: the squared error is what the weights of the terms left out say, and it falls with the rank."""
    values = tensor(1, 4, 5, 6)
    norms, errors = [], []
    for rank in (1, 4, 8):
        factors = cp_als(values, rank, num_rows=2, sweeps=0)
        terms = khatri_rao([khatri_rao(factors[:2]), factors[2]])[0]
        torch.testing.assert_close(terms.T @ terms, torch.diag((terms.T @ terms).diag()), atol=1e-4, rtol=0)
        norms.append(terms.square().sum())
        errors.append((values - cp_dense(factors)).square().sum())
    for norm, error in zip(norms, errors, strict=True):
        assert (norm + error).item() == pytest.approx(values.square().sum().item(), rel=1e-4)
    assert errors == sorted(errors, reverse=True)


def test_terms_stay_bounded_and_balanced():
    values = tensor(1, 9, 12, 12, seed=3)
    factors = cp_als(values, 30, num_rows=2)
    norms = torch.stack([factor.norm(dim=1) for factor in factors])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-4)
    assert norms.prod(0).max() < 3 * values.norm()


def test_khatri_rao_is_tensorlys():
    factors = [tensor(3, 4), tensor(5, 4, seed=1), tensor(2, 4, seed=2)]
    torch.testing.assert_close(khatri_rao(factors), tensorly.tenalg.khatri_rao(factors))


# -- sizes


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 10, 97, 768, 1000, 1021, 3072, 30522])
def test_factors_are_balanced_and_hold_the_size_with_little_padding(size, count):
    factors = balanced_factors(size, count)
    assert len(factors) == count
    assert factors[-1] <= 2 * factors[0]
    assert size <= math.prod(factors) <= size * 1.03 + 2**count


def test_sizes_that_factorize_are_not_padded():
    assert all(math.prod(balanced_factors(size, 3)) == size for size in (64, 768, 1024, 3072, 4096))


def test_a_pair_of_modes_is_never_one_by_one():
    assert matrix_modes((4, 16), 3) == ((1, 2, 2), (4, 2, 2))
    rows, columns = matrix_modes((2, 3), 4)
    assert all(row * column > 1 for row, column in zip(rows, columns, strict=True))


def test_no_decomposition_changes_tensorlys_backend():
    with tensorly.backend_context("numpy"):
        for method in ("tensor_train", "tucker", "cp"):
            compress_model(torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Linear(16, 16)), method, rank=2)
        assert tensorly.get_backend() == "numpy"
