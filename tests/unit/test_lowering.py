"""Each entry of the table of operations, in JAX and in TensorFlow, against PyTorch."""

import itertools
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pquant_lightning.backends.base import as_numpy
from pquant_lightning.backends.lowering import program
from pquant_lightning.backends.lowering.jax_namespace import JaxNamespace
from pquant_lightning.backends.lowering.namespace import BINARY, Namespace
from pquant_lightning.backends.lowering.namespace import UNARY as UNARY_NAMES
from pquant_lightning.backends.lowering.table import (
    LOWERINGS,
    UnsupportedOperationError,
    operation_of,
    register_lowering,
)
from pquant_lightning.backends.lowering.tensorflow_namespace import TensorFlowNamespace
from pquant_lightning.backends.lowering.trace import tensors_in, trace
from pquant_lightning.core._private import quantized_decomposed

quantized_decomposed()
NAMESPACES: dict[str, Namespace] = {"jax": JaxNamespace(), "tensorflow": TensorFlowNamespace()}


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def positive(*shape: int) -> Tensor:
    return floats(*shape).abs() + 0.5


def integers(*shape: int, high: int = 4) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


X, Y, P, COUNTS, IMAGE = floats(4, 6), floats(6), positive(4, 6), integers(4, 6) + 1, floats(4, 4, 7, 8)
MASK = X > 0
UNIT = torch.tanh(X) * 0.9

Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


def case(function: Callable[..., Any], *inputs: Tensor) -> Case:
    return function, inputs


