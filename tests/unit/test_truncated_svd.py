"""Truncated SVD against theory: the Eckart-Young optimum, orthonormality, exact reconstruction, the energy rule."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pquant_lightning.methods.low_rank import _truncated_svd
from pquant_lightning.methods.low_rank._truncated_svd import (
    rank_for_energy,
    singular_values,
    truncated_svd,
    truncated_svd_by_energy,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: Tensor, m: int, n: int) -> Tensor:
    """A float32 matrix (m, n) with given singular values (k,), k <= min(m, n)."""
    left = torch.linalg.qr(gaussian(m, len(values), seed=1).double()).Q
    right = torch.linalg.qr(gaussian(n, len(values), seed=2).double()).Q
    return ((left * values.double()) @ right.T).float()


def power_law(k: int, exponent: float = 0.5) -> Tensor:
    return torch.arange(1, k + 1).double() ** -exponent


def optimum(matrix: Tensor, rank: int) -> Tensor:
    """Least Frobenius error of any matrix of that rank: the norm of the singular values left out."""
    return torch.linalg.svdvals(matrix.double())[..., rank:].norm(dim=-1)


def error(matrix: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    u, s, vh = (factor.double() for factor in factors)
    return torch.linalg.matrix_norm(matrix.double() - (u * s.unsqueeze(-2)) @ vh)


def assert_orthonormal(columns: Tensor, tolerance: float = 1e-5) -> None:
    identity = torch.eye(columns.shape[-1], dtype=columns.dtype)
    assert (columns.mT @ columns - identity).abs().max() < tolerance


ROUTES = {  # shape (m, n) and rank
    "full": ((20, 30), 5),
    "gram": ((100, 150), 40),
    "lanczos, smallest block": ((256, 320), 3),
    "lanczos": ((512, 640), 48),
}
SPECTRA = {"gaussian": gaussian, "power law": lambda m, n: with_spectrum(power_law(min(m, n)), m, n)}


@pytest.mark.parametrize("transposed", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("route", ROUTES)
def test_error_is_within_03_percent_of_the_optimum_on_every_route(route: str, spectrum: str, transposed: bool) -> None:
    (m, n), rank = ROUTES[route]
    matrix = SPECTRA[spectrum](m, n)
    matrix = matrix.T if transposed else matrix
    factors = u, s, vh = truncated_svd(matrix, rank)
    assert (u.shape, s.shape, vh.shape) == ((matrix.shape[0], rank), (rank,), (rank, matrix.shape[1]))
    assert_orthonormal(u)
    assert_orthonormal(vh.T)
    assert (s.diff() <= 0).all()
    torch.testing.assert_close(s.double(), torch.linalg.svdvals(matrix.double())[:rank], rtol=0.05, atol=0)
    assert error(matrix, factors) <= 1.003 * optimum(matrix, rank)


@pytest.mark.parametrize(("spectrum", "excess"), [("gaussian", 3e-3), ("power law", 1e-5)])
def test_error_at_the_size_the_speed_is_promised_for(spectrum: str, excess: float) -> None:
    matrix = SPECTRA[spectrum](768, 768)
    assert error(matrix, truncated_svd(matrix, 64)) <= (1 + excess) * optimum(matrix, 64)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    m=st.integers(1, 260),
    n=st.integers(1, 260),
    rank=st.integers(1, 40) | st.integers(1, 300),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_shape_rank_and_dtype(batch: list[int], m: int, n: int, rank: int, dtype: torch.dtype, seed: int) -> None:
    matrix = gaussian(*batch, m, n, seed=seed).to(dtype)
    factors = u, s, vh = truncated_svd(matrix, rank)
    kept = min(rank, m, n)
    assert (u.shape, s.shape, vh.shape) == ((*batch, m, kept), (*batch, kept), (*batch, kept, n))
    assert {u.dtype, s.dtype, vh.dtype} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    assert_orthonormal(u if m <= n else vh.mT)
    scale = torch.linalg.matrix_norm(matrix.double())
    assert (error(matrix, factors) <= 1.003 * optimum(matrix, rank) + 1e-5 * scale).all()


@pytest.mark.parametrize("rank", [4, 40])
def test_a_batch_is_as_accurate_as_its_members(rank: int) -> None:
    gaussians = torch.stack([gaussian(260, 300, seed=seed) for seed in range(3)])
    mixed = torch.stack([gaussian(260, 300), with_spectrum(power_law(260), 260, 300), torch.zeros(260, 300)])
    for batch in (gaussians, mixed):
        assert (error(batch, truncated_svd(batch, rank)) <= 1.003 * optimum(batch, rank) + 1e-6).all()


@pytest.mark.parametrize("shape", [(8, 8), (100, 100), (90, 400), (400, 90), (3, 200, 150)])
def test_full_rank_reconstructs_ill_conditioned_matrices(shape: tuple[int, ...]) -> None:
    m, n = shape[-2:]
    matrix = with_spectrum(torch.logspace(0, -12, min(m, n)), m, n).expand(shape)
    assert (error(matrix, truncated_svd(matrix, min(m, n))) <= 1e-5 * torch.linalg.matrix_norm(matrix.double())).all()


DEGENERATE = {
    "zero": torch.zeros(240, 300),
    "zero, small": torch.zeros(40, 50),
    "row": gaussian(1, 300),
    "column": gaussian(300, 1),
    "rank 1": torch.ones(240, 300),
    "rank 5": gaussian(240, 5) @ gaussian(5, 300, seed=3),
    "rank 5, small": gaussian(40, 5) @ gaussian(5, 50, seed=3),
    "rank 100": gaussian(240, 100) @ gaussian(100, 300, seed=3),
    "rank 5 and noise": with_spectrum(torch.cat([torch.ones(5), torch.full((235,), 1e-5)]), 240, 300),
    "dead rows": gaussian(240, 300) * (torch.arange(240) < 20).unsqueeze(1),
    "identity": torch.eye(240, 300),
    "orthogonal": torch.linalg.qr(gaussian(300, 240)).Q.T,
    "diagonal of 0 and 1": torch.diag((torch.arange(240) < 100).float()),
    "two levels": with_spectrum(torch.cat([torch.full((20,), 1e3), power_law(220)]), 240, 300),
    "exponential": with_spectrum(0.8 ** torch.arange(240).double(), 240, 300),
    "large entries": gaussian(240, 300) * 1e12,
    "small entries": gaussian(240, 300) * 1e-12,
}


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_matrices(name: str, rank: int) -> None:
    matrix = DEGENERATE[name]
    factors = u, _, vh = truncated_svd(matrix, rank)
    assert all(factor.isfinite().all() for factor in factors)
    assert_orthonormal(u if matrix.shape[0] <= matrix.shape[1] else vh.mT, tolerance=1e-4)
    assert error(matrix, factors) <= 1.003 * optimum(matrix, rank) + 1e-5 * matrix.double().norm()


@pytest.mark.parametrize("matrix", [gaussian(300, 400), gaussian(40, 50)], ids=["lanczos", "gram"])
def test_deterministic_and_leaves_the_global_random_state_alone(matrix: Tensor) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = truncated_svd(matrix, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for a, b in zip(first, truncated_svd(matrix, 8), strict=True):
        assert torch.equal(a, b)


def test_input_is_unchanged_and_nothing_is_recorded_for_autograd() -> None:
    matrix = gaussian(60, 50).requires_grad_()
    before = matrix.detach().clone()
    for factors in (truncated_svd(matrix, 60), truncated_svd_by_energy(matrix, 0.9), (singular_values(matrix),)):
        assert not any(factor.requires_grad for factor in factors)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("shape", [(24, 20), (50, 70), (300, 200), (2, 60, 40)])
def test_singular_values(shape: tuple[int, ...]) -> None:
    matrix = gaussian(*shape)
    torch.testing.assert_close(
        singular_values(matrix).double(), torch.linalg.svdvals(matrix.double()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("energy", [0.3, 0.95, 0.999])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(24, 20), (200, 260), (260, 200), (384, 384)])
def test_energy_is_exact(shape: tuple[int, int], spectrum: str, energy: float) -> None:
    matrix = SPECTRA[spectrum](*shape)
    expected = rank_for_energy(torch.linalg.svdvals(matrix.double()), energy)
    assert rank_for_energy(singular_values(matrix), energy) == expected
    factors = truncated_svd_by_energy(matrix, energy)
    assert factors[1].shape == (expected,)
    assert error(matrix, factors) <= (1 + 1e-4) * optimum(matrix, expected) + 1e-6 * matrix.norm()
    kept = factors[1].double().square().sum() / matrix.double().square().sum()
    assert kept >= energy - 1e-6


def test_energy_of_a_batch_is_held_by_each_member() -> None:
    batch = torch.stack([gaussian(60, 50), with_spectrum(power_law(50, 2.0), 60, 50)])
    _, s, _ = truncated_svd_by_energy(batch, 0.9)
    assert s.shape == (2, rank_for_energy(singular_values(batch[0]), 0.9))
    assert (s.square().sum(-1) >= 0.9 * batch.square().sum((-2, -1)) - 1e-5).all()


@pytest.mark.parametrize("shape", [(20, 30), (200, 150)])
def test_energy_of_a_zero_matrix_keeps_one_triplet(shape: tuple[int, int]) -> None:
    u, s, vh = truncated_svd_by_energy(torch.zeros(shape), 0.95)
    assert s.tolist() == [0.0]
    assert u.isfinite().all()
    assert vh.isfinite().all()


@pytest.mark.parametrize(
    ("call", "decompositions"),
    [
        (lambda m: truncated_svd_by_energy(m, 0.95), ["eigh (240, 240)"]),
        (lambda m: truncated_svd(m, 240), ["eigh (240, 240)"]),
        (lambda m: truncated_svd(m, 4), ["eigh (104, 104)"]),
        (singular_values, ["eigvalsh (240, 240)"]),
    ],
    ids=["energy", "full rank", "small rank", "values"],
)
def test_one_small_decomposition(call, decompositions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    calls = []
    for name in ("svd", "svdvals", "eigh", "eigvalsh"):
        real = getattr(torch.linalg, name)

        def counted(matrix: Tensor, *args: object, name: str = name, real=real, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
            calls.append(f"{name} {tuple(matrix.shape)}")
            return real(matrix, *args, **kwargs)

        monkeypatch.setattr(_truncated_svd.torch.linalg, name, counted)
    call(gaussian(400, 240))
    assert calls == decompositions


@given(
    values=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=30),
    energy=st.floats(0, 1, exclude_min=True),
)
def test_rank_for_energy_is_the_smallest_that_holds_it(values: list[float], energy: float) -> None:
    singular = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    squares = singular.square()
    rank = rank_for_energy(singular, energy)
    assert 1 <= rank <= len(values)
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-12)
    if rank > 1:
        assert squares[: rank - 1].sum() < energy * squares.sum() * (1 + 1e-12)


@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
)
def test_rank_for_energy_grows_with_the_energy_and_ignores_scale(values: list[float], low: float, high: float) -> None:
    assume(low <= high)
    singular = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    assert rank_for_energy(singular, low) <= rank_for_energy(singular, high)
    assert rank_for_energy(8 * singular, high) == rank_for_energy(singular, high)
    assert rank_for_energy(torch.stack([singular, singular.flip(0).cummax(0).values.flip(0)]), high) >= 1


def test_rank_for_energy_of_a_batch_is_the_largest() -> None:
    assert rank_for_energy(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), 0.9) == 3


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_an_error(rank: int) -> None:
    with pytest.raises(ValueError, match=r"at least one singular value; pass rank >= 1"):
        truncated_svd(gaussian(4, 4), rank)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.1, float("nan")])
def test_an_energy_that_is_no_share_is_an_error(energy: float) -> None:
    with pytest.raises(ValueError, match=r"pass one in \(0, 1\]"):
        truncated_svd_by_energy(gaussian(40, 40), energy)


@pytest.mark.parametrize(
    "call", [lambda m: truncated_svd(m, 2), lambda m: truncated_svd_by_energy(m, 0.9), singular_values]
)
@pytest.mark.parametrize("size", [4, 40, 240])
def test_what_is_no_finite_matrix_is_an_error(call, size: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="is no matrix"):
        call(torch.ones(size))
    for value in (float("nan"), float("inf")):
        matrix = gaussian(size, size)
        matrix[1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            call(matrix)
