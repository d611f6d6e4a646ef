"""A layer type of your own in one function: the fused query-key-value projection of an attention.

`FusedQKV` keeps its weight as one raw parameter (3, dim, dim), which no library knows. With the adapter every method of
pquant_lightning compresses it like the Linear it is equivalent to.

Run it: python examples/custom_adapter.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import compress_model, compression_report, register_adapter


class FusedQKV(nn.Module):
    """Query, key and value projections in one parameter `(3, dim, dim)`; gives `(..., 3 * dim)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projections = nn.Parameter(torch.randn(3, dim, dim) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,pio->...po", x, self.projections).flatten(-2)


@register_adapter(FusedQKV)
def qkv_to_linear(layer: FusedQKV) -> nn.Linear:
    """The equivalent Linear(dim, 3 * dim)."""
    count, dim, _ = layer.projections.shape
    linear = nn.Linear(dim, count * dim, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.projections.detach().transpose(1, 2).reshape(count * dim, dim))
    return linear


class Attention(nn.Module):
    """Multi-head self-attention on `(batch, tokens, dim)`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = FusedQKV(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model, x = Attention(dim=64, heads=4), torch.randn(2, 16, 64)
    exact = compress_model(model, "low_rank", rank=64, min_saving=0.0)
    print(f"full rank, largest difference of the outputs: {(exact(x) - model(x)).abs().max():.1e}")
    print(compression_report(model, compress_model(model, "low_rank", rank=16), x))


if __name__ == "__main__":
    main()