UNARY = {
    name: case(
        getattr(torch, name), P if name in ("log", "log2", "log10", "log1p", "rsqrt", "sqrt", "lgamma") else UNIT
    )
    for name in (
        "abs asin asinh atan atanh acos ceil cos cosh erf erfc exp expm1 floor log log10 log1p log2 neg lgamma "
        "reciprocal rsqrt sigmoid sign sin sinh sqrt square tan tanh trunc isnan isinf isfinite logical_not round"
    ).split()
}
CASES: dict[str, Case] = {
    **UNARY,
    "acosh": case(torch.acosh, P + 1),
    "integer unary": case(
        lambda i: (torch.ceil(i.float()), torch.bitwise_not(i), torch.abs(i), -i, torch.sqrt(i)), COUNTS
    ),
    "of integers": case(lambda i: (i.round(), torch.isfinite(i), torch.isnan(i)), COUNTS),
    "bitwise_not bool": case(lambda m: ~m, MASK),
    "round decimals": case(lambda x: torch.round(x, decimals=2), X),
    "arithmetic": case(lambda x, y: (x + y, x - y, x * y, x / (y + 10)), X, Y),
    "scalars": case(lambda x: (x + 2, x - 1.5, 3 * x, x / 2, 2 - x, 1 / (x + 10), torch.rsub(x, x, alpha=2)), X),
    "alpha": case(lambda x, y: (torch.add(x, y, alpha=2), torch.sub(x, y, alpha=0.5)), X, Y),
    "promotion": case(lambda x, i: (x + i, i * 2.5, i / 2, i + True, i.int() + i), X, COUNTS),
    "comparison": case(lambda x, y: (x < y, x <= y, x > y, x >= y, x == y, x != y), X, Y),
    "comparison with numbers": case(lambda i: (i < 2, i <= 2, i > 2, i >= 2, i == 2, i != 2), COUNTS),
    "power": case(lambda x: (x**2, x**0.5, 2**x, torch.pow(x, x)), P),
    "modulo": case(lambda x, i: (x % 0.7, i % 3, i // 2, torch.fmod(x, 0.7), torch.fmod(x, x + 9)), X, COUNTS - 3),
    "rounding modes": case(
        lambda x, i: [torch.div(v, 3, rounding_mode=mode) for v in (x, i) for mode in ("floor", "trunc")],
        9 * X,
        COUNTS - 3,
    ),
    "div by tensors": case(lambda x, y: torch.div(x, y, rounding_mode="trunc"), 9 * X, Y),
    "extrema": case(lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), torch.max(x, y), torch.min(x, y)), X, Y),
    "fmax": case(lambda x, y: (torch.fmax(x, y), torch.fmin(x, y), torch.atan2(x, y)), X, Y),
    "bits": case(lambda i: (i & 3, i | 4, i ^ 5, i << 2, i >> 1, i & i, i | i, i ^ i), COUNTS),
    "bits by tensors": case(
        lambda i: (torch.bitwise_left_shift(i, i), torch.bitwise_right_shift(i, i), i << i, i >> i, i % (i + 1)), COUNTS
    ),
    "bits by name": case(
        lambda i: [f(i, v) for f in (torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor) for v in (3, i + 1)],
        COUNTS,
    ),
    "shifts by numbers": case(lambda i: (torch.bitwise_left_shift(i, 2), torch.bitwise_right_shift(i, 1)), COUNTS),
    "bytes": case(lambda i: (i & 15, i >> 4, torch.maximum(i, 255 - i)), integers(4, 6, high=255).to(torch.uint8)),
    "logic": case(lambda m, x: (m & (x > 1), m | (x > 1), m ^ (x > 1)), MASK, X),
    "logical": case(lambda m, x: [f(m, x) for f in (torch.logical_and, torch.logical_or, torch.logical_xor)], MASK, X),
    "clamp": case(lambda x, y: (x.clamp(-0.5, 0.5), x.clamp(min=0.1), x.clamp(max=y), x.clamp_max(0.3)), X, Y),
    "clamp_min": case(lambda x, y: (x.clamp_min(0.2), x.clamp_min(y), x.clamp_max(y), torch.clamp(x, y, y + 1)), X, Y),
    "where": case(lambda m, x: (torch.where(m, x, 0), torch.where(m, 1.0, x), torch.where(m, x, -x)), MASK, X),
    "masked_fill": case(lambda m, x: (x.masked_fill(m, -1e9), x.masked_fill(m, torch.tensor(2.0))), MASK, X),
    "addcmul": case(lambda x: (torch.addcmul(x, x, x, value=0.5), torch.lerp(x, -x, 0.3)), X),
    "lerp by tensor": case(lambda x, y: torch.lerp(x, -x, y.sigmoid()), X, Y),
    "casts": case(
        lambda x, i: (x.int(), i.float(), x.bool(), x.half().float(), x.to(torch.int8), x.type_as(i)), X, COUNTS
    ),
    "activations": case(
        lambda x: [
            f(x)
            for f in (F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.hardsigmoid)
        ],
        3 * X,
    ),
    "more activations": case(
        lambda x: [f(x) for f in (F.hardswish, F.softplus, F.mish, F.logsigmoid, F.tanhshrink, F.softsign)], 3 * X
    ),
    "gelu tanh": case(lambda x: F.gelu(x, approximate="tanh"), X),
    "threshold": case(lambda x: F.threshold(x, 0.1, 20), X),
    "prelu": case(lambda x, w: F.prelu(x, w), IMAGE, positive(4)),
    "softmax": case(lambda x: (x.softmax(-1), x.log_softmax(0), x.half().softmax(-1, dtype=torch.float32)), X),
    "views": case(
        lambda x: (x.view(-1, 3), x.flatten(1), x.unflatten(1, (2, 3)), x.unsqueeze(1), x.unsqueeze(-1), x.t()), X
    ),
    "squeeze": case(lambda x: (x.squeeze(), x.squeeze(1), x.squeeze((1, 3)), x.squeeze(0)), floats(4, 1, 5, 1)),
    "orders": case(lambda x: (x.transpose(1, 2), x.permute(2, 0, 1, 3), x.movedim(1, -1), x.mT), IMAGE),
    "expand": case(
        lambda x: (x[:, None].expand(-1, 3, -1), x.repeat(2, 3), x.repeat_interleave(2, 1), x.expand_as(x)), X
    ),
    "cat": case(lambda x, i: (torch.cat([x, x], 1), torch.stack([x, x], 1), torch.cat([x, i], 0)), X, COUNTS),
    "slices": case(lambda x: (x[:, 1:3], x[:, -2:], x[:, ::2], x[:, :-1], x[1:, 2], x[:, -1], x.narrow(1, 1, 2)), X),
    "splits": case(lambda x: (*x.split(2, 1), *x.split([1, 5], 1), *x.chunk(4, 1), *x.unbind(1)), X),
    "pads": case(lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, -1, 2, 0), value=3.0)), X),
    "reflection": case(
        lambda x: [F.pad(x, (1, 2), mode=m) for m in ("reflect", "replicate", "circular")], floats(4, 3, 6)
    ),
    "image pads": case(lambda x: [F.pad(x, (1, 2, 2, 1), mode=m) for m in ("reflect", "replicate")], IMAGE),
    "volume pads": case(
        lambda x: [F.pad(x, (1, 1, 1, 1, 1, 1), mode=m) for m in ("reflect", "replicate")], floats(4, 2, 3, 4, 5)
    ),
    "flip": case(lambda x: (x.flip(1), x.roll(2, 1), x.roll((1, 2), (0, 1)), x.roll(3)), X),
    "embedding": case(lambda i, w: (F.embedding(i, w), w.index_select(0, i[0])), COUNTS, floats(9, 3)),
    "gather": case(lambda x, i: (x.gather(1, i), torch.take_along_dim(x, i, 1)), X, integers(4, 3)),
    "index": case(lambda x, i: (x[:, i], x[i, i], x[i], x[i - 4]), floats(4, 4, 3), integers(5)),
    "index inside": case(lambda x, i: (x[:, i, i], x[:, i, :, i], x[..., i]), floats(3, 4, 4, 5), integers(5)),
    "index_put": case(lambda x, i, v: x.index_put((i,), v), X, torch.tensor([0, 2]), floats(2, 6)),
    "index_put adds": case(
        lambda x, i, v: x.index_put((i,), v, accumulate=True), X, torch.tensor([0, 2, 2]), floats(3, 6)
    ),
    "index_put mask": case(lambda x, m: x.index_put((m,), torch.tensor(5.0)), X, MASK),
    "scatter": case(lambda x, i: (x.scatter(1, i, x), x.scatter(1, i, 2.0)), X, integers(4, 1)),
    "scatter_add": case(lambda x, i: x.scatter_add(1, i, x), X, integers(4, 6)),
    "written slices": case(lambda x: (x.select_scatter(x[:, 0], 1, 2), x.slice_scatter(x[:, :2], 1, 0, 4, 2)), X),
    "slice_scatter": case(lambda x: x.slice_scatter(x[:, :2], 1, 1, 3), X),
    "triangles": case(lambda x: (x.tril(), x.triu(1), x.tril(-1)), X),
    "one_hot": case(lambda i: F.one_hot(i, 6), COUNTS),
    "sums": case(lambda x: (x.sum(), x.sum(1), x.sum((0, 1), keepdim=True), x.mean(1), x.prod(1), x.mean()), X),
    "integer sums": case(lambda i: (i.sum(1), i.prod(), i.to(torch.int32).sum(), i.sum(dtype=torch.float32)), COUNTS),
    "any": case(lambda m: (m.any(), m.any(1), m.all(1), m.all(), m.any((0, 1)), m.all((0, 1))), MASK),
    "amax": case(lambda x: (x.amax(1), x.amin((0, 1)), x.max(), x.min()), X),
    "max": case(lambda x: (*x.max(1), *x.min(1, keepdim=True), x.argmax(), x.argmin(1), x.argmax(1, keepdim=True)), X),
    "var": case(lambda x: (x.var(1), x.std(1), x.var((0, 1), correction=0), x.var(), x.std()), X),
    "norms": case(lambda x: (x.norm(dim=1), torch.linalg.vector_norm(x, 1, 1), torch.linalg.vector_norm(x)), X),
    "largest norm": case(lambda x: torch.linalg.vector_norm(x, float("inf"), 1), X),
    "logsumexp": case(lambda x: (x.logsumexp(1), x.logsumexp(1, keepdim=True)), X),
    "cumsum": case(lambda x, i: (x.cumsum(1), i.cumsum(0), x.diff(dim=1), x.diff(n=2)), X, COUNTS),
    "topk": case(lambda x: (*x.topk(2, 1), *x.topk(2, 0, largest=False)), X),
    "sort": case(lambda x: (*x.sort(1), *x.sort(0, descending=True), x.argsort(1)), X),
    "stable sort": case(lambda x: torch.sort(x, stable=True, dim=1), X),
    "constants": case(
        lambda x: (
            torch.arange(5),
            torch.arange(1, 9, 2) + x[0, 0],
            torch.full((2,), 3.0),
            torch.zeros(2),
            torch.ones(3),
        ),
        X,
    ),
    "like": case(
        lambda x: (torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2), x.new_ones(2), x.new_zeros(3)), X
    ),
    "new_full": case(lambda x: (x.new_full((2,), 4), torch.scalar_tensor(2.5) + x, torch.empty_like(x).fill_(1.0)), X),
    "arange of floats": case(lambda x: torch.arange(0.0, 1.0, 0.25) + x[0, 0], X),
    "detach": case(lambda x: (x.detach(), x.detach()[:2] + 1), X),
    "copy": case(lambda x: x.clone().copy_(x[0]), X),
    "linear": case(
        lambda x, w, b: (F.linear(x, w, b), F.linear(x, w), F.linear(x[0], w, b)), X, floats(3, 6), floats(3)
    ),
    "matmul": case(lambda x: (x @ x.mT, x[0] @ x[0, 0], x[0, 0] @ x[0].mT, x[0, 0] @ x[0, 0]), floats(2, 3, 5)),
    "addmm": case(lambda x: (torch.addmm(x[:, :4], x, x.t()), torch.addmm(x[:, :4], x, x.t(), beta=2, alpha=3)), X),
    "baddbmm": case(lambda x: torch.baddbmm(x, x, x, alpha=0.5), floats(2, 3, 3)),
    "outer": case(lambda x: torch.outer(x[0], x[1]), X),
    "einsum": case(
        lambda x, y: (
            torch.einsum("bij,bkj->bik", x, y),
            torch.einsum("bij,bkj->ki", x, y),
            torch.einsum("...ij,...kj->...ik", x, y),
            torch.einsum("bij->ij", x),
            torch.einsum("bij,bij", x, x),
        ),
        floats(2, 3, 5),
        floats(2, 4, 5),
    ),
    "conv1d": case(lambda x, w, b: F.conv1d(x, w, b, 2, 1), floats(4, 2, 9), floats(3, 2, 3), floats(3)),
    "conv2d": case(lambda x, w: F.conv2d(x, w, None, (2, 1), (1, 2), (1, 2)), IMAGE, floats(6, 4, 3, 3)),
    "groups": case(lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 2), IMAGE, floats(6, 2, 3, 3)),
    "depthwise": case(lambda x, w: (F.conv2d(x, w, groups=4), F.conv2d(x[0], w, groups=4)), IMAGE, floats(8, 1, 3, 3)),
    "same": case(lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, floats(5, 4, 2, 3)),
    "same 1d and 3d": case(lambda x, w: F.conv1d(x, w, padding="same"), floats(4, 2, 9), floats(3, 2, 3)),
    "valid 3d": case(lambda x, w: F.conv3d(x, w, padding="valid"), floats(2, 2, 4, 5, 6), floats(3, 2, 2, 2, 2)),
    "conv3d": case(lambda x, w: F.conv3d(x, w, stride=2, padding=1), floats(2, 2, 4, 5, 6), floats(3, 2, 2, 2, 2)),
    "conv_transpose1d": case(lambda x, w: F.conv_transpose1d(x, w, stride=2), floats(4, 2, 5), floats(2, 3, 3)),
    "conv_transpose2d": case(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, 2, (1, 2)), IMAGE, floats(4, 3, 3, 3), floats(6)
    ),
    "conv_transpose3d": case(lambda x, w: F.conv_transpose3d(x, w), floats(2, 2, 3, 3, 3), floats(2, 3, 2, 2, 2)),
    "cut transposed": case(lambda x, w: F.conv_transpose2d(x, w, padding=2), IMAGE, floats(4, 2, 2, 2)),
    "max_pool": case(
        lambda x: (F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 2, ceil_mode=True), F.max_pool1d(x[:, 0], 2)), IMAGE
    ),
    "dilated pool": case(lambda x: F.max_pool2d(x, 2, 1, dilation=2), IMAGE),
    "max_pool3d": case(lambda x: F.max_pool3d(x, 2), floats(2, 2, 4, 4, 4)),
    "avg_pool": case(
        lambda x: (
            F.avg_pool2d(x, 3, 2, 1),
            F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            F.avg_pool2d(x, 2, ceil_mode=True),
            F.avg_pool2d(x, 2, divisor_override=3),
            F.avg_pool1d(x[:, 0], 2),
        ),
        IMAGE,
    ),
    "avg_pool3d": case(lambda x: F.avg_pool3d(x, 2), floats(2, 2, 4, 4, 4)),
    "adaptive": case(lambda x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (3, 8))), IMAGE),
    "adaptive 1d": case(lambda x: (F.adaptive_avg_pool1d(x[:, 0], 3), F.adaptive_max_pool2d(x, 2)), IMAGE),
    "adaptive 3d": case(lambda x: F.adaptive_avg_pool3d(x, (2, 1, 3)), floats(2, 2, 4, 4, 4)),
    "adaptive max": case(
        lambda x: (F.adaptive_max_pool1d(x, 2), F.adaptive_max_pool3d(x[None], 1)), floats(2, 3, 5, 5)[0]
    ),
    "batch_norm": case(lambda x, m, v, w: F.batch_norm(x, m, v, w, None), IMAGE, floats(4), positive(4), positive(4)),
    "batch_norm of the batch": case(lambda x: F.batch_norm(x, None, None, training=True), IMAGE),
    "layer_norm": case(lambda x, w: (F.layer_norm(x, (6,), w), F.layer_norm(x, (4, 6)[1:])), X, Y),
    "rms_norm": case(lambda x, w: (F.rms_norm(x, (6,), w), F.rms_norm(x, (6,), eps=1e-3)), X, Y),
    "group_norm": case(lambda x, w: F.group_norm(x, 2, w, w), IMAGE, floats(4)),
    "instance_norm": case(lambda x: F.instance_norm(x), IMAGE),
    "attention": case(
        lambda q, k: (
            F.scaled_dot_product_attention(q, k, k),
            F.scaled_dot_product_attention(q, k, k, scale=0.3),
            F.scaled_dot_product_attention(q, q, q, is_causal=True),
        ),
        floats(2, 4, 5, 8),
        floats(2, 4, 7, 8),
    ),
    "masked attention": case(
        lambda q, m, b: (
            F.scaled_dot_product_attention(q, q, q, m),
            F.scaled_dot_product_attention(q, q, q, b),
        ),
        floats(2, 4, 5, 8),
        torch.tensor([[True] * 5, [False] * 5, [True, False] * 2 + [True], [True] * 5, [False, True] * 2 + [False]]),
        floats(5, 5),
    ),
    "grouped queries": case(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), floats(2, 4, 5, 8), floats(2, 2, 5, 8)
    ),
    "nearest": case(lambda x: (F.interpolate(x, scale_factor=2.0), F.interpolate(x, size=(5, 3))), IMAGE),
    "nearest 1d and 3d": case(
        lambda x: (F.interpolate(x[:, 0], scale_factor=1.5), F.interpolate(x[:, None], scale_factor=2.0)), IMAGE
    ),
    "bilinear": case(
        lambda x: (
            F.interpolate(x, size=(9, 5), mode="bilinear"),
            F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True),
            F.interpolate(x[:, 0], scale_factor=2.0, mode="linear"),
            F.interpolate(x[:, None], size=(2, 3, 4), mode="trilinear"),
        ),
        IMAGE,
    ),
    "pixel_shuffle": case(lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "dropout": case(lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0), X),
    "batch size": case(lambda x: x.reshape(x.shape[0] * 2, -1).float(), X),
    "dequantized channels": case(
        lambda i, s: torch.ops.quantized_decomposed.dequantize_per_channel(
            i, s, torch.zeros(4, dtype=torch.int64), 0, -128, 127, torch.int8
        ),
        COUNTS.to(torch.int8),
        positive(4),
    ),
    "quantized channels": case(
        lambda x, s: torch.ops.quantized_decomposed.quantize_per_channel(
            x, s, torch.zeros(4, dtype=torch.int64), 0, -128, 127, torch.int8
        ),
        9 * X,
        positive(4),
    ),
    "quantized": case(
        lambda x: torch.ops.quantized_decomposed.dequantize_per_tensor(
            torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 3, 0, 255, torch.uint8),
            0.1,
            3,
            0,
            255,
            torch.uint8,
        ),
        X,
    ),
}
MODULES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "lstm": (nn.LSTM(6, 5, 2, bidirectional=True), (floats(3, 2, 6),)),
    "lstm batch first": (nn.LSTM(6, 5, batch_first=True, bias=False), (floats(2, 3, 6),)),
    "gru": (nn.GRU(6, 5, 2, batch_first=True), (floats(2, 3, 6),)),
    "rnn": (nn.RNN(6, 5, bidirectional=True), (floats(3, 2, 6),)),
    "relu rnn": (nn.RNN(6, 5, nonlinearity="relu"), (floats(3, 2, 6),)),
}


