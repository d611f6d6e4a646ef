"""The mathematics of `factorization`: exact where the structure is there, optimal or monotone where theory says so."""

import numpy as np
import pytest
import torch

from pquant_lightning.methods.low_rank._factorizations import (
    balanced,
    cur,
    kronecker,
    kronecker_sizes,
    monarch,
    monarch_matrix,
    semi_nmf,
    sparse_plus_low_rank,
)


def _random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _low_rank(m, n, rank, groups=1):
    return _random(groups, m, rank) @ _random(groups, rank, n).flip(-1)


def _tail(matrix, rank):
    """Eckart-Young: the least error of that rank."""
    return float(np.sqrt((np.linalg.svd(matrix.double().numpy(), compute_uv=False)[..., rank:] ** 2).sum()))


def _error(matrix, *factors):
    left, right = factors[:2]
    rest = factors[2] if len(factors) > 2 else 0
    return float(torch.dist(matrix, left @ right + rest))


def test_balancing_keeps_the_product_and_evens_the_norms():
    left, right = _random(7, 3) * torch.tensor([100.0, 1.0, 0.01]), _random(3, 5)
    one, other = balanced(left, right)
    torch.testing.assert_close(one @ other, left @ right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.norm(dim=0), other.norm(dim=1))


class TestSemiNmf:
    @pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
    def test_the_factor_of_the_smaller_side_is_nonnegative(self, shape):
        matrix = _random(2, *shape)
        left, right = semi_nmf(matrix, rank=5)
        assert left.shape == (2, shape[0], 5)
        assert right.shape == (2, 5, shape[1])
        nonnegative, free = (right, left) if shape[1] <= shape[0] else (left, right)
        assert nonnegative.min() >= 0
        assert free.min() < 0

    @pytest.mark.parametrize("rank", [2, 4, 8])
    def test_the_error_is_between_that_of_the_svd_of_this_rank_and_of_one_less(self, rank):
        matrix = _random(30, 20)
        error = _error(matrix, *semi_nmf(matrix, rank))
        assert _tail(matrix, rank) * (1 - 1e-5) <= error <= _tail(matrix, rank - 1)

    def test_the_updates_never_increase_the_error(self):
        matrix = _random(30, 20)
        errors = [_error(matrix, *semi_nmf(matrix, 6, iterations)) for iterations in (1, 2, 5, 10, 30, 100)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.99 * errors[0]

    @pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
    def test_full_rank_is_exact(self, shape):
        matrix = _random(*shape)
        assert _error(matrix, *semi_nmf(matrix, 6)) < 1e-5

    def test_a_semi_nonnegative_matrix_is_found_again(self):
        matrix = _random(24, 4) @ _random(4, 16).abs()
        assert _error(matrix, *semi_nmf(matrix, 4, iterations=2000)) < 0.01 * matrix.norm()


class TestKronecker:
    def test_a_sum_of_kronecker_products_is_found_exactly(self):
        a, b = _random(2, 4, 3), _random(2, 5, 6)
        matrix = sum(torch.kron(a[k], b[k]) for k in range(2))
        left, right = kronecker(matrix, rank=2, sizes=(4, 3))
        found = sum(torch.kron(left[k], right[k]) for k in range(2))
        assert torch.dist(found, matrix) < 1e-5 * matrix.norm()
        torch.testing.assert_close(left.flatten(1).norm(dim=1), right.flatten(1).norm(dim=1))

    def test_one_term_is_optimal(self):
        """Van Loan and Pitsianis: the error is that of the rearranged matrix's best rank 1."""
        matrix = _random(12, 12)
        left, right = kronecker(matrix, 1, (4, 3))
        rearranged = matrix.reshape(4, 3, 3, 4).transpose(1, 2).reshape(12, 12)
        expected = _tail(rearranged, 1)
        assert abs(float(torch.dist(torch.kron(left[0], right[0]), matrix)) - expected) < 1e-4 * expected

    @pytest.mark.parametrize(("m", "n"), [(64, 64), (12, 30), (7, 11), (768, 3072)])
    def test_the_sizes_are_those_with_the_fewest_parameters(self, m, n):
        m1, n1 = kronecker_sizes(m, n)
        assert m % m1 == n % n1 == 0
        fewest = min(a * b + m * n // (a * b) for a in range(1, m + 1) for b in (1, n) if m % a == 0)
        assert m1 * n1 + m * n // (m1 * n1) <= fewest


class TestMonarch:
    @staticmethod
    def _paper(blocks, m, n):
        """P L P^T R as in the paper: block-diagonal R, a permutation, block-diagonal L, and the permutation back."""
        left = torch.block_diag(*_random(blocks, m // blocks, blocks))
        right = torch.block_diag(*_random(blocks, blocks, n // blocks).flip(0))
        between = torch.arange(blocks * blocks).reshape(blocks, blocks).T.flatten()
        after = torch.arange(m).reshape(blocks, m // blocks).T.flatten()
        return left[after] @ right[between]

    @pytest.mark.parametrize(("m", "n"), [(16, 16), (12, 20), (24, 8)])
    def test_a_monarch_matrix_is_found_exactly(self, m, n):
        matrix = self._paper(4, m, n)
        found = monarch_matrix(*monarch(matrix, rank=1, blocks=4))
        assert torch.dist(found, matrix) < 1e-5 * matrix.norm()

    def test_the_projection_is_optimal_in_each_block(self):
        matrix = _random(12, 20)
        left, right = monarch(matrix, rank=2, blocks=4)
        assert left.shape == (4, 3, 8)
        assert right.shape == (4, 8, 5)
        blocks = matrix.reshape(3, 4, 4, 5).permute(1, 2, 0, 3)
        expected = sum(_tail(blocks[j, k], 2) ** 2 for j in range(4) for k in range(4)) ** 0.5
        assert abs(float(torch.dist(monarch_matrix(left, right), matrix)) - expected) < 1e-4 * expected


class TestCur:
    @pytest.mark.parametrize("groups", [1, 3])
    def test_a_matrix_of_that_rank_is_exact(self, groups):
        matrix = _low_rank(20, 14, 4, groups)
        assert _error(matrix, *cur(matrix, 4)) < 1e-4 * matrix.norm()

    def test_the_rows_are_rows_of_the_matrix(self):
        matrix = _random(1, 20, 14)
        _, right = cur(matrix, 6)
        rows = [(matrix[0] == row).all(1).nonzero().item() for row in right[0]]
        assert len(set(rows)) == 6

    def test_the_picks_are_those_of_deim(self):
        """Sorensen and Embree, algorithm 1, written as in the paper."""
        matrix = _random(1, 20, 14)
        v = np.linalg.svd(matrix[0].double().numpy())[0][:, :5]
        picks = [int(np.abs(v[:, 0]).argmax())]
        for j in range(1, 5):
            c = np.linalg.solve(v[picks, :j], v[picks, j])
            picks.append(int(np.abs(v[:, j] - v[:, :j] @ c).argmax()))
        _, right = cur(matrix, 5)
        assert [(matrix[0] == row).all(1).nonzero().item() for row in right[0]] == picks

    def test_the_error_is_within_the_bound(self):
        """||A - C U R|| <= (eta_p + eta_q) sigma_{r+1}; here a few times the best error."""
        matrix = _low_rank(40, 30, 6)[0] + 0.01 * _random(40, 30)
        error = _error(matrix[None], *cur(matrix[None], 6))
        assert _tail(matrix, 6) <= error < 3 * _tail(matrix, 6)


class TestSparsePlusLowRank:
    def test_a_planted_one_is_recovered(self):
        low = _low_rank(40, 30, 3)
        spikes = torch.zeros(1, 40, 30)
        places = torch.randperm(1200, generator=torch.Generator().manual_seed(1))[:36]
        spikes.flatten()[places] = 20.0
        left, right, sparse = sparse_plus_low_rank(low + spikes, 3, 0.03)
        assert _error(low + spikes, left, right, sparse) < 1e-3 * low.norm()
        assert torch.equal((sparse != 0).flatten().nonzero().flatten(), places.sort().values)
        torch.testing.assert_close(left @ right, low, rtol=1e-2, atol=1e-2)

    def test_the_error_never_grows_and_is_below_that_of_either_part_alone(self):
        matrix = _random(1, 40, 30)
        errors = [_error(matrix, *sparse_plus_low_rank(matrix, 5, 0.1, iterations)) for iterations in (1, 2, 5, 30)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] < _tail(matrix[0], 5)

    def test_the_sparse_part_has_as_many_values_as_asked_for(self):
        left, right, sparse = sparse_plus_low_rank(_random(2, 10, 8), 2, 0.1)
        assert int((sparse != 0).sum()) == 16
        torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))


@pytest.mark.parametrize("factorize", [lambda m: semi_nmf(m, 3), lambda m: cur(m[None], 3), lambda m: monarch(m, 1, 2)])
def test_half_precision_is_computed_in_single_and_double_in_double(factorize):
    assert factorize(_random(8, 6).bfloat16())[0].dtype == torch.float32
    assert factorize(_random(8, 6, dtype=torch.float64))[0].dtype == torch.float64
    for one, other in zip(factorize(_random(8, 6)), factorize(_random(8, 6)), strict=True):
        assert torch.equal(one, other)
