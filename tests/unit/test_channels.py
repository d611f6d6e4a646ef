"""Which channels belong together, on one small model for each way in which layers meet; and that groups are exact."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning.core.calibration import Samples, run_forward
from pquant_lightning.core.channel_labels import FIXED_SIZE, PICKED, segments
from pquant_lightning.core.channel_rules import NORMALIZED, SOFTMAX, WEIGHT_NORM
from pquant_lightning.core.channel_rules import SUMMED as REDUCED
from pquant_lightning.core.channels import OUTPUT, Group, find_groups
from pquant_lightning.core.channels import STOCK_ATTENTION as HEADS
from pquant_lightning.core.errors import CalibrationError


class Net(nn.Module):
    """Some layers and parameters, and a function that says how an input goes through them."""

    def __init__(self, function: Callable[[Any, Any], Any], layers: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass
class Case:
    """A model's groups, as "name:dim*indices of a unit" separated by blanks, and how many units each has.

    `halved` are the attributes that say how many units there are, when half of them are gone.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    free: dict[str, int]
    fixed: dict[str, str] = field(default_factory=dict)
    halved: dict[str, int] = field(default_factory=dict)

    @property
    def batch(self) -> Tensor:
        return torch.randn(*self.shape, dtype=torch.float64)


def net(function: Callable[[Any, Any], Any], **layers: Any) -> Callable[[], nn.Module]:
    """A builder of a model in double precision whose parameters are all random, in eval mode."""

    def make() -> nn.Module:
        model = Net(function, copy.deepcopy(layers)).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        return model

    return make


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


class Attention(nn.Module):
    """Heads split by view, optionally with rotary positions, normalized queries and fewer keys than queries."""

    def __init__(
        self, heads: int = 4, keys: int = 4, rotary: bool = False, norm: bool = False, fused: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.keys, self.rotary, self.fused = heads, keys, rotary, fused
        self.q, self.k, self.v = linear(32, 8 * heads), linear(32, 8 * keys), linear(32, 8 * keys)
        self.o = linear(8 * heads, 4)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] / 10 ** torch.arange(4)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.norm(self.q(x).view(batch, tokens, self.heads, 8).transpose(1, 2))
        k = self.norm(self.k(x).view(batch, tokens, self.keys, 8).transpose(1, 2))
        v = self.v(x).view(batch, tokens, self.keys, 8).transpose(1, 2)
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        if self.keys != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.keys, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(batch, tokens, -1))


def attention(**options: Any) -> Callable[[], nn.Module]:
    return net(lambda m, x: m.a(x), a=Attention(**options))


_WHOLE_HEADS = "a.k.bias:0*8 a.k.weight:0*8 a.o.weight:1*8 a.q.bias:0*8 a.q.weight:0*8 a.v.bias:0*8 a.v.weight:0*8"
_SHARED_KEYS = "a.k.bias:0*8 a.k.weight:0*8 a.o.weight:1*16 a.q.bias:0*16 a.q.weight:0*16 a.v.bias:0*8 a.v.weight:0*8"


def experts(m: Any, x: Tensor) -> Tensor:
    """Two of three experts for each row, as in a mixture of experts."""
    x = m.i(x)
    share, chosen = m.router(x).softmax(-1).topk(2, -1)
    y = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        rows, place = torch.where(chosen == number)
        y.index_add_(0, rows, expert(x[rows]) * share[rows, place, None])
    return m.o(y)


def expert(width: int) -> nn.Module:
    return nn.Sequential(linear(8, width), nn.ReLU(), linear(width, 8))


def tied(m: Any, x: Tensor) -> Tensor:
    """Reads and writes with the same weight."""
    h = F.linear(x, m.w)
    return F.linear(h + m.b(m.a(h).relu()), m.w.t())