class Wrapped(nn.Module):
    """A function as a module, for any number of tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def module_of(name: str) -> nn.Module:
    return MODULES[name][0].eval() if name in MODULES else Wrapped(CASES[name][0])


def inputs_of(names: list[str]) -> tuple[Tensor, ...]:
    return tuple(x for name in names for x in {**CASES, **MODULES}[name][1])


class Together(nn.Module):
    """Several cases as one module, which is traced in a tenth of the time that they take one by one."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(map(module_of, names))
        self.counts = [len(inputs_of([name])) for name in names]

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        return [part(*itertools.islice(given, count)) for part, count in zip(self.parts, self.counts, strict=True)]


@cache
def traced(name: str, core: bool = False) -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    """The module of a case, its inputs, and its program with what the table lacks decomposed, for both frameworks."""
    module, inputs = module_of(name), inputs_of([name])
    found = trace(module, inputs, {}).program
    return module, inputs, program.supported(found.run_decompositions() if core else found)


def check(name: str, framework: str, core: bool = False) -> None:
    module, inputs, found = traced(name, core)
    ns = NAMESPACES[framework]
    function, weights = program.to_function(found, ns)
    params = {name: ns.asarray(as_numpy(tensor)) for name, tensor in weights.items()}
    results = function(params, [ns.asarray(as_numpy(x)) for x in inputs])
    expected = tensors_in(module(*inputs))
    for ours, theirs in zip(results, expected, strict=True):
        ours, theirs = np.asarray(ours), theirs.detach().numpy()
        assert ours.shape == theirs.shape
        assert ours.dtype.kind == theirs.dtype.kind
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("framework", NAMESPACES)
@pytest.mark.parametrize("name", [*CASES, *MODULES])
def test_operation(name: str, framework: str) -> None:
    check(name, framework)


