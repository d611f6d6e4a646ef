"""A Linear layer with a low-rank addition to its weight, as one function of its tensors: cheap in time and memory.

Autograd on the usual two small products beside the large one keeps their results for the backward, and passes over
every activation several times. Here the addition goes into the weight where there are more rows than weights to touch,
nothing but the input is kept, and the gradient of the frozen weight, a third of the work, is never computed.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]


def added_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float, start: Factors | None = None) -> Tensor:
    """`W + scaling * (B A - B0 A0)`, the same shape as the weight `(out, in)`.

    Where the factors are the initial ones the sum is the weight, bit for bit.

    Args:
        weight: `(out, in)`.
        a: `(r, in)`.
        b: `(out, r)`.
        scaling: of the addition.
        start: A0 and B0, the initial factors, where they are no zero product.
    """
    if start is None:
        return torch.addmm(weight, b, a, alpha=scaling)
    return weight.add(b @ a - start[1] @ start[0], alpha=scaling)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float = 0.0,
    start: Factors | None = None,
) -> Tensor:
    """`x W^T + bias + scaling * (drop(x) A^T B^T - drop(x) A0^T B0^T)`.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        a: `(r, in)`.
        b: `(out, r)`.
        scaling: of the addition, alpha / r.
        dropout: probability with which a value of the input of A is zero; the others are scaled by 1 / (1 - p).
        start: A0 and B0, the initial factors, where they are no zero product.

    Returns:
        `(..., out)`.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    >>> x, w, a, b = torch.randn(2, 5), torch.randn(3, 5), torch.randn(1, 5), torch.randn(3, 1)
    >>> torch.allclose(lora_linear(x, w, None, a, b, 2.0), x @ (w + 2 * b @ a).T, atol=1e-5)
    True
    """
    if not _fused_here(x, weight, a):
        return _plain(x, weight, bias, a, b, scaling, dropout, start)
    result: Tensor
    if dropout > 0 and x.device.type == "cpu":
        result = _DroppedLinear.apply(x, weight, bias, a, b, scaling, dropout, start)
    elif dropout > 0 or x.numel() // x.shape[-1] * sum(weight.shape) < weight.numel():
        result = _plain(x, weight, bias, a, b, scaling, dropout, start)
    else:
        result = _MergedLinear.apply(x, weight, bias, a, b, scaling, start)
    return result


def addition(x: Tensor, a: Tensor, b: Tensor, scaling: float, start: Factors | None = None) -> Tensor:
    """`scaling * (x A^T B^T - x A0^T B0^T)`, `(..., out)`; exactly zero where the factors are the initial ones."""
    added = F.linear(F.linear(x, a), b)
    if start is not None:
        added = added - F.linear(F.linear(x, start[0]), start[1])
    return added * scaling


def _fused_here(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Not where a compiler fuses, where autocast chooses types, or where adding into the weight would round it off."""
    wide = x.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype == a.dtype
    return wide and not torch.compiler.is_compiling() and not autocasts(x) and x.numel() > 0 and not x.is_meta


def autocasts(x: Tensor) -> bool:
    """Whether autocast chooses the types of products with this tensor."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float,
    start: Factors | None,
) -> Tensor:
    dropped = F.dropout(x, dropout) if dropout > 0 else x
    return F.linear(x, weight, bias) + addition(dropped, a, b, scaling, start)


class _MergedLinear(torch.autograd.Function):
    """Keeps the input alone. The merged weight is a temporary of the forward; the backward needs none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        start: Factors | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, *(start or ()))
        ctx.scaling = scaling
        return F.linear(x, added_weight(weight, a, b, scaling, start), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, *start = ctx.saved_tensors
        rows, upstream = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (N, in), (N, out)
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        narrow = (upstream @ b) * ctx.scaling  # (N, r)
        grad_x = upstream @ weight if to_x else None
        if grad_x is not None:
            grad_x = grad_x.addmm_(narrow, a)
            if start:
                grad_x = grad_x.addmm_(upstream @ start[1], start[0], alpha=-ctx.scaling)
            grad_x = grad_x.view(x.shape)
        grad_a = narrow.t() @ rows
        hidden = (rows @ a.t()) * ctx.scaling  # (N, r)
        grad_b = (hidden.t() @ upstream).t()  # the order that reads the wide matrix row by row
        grad_weight = upstream.t() @ rows if to_weight else None
        return grad_x, grad_weight, upstream.sum(0) if to_bias else None, grad_a, grad_b, None, None


class _DroppedLinear(torch.autograd.Function):
    """Keeps the input, the narrow product, and where values were dropped: a few positions instead of a whole mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
        start: Factors | None,
    ) -> Tensor:
        where = dropped_positions(x.numel(), dropout)
        ctx.scaling = scaling / (1 - dropout)
        rows = _dropped(x, where)
        hidden = rows @ a.t() * ctx.scaling
        ctx.save_for_backward(x, weight, a, b, hidden, where, *(start or ()))
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(hidden, b.t())
        if start is not None:
            y.view(-1, y.shape[-1]).addmm_(rows @ start[0].t() * ctx.scaling, start[1].t(), alpha=-1)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, hidden, where, *start = ctx.saved_tensors
        upstream = grad.reshape(-1, grad.shape[-1])  # (N, out)
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        narrow = (upstream @ b) * ctx.scaling  # (N, r)
        grad_a = narrow.t() @ _dropped(x, where)
        grad_b = (hidden.t() @ upstream).t()
        grad_x = narrow @ a if to_x else None
        if grad_x is not None:
            if start:
                grad_x = grad_x.addmm_(upstream @ start[1], start[0], alpha=-ctx.scaling)
            grad_x.view(-1).index_fill_(0, where, 0.0)
            grad_x = grad_x.addmm_(upstream, weight).view(x.shape)
        grad_weight = upstream.t() @ x.reshape(-1, x.shape[-1]) if to_weight else None
        return grad_x, grad_weight, upstream.sum(0) if to_bias else None, grad_a, grad_b, None, None, None


def dropped_positions(count: int, probability: float) -> Tensor:
    """Which of `count` values a dropout zeroes, each with the same probability: int64, ascending.

    The gaps between them are geometric, and drawing those is cheaper than a random number for every value.
    """
    expected = count * probability
    draws = int(expected + 6 * math.sqrt(expected * (1 - probability))) + 10
    found = torch.empty(0, dtype=torch.float64)
    while found.numel() == 0 or found[-1] < count:  # once, but for one draw in a billion
        gaps = torch.empty(draws, dtype=torch.float64).exponential_(-math.log1p(-probability)).floor_().add_(1)
        last = found[-1] if found.numel() else -1.0
        found = torch.cat([found, gaps.cumsum_(0).add_(last)])
    return found[: int(torch.searchsorted(found, count))].long()


def _dropped(x: Tensor, where: Tensor) -> Tensor:
    """A copy of x as `(N, in)` with zeros at these positions."""
    rows = x.clone(memory_format=torch.contiguous_format)
    rows.view(-1).index_fill_(0, where, 0.0)
    return rows.view(-1, x.shape[-1])
