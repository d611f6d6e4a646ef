"""Attention as a layer of ordinary projections, which any method can change."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage
from pquant_lightning.core.errors import ModelError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class UnfusedAttention(CompressedLayer, kind="unfused_attention", stage=Stage.UNFUSE):
    """`nn.MultiheadAttention` with its projections as the layers `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    The same arguments give the same outputs. The attributes that torch's encoder layers read say that there is no fused
    weight to be taken, so that they call this layer.

    Attributes:
        bias_k: `(1, 1, embed_dim)`, a key that every query sees (`add_bias_kv`), or None.
        bias_v: `(1, 1, embed_dim)`, its value, or None.
    """

    in_proj_weight: None = None
    in_proj_bias: None = None
    _qkv_same_embed_dim = False
    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer, config = cls(), spec["layer"]
        size, bias = config["embed_dim"], config["bias"]
        layer.embed_dim, layer.kdim, layer.vdim = size, config["kdim"], config["vdim"]
        layer.num_heads, layer.head_dim = config["num_heads"], size // config["num_heads"]
        layer.dropout, layer.batch_first = config["dropout"], config["batch_first"]
        layer.add_zero_attn = config["add_zero_attn"]
        for name, inputs in zip(PROJECTIONS, (size, layer.kdim, layer.vdim), strict=True):
            setattr(layer, name, nn.Linear(inputs, size, bias=bias))
        layer.out_proj = nn.Linear(size, size, bias=bias)
        for name in ("bias_k", "bias_v"):
            value = nn.Parameter(torch.empty(1, 1, size)) if config["add_bias_kv"] else None
            layer.register_parameter(name, value)
        return layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, whose documentation gives the shapes.

        Raises:
            ModelError: `is_causal` without a mask, or a mask of the wrong shape.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)  # (N, L, E), (N, S, E), (N, S, E)
        if is_causal and attn_mask is None:
            raise ModelError("is_causal says that attn_mask is the causal mask, and there is none: give the mask, too.")
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        hinted = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._heads(q), *map(self._heads, self._with_constants(k, v))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)  # (N, H, L, S)
            mixed = weights @ v
        else:
            weights = None
            mixed = F.scaled_dot_product_attention(q, k, v, None if hinted else mask, dropout, is_causal=hinted)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (N, L, E)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """`(N, L, E)` as `(N, heads, L, E / heads)`."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _with_constants(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(N, S, E)` with those that are the same for every input, S + 1 or S + 2 of them."""
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one to add to the scores, broadcastable to `(N, heads, L, S)`; the constants are seen."""
        total: Tensor | None = None
        (batch, queries), keys = q.shape[:2], k.shape[1]
        if attn_mask is not None:
            if attn_mask.shape not in ((queries, keys), (batch * self.num_heads, queries, keys)):
                raise ModelError(
                    f"attn_mask has the shape {tuple(attn_mask.shape)}; it must be ({queries}, {keys}), or "
                    f"({batch * self.num_heads}, {queries}, {keys}) with one for each sample and head."
                )
            total = _added(attn_mask, q.dtype)
            total = total if total.dim() == 2 else total.unflatten(0, (batch, self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype)[:, None, None]
            total = padding if total is None else total + padding
        constants = (self.bias_k is not None) + self.add_zero_attn
        return total if total is None or not constants else F.pad(total, (0, constants))

    def described(self) -> str:
        return "attention as projections"


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added: True, which is not seen, becomes -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask.to(dtype)