def written(m: Any, x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], m.a.weight.shape[0])
    y[:, :] = m.a(x)
    return m.o(y)


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    width = 16 * (2 if options.get("bidirectional") else 1)
    return net(lambda m, x: m.o(m.r(x)[0]), r=kind(8, 16, batch_first=True, **options), o=linear(width, 4))


def gates(count: int, *names: str) -> str:
    return " ".join(f"r.{name}:0*{count}" for name in names)


_BN = "bn.bias:0 bn.running_mean:0 bn.running_var:0 bn.weight:0"
_LSTM = "r.bias_hh_l0:0*4 r.bias_ih_l0:0*4 r.weight_hh_l0:0*4 r.weight_hh_l0:1 r.weight_ih_l0:0*4"

CASES = {
    "chain": Case(
        net(lambda m, x: m.o(m.i(x).relu()), i=linear(8, 16), o=linear(16, 4)),
        (4, 8),
        {"i.bias:0 i.weight:0 o.weight:1": 16},
    ),
    "residual": Case(
        net(
            lambda m, x: (lambda h: m.o(h + m.b(m.a(h).relu())))(m.i(x)),
            i=linear(8, 16),
            a=linear(16, 24),
            b=linear(24, 16),
            o=linear(16, 4),
        ),
        (4, 8),
        {"a.bias:0 a.weight:0 b.weight:1": 24, "a.weight:1 b.bias:0 b.weight:0 i.bias:0 i.weight:0 o.weight:1": 16},
    ),
    "residual on the input": Case(
        net(lambda m, x: m.o(x + m.b(m.a(x).relu())), a=linear(8, 24), b=linear(24, 8), o=linear(8, 4)),
        (4, 8),
        {"a.bias:0 a.weight:0 b.weight:1": 24},
        {"b.bias:0 b.weight:0 o.weight:1": FIXED_SIZE},
    ),
    "an output inside": Case(
        net(lambda m, x: (h := m.i(x), m.o(h.relu())), i=linear(8, 16), o=linear(16, 4)),
        (4, 8),
        {},
        {"i.bias:0 i.weight:0 o.weight:1": OUTPUT},
    ),
    "concatenation": Case(
        net(lambda m, x: m.o(torch.cat([m.a(x).relu(), m.b(x)], 1)), a=linear(8, 16), b=linear(8, 12), o=linear(28, 4)),
        (4, 8),
        {"a.bias:0 a.weight:0 o.weight:1": 16, "b.bias:0 b.weight:0 o.weight:1": 12},
    ),
    "chunk": Case(
        net(lambda m, x: (lambda a, b: m.o(a.sigmoid() * b))(*m.i(x).chunk(2, -1)), i=linear(8, 32), o=linear(16, 4)),
        (4, 8),
        {"i.bias:0*2 i.weight:0*2 o.weight:1": 16},
    ),
    "chunk into branches": Case(
        net(
            lambda m, x: (lambda a, b: m.o(torch.cat([a, m.h(b)], -1)))(*m.i(x).chunk(2, -1)),
            i=linear(8, 32),
            h=linear(16, 16),
            o=linear(32, 4),
        ),
        (4, 8),
        {"h.bias:0 h.weight:0 o.weight:1": 16, "h.weight:1 i.bias:0*2 i.weight:0*2 o.weight:1": 16},
    ),
    "split into unlike parts": Case(
        net(
            lambda m, x: (lambda a, b: m.o(a) * m.p(b))(*m.i(x).split([m.o.weight.shape[1], m.p.weight.shape[1]], -1)),
            i=linear(8, 24),
            o=linear(16, 1),
            p=linear(8, 1),
        ),
        (4, 8),
        {"i.bias:0 i.weight:0 o.weight:1": 16, "i.bias:0 i.weight:0 p.weight:1": 8},
    ),
    "grouped convolution": Case(
        net(
            lambda m, x: m.o(pooled(m.g(m.i(x).relu()).relu())),
            i=conv(3, 16),
            g=conv(16, 32, groups=4),
            o=linear(32, 4),
        ),
        (2, 3, 6, 6),
        {"g.bias:0*8 g.weight:0*8 i.bias:0*4 i.weight:0*4 o.weight:1*8": 4},
        halved={"g.groups": 2},
    ),
    "depthwise convolution": Case(
        net(
            lambda m, x: m.o(pooled(m.p(m.bn(m.d(m.i(x)))).relu())),
            i=conv(3, 16),
            d=conv(16, 16, groups=16),
            bn=nn.BatchNorm2d(16),
            p=conv(16, 24, 1),
            o=linear(24, 4),
        ),
        (2, 3, 6, 6),
        {f"{_BN} d.bias:0 d.weight:0 i.bias:0 i.weight:0 p.weight:1": 16, "o.weight:1 p.bias:0 p.weight:0": 24},
        halved={"d.groups": 8},
    ),
    "channel shuffle": Case(
        net(
            lambda m, x: m.o(pooled(shuffled(m.d(m.i(x)), 2))),
            i=conv(3, 16),
            d=conv(16, 16, groups=16),
            o=linear(16, 4),
        ),
        (2, 3, 6, 6),
        {"d.bias:0*2 d.weight:0*2 i.bias:0*2 i.weight:0*2 o.weight:1*2": 8},
        halved={"d.groups": 8},
    ),
    "transposed convolution": Case(
        net(
            lambda m, x: m.o(m.t(m.i(x).relu()).relu()),
            i=conv(3, 16),
            t=nn.ConvTranspose2d(16, 12, 2, stride=2),
            o=conv(12, 3, 1),
        ),
        (2, 3, 6, 6),
        {"i.bias:0 i.weight:0 t.weight:0": 16, "o.weight:1 t.bias:0 t.weight:1": 12},
    ),
    "grouped transposed convolution": Case(
        net(
            lambda m, x: m.o(m.t(m.i(x).relu()).relu()),
            i=conv(3, 16),
            t=nn.ConvTranspose2d(16, 8, 2, stride=2, groups=4),
            o=conv(8, 3, 1),
        ),
        (2, 3, 6, 6),
        {"i.bias:0*4 i.weight:0*4 o.weight:1*2 t.bias:0*2 t.weight:0*4": 4},
        halved={"t.groups": 2},
    ),
    "one and three dimensions": Case(
        net(
            lambda m, x: m.o(m.b(m.a(x).relu().unsqueeze(-1).unsqueeze(-1)).mean((2, 3, 4))),
            a=nn.Conv1d(3, 16, 3),
            b=nn.Conv3d(16, 24, (3, 1, 1)),
            o=linear(24, 4),
        ),
        (2, 3, 20),
        {"a.bias:0 a.weight:0 b.weight:1": 16, "b.bias:0 b.weight:0 o.weight:1": 24},
    ),
    "flatten": Case(
        net(
            lambda m, x: m.o(m.l(F.max_pool2d(m.i(x), 2).flatten(1)).relu()),
            i=conv(3, 16),
            l=linear(144, 32),
            o=linear(32, 4),
        ),
        (2, 3, 6, 6),
        {"i.bias:0 i.weight:0 l.weight:1*9": 16, "l.bias:0 l.weight:0 o.weight:1": 32},
    ),
    "reshape into an image": Case(
        net(lambda m, x: m.c(m.i(x).unflatten(1, (-1, 3, 3)).relu()), i=linear(8, 144), c=conv(16, 3)),
        (2, 8),
        {"c.weight:1 i.bias:0*9 i.weight:0*9": 16},
    ),
    "pixel shuffle": Case(
        net(lambda m, x: m.o(F.pixel_shuffle(m.i(x), 2).relu()), i=conv(3, 32), o=conv(8, 3, 1)),
        (2, 3, 6, 6),
        {"i.bias:0*4 i.weight:0*4 o.weight:1": 8},
    ),
    "pixel unshuffle": Case(
        net(lambda m, x: m.o(pooled(F.pixel_unshuffle(m.i(x).relu(), 2))), i=conv(3, 8), o=linear(32, 4)),
        (2, 3, 6, 6),
        {"i.bias:0 i.weight:0 o.weight:1*4": 8},
    ),
    "squeeze and excitation": Case(
        net(
            lambda m, x: (lambda h: m.o(pooled(h * m.b(m.a(h.mean((2, 3), True)).relu()).sigmoid())))(m.i(x)),
            i=conv(3, 16),
            a=conv(16, 8, 1),
            b=conv(8, 16, 1),
            o=linear(16, 4),
        ),
        (2, 3, 6, 6),
        {"a.bias:0 a.weight:0 b.weight:1": 8, "a.weight:1 b.bias:0 b.weight:0 i.bias:0 i.weight:0 o.weight:1": 16},
    ),
    "shortcut padded with zeros": Case(
        net(
            lambda m, x: (lambda h: m.o(pooled(F.pad(h, (0, 0, 0, 0, 4, 4)) + m.c(h))))(m.i(x)),
            i=conv(3, 8),
            c=conv(8, 16),
            o=linear(16, 4),
        ),
        (2, 3, 6, 6),
        {},
        {
            "c.bias:0 c.weight:0 o.weight:1": FIXED_SIZE,
            "c.weight:1 i.bias:0 i.weight:0": "padding, pooling or resizing changes how many they are",
        },
    ),
    "attention": Case(attention(), (2, 5, 32), {_WHOLE_HEADS: 4}, halved={"a.heads": 2, "a.keys": 2}),
    "attention by matrix products": Case(
        attention(fused=False), (2, 5, 32), {_WHOLE_HEADS: 4}, halved={"a.heads": 2, "a.keys": 2}
    ),
    "rotary attention": Case(attention(rotary=True), (2, 5, 32), {_WHOLE_HEADS: 4}, halved={"a.heads": 2, "a.keys": 2}),
    "normalized queries": Case(attention(norm=True), (2, 5, 32), {_WHOLE_HEADS: 4}, halved={"a.heads": 2, "a.keys": 2}),
    "grouped-query attention": Case(
        attention(keys=2, rotary=True), (2, 5, 32), {_SHARED_KEYS: 2}, halved={"a.heads": 2, "a.keys": 1}
    ),
    "one key for all heads": Case(
        attention(keys=1), (2, 5, 32), {"a.o.weight:1*8 a.q.bias:0*8 a.q.weight:0*8": 4}, halved={"a.heads": 2}
    ),
    "one head": Case(
        net(
            lambda m, x: m.o((m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x)),
            q=linear(8, 16),
            k=linear(8, 16),
            v=linear(8, 24),
            o=linear(24, 4),
        ),
        (2, 5, 8),
        {"k.bias:0 k.weight:0 q.bias:0 q.weight:0": 16, "o.weight:1 v.bias:0 v.weight:0": 24},
    ),
    "fused queries, keys and values": Case(
        net(
            lambda m, x: m.o(
                F.scaled_dot_product_attention(*m.i(x).view(*x.shape[:2], 3, -1, 8).permute(2, 0, 3, 1, 4))
                .transpose(1, 2)
                .flatten(2)
            ),
            i=linear(8, 96),
            o=linear(32, 4),
        ),
        (2, 5, 8),
        {"i.bias:0*24 i.weight:0*24 o.weight:1*8": 4},
    ),
    "nn.TransformerEncoderLayer": Case(
        net(
            lambda m, x: m.o(m.l(m.i(x))),
            i=linear(8, 32),
            l=nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
            o=linear(32, 4),
        ),
        (2, 5, 8),
        {"l.linear1.bias:0 l.linear1.weight:0 l.linear2.weight:1": 64},
        {
            "i.bias:0 i.weight:0 l.linear1.weight:1 l.linear2.bias:0 l.linear2.weight:0 l.norm1.bias:0 "
            "l.norm1.weight:0 l.norm2.bias:0 l.norm2.weight:0 l.self_attn.in_proj_weight:1 l.self_attn.out_proj.bias:0 "
            "l.self_attn.out_proj.weight:0 o.weight:1": HEADS,
            "l.self_attn.in_proj_bias:0*24 l.self_attn.in_proj_weight:0*24 l.self_attn.out_proj.weight:1*8": HEADS,
        },
    ),
    "mixture of experts": Case(
        net(
            experts,
            i=linear(8, 8),
            router=linear(8, 3),
            experts=nn.ModuleList(map(expert, (16, 16, 16))),
            o=linear(8, 4),
        ),
        (12, 8),
        {
            "experts.0.0.bias:0 experts.0.0.weight:0 experts.0.2.weight:1": 16,
            "experts.0.0.weight:1 experts.0.2.bias:0 experts.0.2.weight:0 experts.1.0.weight:1 experts.1.2.bias:0 "
            "experts.1.2.weight:0 experts.2.0.weight:1 experts.2.2.bias:0 experts.2.2.weight:0 i.bias:0 i.weight:0 "
            "o.weight:1 router.weight:1": 8,
            "experts.1.0.bias:0 experts.1.0.weight:0 experts.1.2.weight:1": 16,
            "experts.2.0.bias:0 experts.2.0.weight:0 experts.2.2.weight:1": 16,
        },
    ),
    "layer norm": Case(
        net(lambda m, x: m.o(m.n(m.i(x)).relu()), i=linear(8, 16), n=nn.LayerNorm(16), o=linear(16, 4)),
        (4, 8),
        {},
        {"i.bias:0 i.weight:0 n.bias:0 n.weight:0 o.weight:1": NORMALIZED},
    ),
    "rms norm": Case(
        net(lambda m, x: m.o(m.n(m.i(x)).relu()), i=linear(8, 16), n=nn.RMSNorm(16), o=linear(16, 4)),
        (4, 8),
        {},
        {"i.bias:0 i.weight:0 n.weight:0 o.weight:1": REDUCED},
    ),
    "group norm": Case(
        net(lambda m, x: m.o(pooled(m.n(m.i(x)).relu())), i=conv(3, 16), n=nn.GroupNorm(4, 16), o=linear(16, 4)),
        (2, 3, 6, 6),
        {"i.bias:0*4 i.weight:0*4 n.bias:0*4 n.weight:0*4 o.weight:1*4": 4},
        halved={"n.num_groups": 2},
    ),
    "group norm of one group": Case(
        net(lambda m, x: m.o(pooled(m.n(m.i(x)).relu())), i=conv(3, 16), n=nn.GroupNorm(1, 16), o=linear(16, 4)),
        (2, 3, 6, 6),
        {},
        {"i.bias:0 i.weight:0 n.bias:0 n.weight:0 o.weight:1": NORMALIZED},
    ),
    "instance norm": Case(
        net(
            lambda m, x: m.o(pooled(m.n(m.i(x)).relu())),
            i=conv(3, 16),
            n=nn.InstanceNorm2d(16, affine=True),
            o=linear(16, 4),
        ),
        (2, 3, 6, 6),
        {"i.bias:0 i.weight:0 n.bias:0 n.weight:0 o.weight:1": 16},
        halved={"n.num_features": 8},
    ),
    "a channel picked by its place": Case(
        net(
            lambda m, x: (lambda h: m.o(h.relu()) * h[:, -1:] + h[:, 0, None])(m.i(x)), i=linear(8, 16), o=linear(16, 4)
        ),
        (4, 8),
        {},
        {"i.bias:0 i.weight:0 o.weight:1": PICKED},
    ),
    "a channel picked for its shape": Case(
        net(lambda m, x: (lambda h: m.o(h) + len(h[:, 0]))(m.i(x)), i=linear(8, 16), o=linear(16, 4)),
        (4, 8),
        {"i.bias:0 i.weight:0 o.weight:1": 16},
    ),
    "softmax over channels": Case(
        net(lambda m, x: m.o(m.i(x).softmax(-1)), i=linear(8, 16), o=linear(16, 4)),
        (4, 8),
        {},
        {"i.bias:0 i.weight:0 o.weight:1": SOFTMAX},
    ),
    "an operation that is not followed": Case(
        net(lambda m, x: m.o(torch.fft.rfft(m.i(x)).real), i=linear(8, 16), o=linear(9, 4)),
        (4, 8),
        {},
        {"i.bias:0 i.weight:0": "_fft_r2c is applied to them, and what that does to single channels is not known"},
    ),
    "weight norm": Case(
        net(
            lambda m, x: m.o(m.h(m.i(x).relu()).relu()),
            i=linear(8, 16),
            h=nn.utils.parametrizations.weight_norm(linear(16, 24)),
            o=linear(24, 4),
        ),
        (4, 8),
        {"h.parametrizations.weight.original1:1 i.bias:0 i.weight:0": 16},
        {
            "h.bias:0 h.parametrizations.weight.original0:0 h.parametrizations.weight.original1:0 "
            "o.weight:1": WEIGHT_NORM
        },
    ),
    "tied weights": Case(
        net(tied, w=nn.Parameter(torch.zeros(16, 8)), a=linear(16, 24), b=linear(24, 16)),
        (4, 8),
        {"a.bias:0 a.weight:0 b.weight:1": 24, "a.weight:1 b.bias:0 b.weight:0 w:0": 16},
    ),
    "a layer used twice": Case(
        net(lambda m, x: m.o(m.h(m.h(m.i(x)).relu()).relu()), i=linear(8, 16), h=linear(16, 16), o=linear(16, 4)),
        (4, 8),
        {"h.bias:0 h.weight:0 h.weight:1 i.bias:0 i.weight:0 o.weight:1": 16},
    ),
    "a layer not used": Case(
        net(lambda m, x: m.o(m.i(x).relu()), i=linear(8, 16), h=linear(16, 16), o=linear(16, 4)),
        (4, 8),
        {"i.bias:0 i.weight:0 o.weight:1": 16},
    ),
    "parameters in the path": Case(
        net(
            lambda m, x: ((m.i(x) * m.s + m.t).relu() @ m.w).relu() @ m.o,
            i=linear(8, 16),
            s=nn.Parameter(torch.zeros(16)),
            t=nn.Parameter(torch.zeros(1, 16)),
            w=nn.Parameter(torch.zeros(16, 12)),
            o=nn.Parameter(torch.zeros(12, 4)),
        ),
        (4, 8),
        {"i.bias:0 i.weight:0 s:0 t:1 w:0": 16, "o:0 w:1": 12},
    ),
    "einsum": Case(
        net(
            lambda m, x: torch.einsum("bnhd,hde->bne", torch.einsum("bnc,chd->bnhd", x, m.a).relu(), m.b),
            a=nn.Parameter(torch.zeros(8, 4, 8)),
            b=nn.Parameter(torch.zeros(4, 8, 6)),
        ),
        (2, 5, 8),
        {"a:1 b:0": 4},
    ),
    "a buffer that is filled": Case(
        net(written, a=linear(8, 16), o=linear(16, 4)), (4, 8), {"a.bias:0 a.weight:0 o.weight:1": 16}
    ),
    "tokens mixed by a layer": Case(
        net(
            lambda m, x: (lambda h: m.o((h + m.b(m.a(h.mT).relu()).mT).mean(1)))(m.i(x)),
            i=linear(8, 16),
            a=linear(5, 12),
            b=linear(12, 5),
            o=linear(16, 4),
        ),
        (2, 5, 8),
        {"i.bias:0 i.weight:0 o.weight:1": 16, "a.bias:0 a.weight:0 b.weight:1": 12},
    ),
    "LSTM": Case(recurrent(nn.LSTM), (2, 5, 8), {f"o.weight:1 {_LSTM}": 16}, halved={"r.hidden_size": 8}),
    "LSTM's input": Case(
        net(
            lambda m, x: m.o(m.r(m.i(x).relu())[1][0][-1]),
            i=linear(8, 24),
            r=nn.LSTM(24, 16, batch_first=True),
            o=linear(16, 4),
        ),
        (2, 5, 8),
        {"i.bias:0 i.weight:0 r.weight_ih_l0:1": 24, f"o.weight:1 {_LSTM}": 16},
        halved={"r.hidden_size": 8, "r.input_size": 12},
    ),
    "GRU": Case(
        recurrent(nn.GRU),
        (2, 5, 8),
        {"o.weight:1 r.bias_hh_l0:0*3 r.bias_ih_l0:0*3 r.weight_hh_l0:0*3 r.weight_hh_l0:1 r.weight_ih_l0:0*3": 16},
        halved={"r.hidden_size": 8},
    ),
    "LSTM in two layers and directions": Case(
        recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        (2, 5, 8),
        {
            "o.weight:1*2 r.bias_hh_l0:0*4 r.bias_hh_l0_reverse:0*4 r.bias_hh_l1:0*4 r.bias_hh_l1_reverse:0*4 "
            "r.bias_ih_l0:0*4 r.bias_ih_l0_reverse:0*4 r.bias_ih_l1:0*4 r.bias_ih_l1_reverse:0*4 r.weight_hh_l0:0*4 "
            "r.weight_hh_l0:1 r.weight_hh_l0_reverse:0*4 r.weight_hh_l0_reverse:1 r.weight_hh_l1:0*4 r.weight_hh_l1:1 "
            "r.weight_hh_l1_reverse:0*4 r.weight_hh_l1_reverse:1 r.weight_ih_l0:0*4 r.weight_ih_l0_reverse:0*4 "
            "r.weight_ih_l1:0*4 r.weight_ih_l1:1*2 r.weight_ih_l1_reverse:0*4 r.weight_ih_l1_reverse:1*2": 16
        },
        halved={"r.hidden_size": 8},
    ),
    "GRU cell": Case(
        net(lambda m, x: m.o(m.r(x)), r=nn.GRUCell(8, 16), o=linear(16, 4)),
        (2, 8),
        {"o.weight:1 r.bias_hh:0*3 r.bias_ih:0*3 r.weight_hh:0*3 r.weight_hh:1 r.weight_ih:0*3": 16},
        halved={"r.hidden_size": 8},
    ),
}