# by whose decomposition the other entries are used
DECOMPOSED = [
    name.replace("_", " ")
    for name in (
        "linear matmul softmax conv2d pads groups views attention splits prelu expand baddbmm reflection "
        "image_pads volume_pads addmm"
    ).split()
]


@pytest.mark.parametrize("name", DECOMPOSED)
def test_operations_that_decompositions_give(name: str) -> None:
    check(name, "tensorflow", core=True)


@pytest.mark.parametrize("framework", NAMESPACES)
def test_a_namespace_has_all_functions(framework: str) -> None:
    ns = NAMESPACES[framework]
    assert set(ns.unary) == set(UNARY_NAMES)
    assert set(ns.binary) == set(BINARY)


def open_sizes() -> Any:
    return trace(Wrapped(lambda x: x.reshape(x.shape[0] * 2, -1) + x.shape[0]), (X,)).program


def test_open_sizes() -> None:
    function, _ = program.to_function(open_sizes(), NAMESPACES["jax"])
    assert function({}, [NAMESPACES["jax"].asarray(floats(7, 6).numpy())])[0].shape == (14, 3)


def test_no_entry_is_untested() -> None:
    """Counts what the programs of the tests above ask the table for, so that it does not depend on which have run."""
    plain = trace(Together([*CASES, *MODULES]), inputs_of([*CASES, *MODULES]), {}).program
    core = trace(Together(DECOMPOSED), inputs_of(DECOMPOSED), {}).program.run_decompositions()
    programs = [program.supported(plain), program.supported(core), open_sizes()]
    used = {operation_of(node) for found in programs for node in found.graph.nodes}
    unused = {name for name in set(LOWERINGS) - used if not name.startswith("my_library")}
    assert not unused, sorted(unused)


