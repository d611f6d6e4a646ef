"""The fused function of an adapted Linear layer against the three plain products that it stands for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pquant_lightning.methods.low_rank import _lora_linear
from pquant_lightning.methods.low_rank._lora_linear import added_weight, dropped_positions, lora_linear

SCALING = 1.5
Tensors = dict[str, Tensor]


def draw(rows: tuple[int, ...] = (3, 4), n_in: int = 5, n_out: int = 6, r: int = 2, start: bool = False) -> Tensors:
    shapes = {"x": (*rows, n_in), "weight": (n_out, n_in), "bias": (n_out,), "a": (r, n_in), "b": (n_out, r)}
    found = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    if start:
        found |= {name: torch.randn(shapes[name[0]], dtype=torch.float64) for name in ("a0", "b0")}
    return found


def call(t: Tensors, dropout: float = 0.0) -> Tensor:
    first = (t["a0"], t["b0"]) if "a0" in t else None
    return lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], SCALING, dropout, first)


def naive(t: Tensors) -> Tensor:
    y = F.linear(t["x"], t["weight"], t["bias"]) + SCALING * F.linear(F.linear(t["x"], t["a"]), t["b"])
    return y - SCALING * F.linear(F.linear(t["x"], t["a0"]), t["b0"]) if "a0" in t else y


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("rows", [(1,), (40,), (3, 4, 5)])  # few rows take the plain way
def test_output_and_gradients_are_those_of_the_plain_products(rows: tuple[int, ...], start: bool) -> None:
    t = draw(rows, start=start)
    names = ("x", "weight", "bias", "a", "b")
    upstream = torch.randn(*rows, 6, dtype=torch.float64)

    ours, expected = call(t), naive(t)
    ours_grads = torch.autograd.grad((ours * upstream).sum(), [t[n] for n in names])
    grads = torch.autograd.grad((expected * upstream).sum(), [t[n] for n in names])

    torch.testing.assert_close(ours, expected)
    for name, found, wanted in zip(names, ours_grads, grads, strict=True):
        torch.testing.assert_close(found, wanted, msg=name)


@pytest.mark.parametrize("start", [False, True])
def test_gradcheck_first_and_second_order(start: bool) -> None:
    t = draw((20,), start=start)
    names = ("x", "weight", "bias", "a", "b")
    inputs = tuple(t[name] for name in names)

    def function(*tensors: Tensor) -> Tensor:
        return call({**t, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_many_rows_keep_only_what_is_there_anyway() -> None:
    t = draw((64,))
    t["weight"].requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        call(t)
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in t.values()}


def test_a_frozen_weight_gets_no_gradient_and_the_others_do() -> None:
    t = draw((64,))
    t["weight"].requires_grad_(False)
    t["bias"].requires_grad_(False)
    call(t).sum().backward()
    assert t["weight"].grad is None
    assert t["bias"].grad is None
    assert all(t[name].grad.abs().sum() > 0 for name in ("x", "a", "b"))


@pytest.mark.parametrize("start", [False, True])
def test_dropout_is_that_of_the_positions_drawn(start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    t, where = draw((20,), start=start), torch.tensor([0, 7, 33, 99])
    monkeypatch.setattr(_lora_linear, "dropped_positions", lambda count, probability: where)
    mask = torch.full((100,), 1 / 0.75, dtype=torch.float64).index_fill_(0, where, 0).view(20, 5)
    names = ("x", "weight", "bias", "a", "b")
    inputs = tuple(t[name] for name in names)

    def function(*tensors: Tensor) -> Tensor:
        return call({**t, **dict(zip(names, tensors, strict=True))}, dropout=0.25)

    masked = t["x"] * mask
    expected = F.linear(t["x"], t["weight"], t["bias"]) + SCALING * masked @ t["a"].T @ t["b"].T
    if start:
        expected = expected - SCALING * masked @ t["a0"].T @ t["b0"].T
    torch.testing.assert_close(function(*inputs), expected)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("count", "probability"), [(200_000, 0.05), (100_000, 0.5), (50_000, 0.9), (3, 0.3)])
def test_positions_are_those_of_independent_draws(count: int, probability: float) -> None:
    drawn = [dropped_positions(count, probability) for _ in range(200 if count < 10 else 3)]
    for where in drawn:
        assert where.dtype == torch.int64
        assert torch.equal(where, where.unique())
        assert where.numel() == 0 or (where[0] >= 0 and where[-1] < count)
    hits = torch.zeros(count)
    for where in drawn:
        hits[where] += 1
    trials = count * len(drawn)
    spread = (trials * probability * (1 - probability)) ** 0.5
    assert abs(float(hits.sum()) - trials * probability) < 5 * spread
    if count > 10:  # neighbours fall together as often as by chance
        flags = torch.zeros(count).index_fill_(0, drawn[0], 1.0)
        together = float((flags[1:] * flags[:-1]).mean())
        assert together == pytest.approx(probability**2, abs=5 * (probability**2 / count) ** 0.5)


def test_dropout_leaves_the_mean() -> None:
    t = {name: tensor.detach() for name, tensor in draw((1, 1)).items()}
    t["x"] = t["x"].expand(4000, 8, 5).contiguous()
    torch.testing.assert_close(call(t, dropout=0.1).mean((0, 1)), naive(t)[0, 0], atol=0.03, rtol=0.02)


def test_under_autocast_it_computes_in_the_lower_type() -> None:
    t = {name: tensor.detach().float().requires_grad_() for name, tensor in draw((64,)).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = call(t)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), naive(t), atol=0.2, rtol=0.05)
    assert t["a"].grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_it_compiles_as_one_graph(dropout: float) -> None:
    t = draw((64,))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    if dropout:
        assert compiled(t, dropout).shape == (64, 6)
    else:
        torch.testing.assert_close(compiled(t), naive(t))


def test_equal_factors_leave_the_weight_bit_for_bit() -> None:
    weight, a, b = torch.randn(30, 20), torch.randn(4, 20), torch.randn(30, 4)
    assert torch.equal(added_weight(weight, a.clone(), b.clone(), 0.7, (a, b)), weight)


def test_half_precision_is_not_added_into_the_weight() -> None:
    """bfloat16 holds 8 bits: an addition of a thousandth of the weight would be rounded off."""
    x, weight = torch.eye(8, dtype=torch.bfloat16).repeat(8, 1), torch.ones(8, 8, dtype=torch.bfloat16)
    a, b = torch.full((1, 8), 2.0**-6, dtype=torch.bfloat16), torch.full((8, 1), 2.0**-6, dtype=torch.bfloat16)
    x = x * 256 - x.flip(1) * 256  # the weight cancels
    y = lora_linear(x, weight, None, a * torch.arange(8), b, 1.0)
    assert y.abs().max() > 0