def described(group: Group) -> str:
    widths = [(name, dim, indices.shape[1]) for (name, dim), indices in zip(group.tensors, group.indices, strict=True)]
    return " ".join(f"{name}:{dim}" + (f"*{width}" if width > 1 else "") for name, dim, width in widths)


def groups_of(model: nn.Module, batch: Any) -> list[Group]:
    return find_groups(model, Samples((batch,), run_forward))


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    case = CASES[name]
    groups = groups_of(case.make(), case.batch)
    assert {described(group): len(group.units) for group in groups if group.fixed is None} == case.free
    assert {described(group): group.fixed for group in groups if group.fixed is not None} == case.fixed


def _own(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _masked(model: nn.Module, gone: dict[tuple[str, int], list[int]]) -> nn.Module:
    masked = copy.deepcopy(model)
    for (name, dim), indices in gone.items():
        module, attribute = _own(masked, name)
        getattr(module, attribute).data.index_fill_(dim, torch.tensor(indices), 0.0)
    return masked


def _without(model: nn.Module, gone: dict[tuple[str, int], list[int]], attributes: dict[str, int]) -> nn.Module:
    small = copy.deepcopy(model)
    for (name, dim), indices in gone.items():
        module, attribute = _own(small, name)
        tensor = getattr(module, attribute)
        kept = torch.tensor([index for index in range(tensor.shape[dim]) if index not in set(indices)])
        tensor = tensor.detach().index_select(dim, kept)
        setattr(module, attribute, nn.Parameter(tensor) if attribute in module._parameters else tensor)
    for name, value in attributes.items():
        module, attribute = _own(small, name)
        setattr(module, attribute, value)
    return small


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.free])
@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_without_half_of_all_units_a_model_computes_what_it_does_with_zeros(name: str, order: int) -> None:
    case = CASES[name]
    model, batch = case.make(), case.batch
    gone: dict[tuple[str, int], list[int]] = {}
    for group in groups_of(model, batch):
        for unit in group.units[::order][: len(group.units) // 2] if group.fixed is None else ():
            for part in unit:
                gone.setdefault((part.tensor, part.dim), []).extend(part.indices)
    with torch.no_grad():
        small, masked = _without(model, gone, case.halved)(batch), _masked(model, gone)(batch)
        assert not torch.allclose(masked, model(batch))
    torch.testing.assert_close(small, masked)


def test_a_unit_names_its_slices() -> None:
    group = next(g for g in groups_of(CASES["chunk"].make(), CASES["chunk"].batch))
    parts = group.units[3]
    assert [(part.tensor, part.dim, part.indices) for part in parts] == [
        ("i.bias", 0, (3, 19)),
        ("i.weight", 0, (3, 19)),
        ("o.weight", 1, (3,)),
    ]
    assert len(group.units) == 16


def test_models_with_dicts_frozen_parameters_and_no_gradients() -> None:
    make = net(lambda m, batch: {"y": m.o(m.i(batch["pixels"]).relu())}, i=linear(8, 16), o=linear(16, 4))
    model = make().requires_grad_(False)
    with torch.no_grad():
        groups = groups_of(model, {"pixels": torch.randn(4, 8).double()})
    assert list(map(described, groups)) == ["i.bias:0 i.weight:0 o.weight:1"]


def test_torchs_settings_are_as_before() -> None:
    before = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(CalibrationError, match="cannot be run"):
        groups_of(CASES["chain"].make(), torch.randn(4, 9).double())
    assert before == (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


def test_a_model_without_parameters_has_no_groups() -> None:
    assert groups_of(nn.ReLU(), torch.randn(4, 8)) == []


@pytest.mark.parametrize(
    ("old", "new", "runs"),
    [
        ((2, 12, 5), (2, 3, 4, 5), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((1, 6, 1), (6,), [([1], [0])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((1, 1), (), []),
    ],
)
def test_runs_of_dimensions_with_the_same_elements(old, new, runs) -> None:
    assert segments(old, new) == runs


def test_a_wide_model_takes_a_few_seconds() -> None:
    width = 768
    layers = {f"{part}{i}": linear(width, width) for part in "qkvo" for i in range(12)}
    layers |= {f"a{i}": linear(width, 4 * width) for i in range(12)} | {
        f"b{i}": linear(4 * width, width) for i in range(12)
    }

    def run(m: Any, x: Tensor) -> Tensor:
        for i in range(12):
            q, k, v = (getattr(m, f"{p}{i}")(x).view(*x.shape[:2], 12, 64).transpose(1, 2) for p in "qkv")
            x = x + getattr(m, f"o{i}")(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + getattr(m, f"b{i}")(getattr(m, f"a{i}")(x).relu())
        return x

    model = Net(run, layers)
    start = time.perf_counter()
    groups = groups_of(model, torch.randn(1, 4, width))
    assert time.perf_counter() - start < 15
    assert sum(group.fixed is None for group in groups) == 24