def test_an_unknown_operation_is_named_with_its_place() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs() + torch.linalg.matrix_exp(x[:, :4]).sum()

    model = nn.Sequential(nn.Linear(6, 6), Spectrum())
    with pytest.raises(UnsupportedOperationError) as error:
        program.to_function(trace(model, X, {}).program, NAMESPACES["jax"])
    text = str(error.value)
    assert "aten._fft_r2c.default: in 1" in text or "aten.fft_rfft.default: in 1" in text
    assert "matrix_exp" in text
    assert "test_lowering.py" in text
    assert "register_lowering" in text


def test_a_registered_lowering_is_used() -> None:
    def rfft_energy(ns: Namespace, x: Any, *rest: Any) -> Any:
        return ns.sum(ns.square(x), [1], False)

    @torch.library.custom_op("my_library::energy", mutates_args=())
    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1)

    energy.register_fake(lambda x: x.new_empty(x.shape[0]))
    register_lowering("my_library.energy.default", rfft_energy)
    found = trace(Wrapped(lambda x: energy(x) + 1), (X,), {})
    function, _ = program.to_function(found.program, NAMESPACES["tensorflow"])
    np.testing.assert_allclose(function({}, [X.numpy()])[0].numpy(), X.square().sum(1).numpy() + 1, rtol=1e-5)


def test_boolean_indices_are_refused() -> None:
    found = trace(Wrapped(lambda x: x[x > 0]), (X,), {})
    with pytest.raises(UnsupportedOperationError, match=r"depends on values .*torch\.where"):
        program.to_function(found.program, NAMESPACES["jax"])
