"""The kernels of deployed layers, one row each, and the choice between them, which is measured.

A layer computes what its spec says, by any of the kernels that fit it. Which one is fastest differs between processors,
shapes and sizes of inputs, so the first call of a kind of layer for inputs of a size (to the next power of two) times
those that fit, and the process remembers the answer. With quantized inputs the choice never changes a bit of the
output: the sums are exact, and what follows is the same code. With inputs in floating point the kernels differ by what
`Kernel.error` states; under `torch.use_deterministic_algorithms(True)` nothing is timed, and the first kernel of the
table that fits and adds no error is taken.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pquant_lightning.core.affine import affine_codes, dynamic_grid
from pquant_lightning.methods.quantization._convolutions import HAS_CONV, int_conv, needs_parts
from pquant_lightning.methods.quantization._forms import FLOAT
from pquant_lightning.methods.quantization._products import (
    LONGEST_SUM,
    fbgemm_product,
    has_fbgemm,
    has_onednn,
    int_linear,
    int_mm_product,
    int_mm_runs,
    onednn_product,
    prepare_fbgemm,
    prepare_onednn,
)

_REPEATS = 3  # timings of a kernel, of which the shortest counts
_LONG = 0.05  # seconds after which one timing is enough
_MARGIN = 1.2  # by how much a kernel that adds an error must be faster


def why_no_kernel(layer: nn.Module, act_bits: int, group_size: int | None) -> str | None:
    """Why an ordinary layer cannot compute in integers; None where it can."""
    if isinstance(layer, nn.Embedding):
        return "a lookup computes nothing"
    if act_bits == FLOAT:
        return "inputs are not quantized"
    if group_size is not None:
        return "weights have a scale per group"
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return f"torch has no integer kernel for {type(layer).__name__}"
    if (products := layer.weight[0].numel()) > LONGEST_SUM:
        return f"a sum of {products:,} products does not fit into 32 bits"
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    if layer.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        return "padding='same' with an even kernel pads one side more"
    return None if HAS_CONV else "this build of torch has no oneDNN"


@dataclass(frozen=True)
class Kernel:
    """One way to compute a deployed layer.

    Attributes:
        name: for tables.
        fits: whether it computes this layer for inputs like these, on this machine.
        prepare: the layer's weight as the kernel wants it; made once and kept beside the codes.
        run: the output, float, of a layer, an input and the prepared weight.
        error: what it adds to the error of the layer, relative to the output; 0 where only sums are rounded.
        integer: whether it adds up integers; where one of these fits, no other is tried.
    """

    name: str
    fits: Callable[[Any, Tensor], bool]
    prepare: Callable[[Any], Any]
    run: Callable[..., Tensor]
    error: float = 0.0
    integer: bool = False


# -- quantized inputs times an integer weight ------------------------------------------------------------------------


def _multiplies(layer: Any, x: Tensor) -> bool:
    """Whether this is a Linear layer with quantized inputs and a scale per output, whose sums fit into 32 bits."""
    return bool(layer.spec["kernel"] == "integer" and isinstance(layer, nn.Linear) and layer.in_features <= LONGEST_SUM)


def _by_rows(product: Callable[[Tensor, int, Any], Tensor], layer: Any, x: Tensor, weight: Any) -> Tensor:
    """A Linear layer by products of codes less 128, which each kernel gives exactly.

    Static grids make `scale * (codes - zero_point)` of the inputs; dynamic ones do so for each row.
    """
    ready = layer.ready()
    rows = x.reshape(-1, x.shape[-1])
    if (grid := ready.get("grid")) is not None:
        levels = affine_codes(rows, grid.inverse, grid.zero_point, grid.top).sub_(128)
        y = torch.addcmul(ready["offset"], product(levels, 128, weight), ready["multiplier"])
    else:
        rows = rows.float()
        bits = layer.spec["act_bits"]
        scale, zero_point = dynamic_grid(rows, bits)
        levels = affine_codes(rows, scale.reciprocal(), zero_point, 2**bits - 1).sub_(128)
        sums = product(levels, 128, weight).addr_(128 - zero_point.squeeze(1), ready["sums"])
        y = torch.addcmul(ready["bias"], sums.mul_(scale), ready["scale"])
    return y.reshape(*x.shape[:-1], -1)


def _int_mm(layer: Any, x: Tensor, codes: Tensor) -> Tensor:
    return _by_rows(lambda levels, _, weight: int_mm_product(levels, weight), layer, x, codes)


def _fbgemm(layer: Any, x: Tensor, weight: Any) -> Tensor:
    return _by_rows(fbgemm_product, layer, x, weight)


def _onednn(layer: Any, x: Tensor, weight: Any) -> Tensor:
    return _by_rows(onednn_product, layer, x, weight)


def convolution(layer: Any, x: Tensor) -> Tensor:
    """The output of a convolution of integers."""
    ready = layer.ready()
    codes, scale, bias = ready["codes"], ready["scale"], ready["bias"]
    return int_conv(x, layer, codes, scale, bias, ready.get("grid"), layer.spec["act_bits"])


# -- unquantized inputs times an integer weight ----------------------------------------------------------------------

_BITS, _DIGITS = 7, 3  # an input as three digits of seven bits: 21 bits, nearly the 24 of float32
_HALF = 2 ** (_BITS - 1)
_BYTE = 256  # two bytes make a weight of 16 bits
_TOP = 127 * _BYTE + 127


class _Digits(NamedTuple):
    weight: Any  # of one byte per value, or of two, the high bytes first
    scale: Tensor  # float32 (out,)
    zero: Tensor | None  # float32 (out,)
    bias: Tensor | None
    two_bytes: bool


def _digits(layer: Any, x: Tensor, weight: _Digits) -> Tensor:
    """Inputs of a Linear layer as whole multiples of 2^-20 of each row's largest, in three digits of seven bits.

    Each digit is a row of a product of integers, which is exact: with seven bits on one side no pair saturates.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    top = float(2 ** (_BITS * _DIGITS - 1) - 2 ** (_BITS * _DIGITS - _BITS))
    unit = (rows.abs().amax(1, keepdim=True) / top).clamp_min(1e-38)
    left = (rows / unit).round_()
    shift = None if weight.zero is None else left.sum(1, keepdim=True) * weight.zero
    digits = []
    for power in range(_DIGITS - 1, 0, -1):
        base = float(2 ** (_BITS * power))
        digits.append((left / base).round_())
        left = left.sub_(digits[-1] * base)
    products = fbgemm_product(torch.cat([*digits, left]), _HALF, weight.weight)
    if weight.two_bytes:
        high, low = products.chunk(2, 1)
        products = high * _BYTE + low
    y, *others = products.unflatten(0, (_DIGITS, -1))
    for other in others:
        y = y.mul_(2**_BITS).add_(other)
    y = y if shift is None else y.sub_(shift)
    y = y.mul_(unit).mul_(weight.scale)
    return (y if weight.bias is None else y.add_(weight.bias)).reshape(*x.shape[:-1], -1)


def _for_digits(layer: Any) -> _Digits:
    """One byte per weight where its outputs have a scale each; else two, of the weights in groups put together."""
    bias = None if layer.bias is None else layer.bias.float()
    if layer.spec["group_size"] is None:
        zero = None if layer.zero is None else layer.zero.float().squeeze(1)
        return _Digits(
            prepare_fbgemm(layer.ready()["codes"], input_bits=_BITS), layer.scale.squeeze(1), zero, bias, False
        )
    values = layer.dense_weight().float()
    scale = (values.abs().amax(1) / _TOP).clamp_min(1e-38)
    levels = (values / scale[:, None]).round_()
    high = ((levels + _BYTE // 2) / _BYTE).floor_()
    codes = torch.cat([high, levels - high * _BYTE]).to(torch.int8)
    return _Digits(prepare_fbgemm(codes, input_bits=_BITS), scale, None, bias, True)


def _takes_digits(layer: Any, x: Tensor) -> bool:
    spec = layer.spec
    if not isinstance(layer, nn.Linear) or spec["act"] is not None or x.dtype == torch.float64:
        return False
    runs = x.device.type == "cpu" and layer.like.dtype != torch.float64 and has_fbgemm()
    return runs and layer.in_features <= LONGEST_SUM


# -- the weight in floating point ------------------------------------------------------------------------------------


def _floating(layer: Any, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    result: Tensor = layer.compute(layer.quantized_input(x).to(weight.dtype), weight, layer.bias, *args)
    return result


# -- the table -------------------------------------------------------------------------------------------------------

KERNELS = (
    Kernel(
        "torch._int_mm",
        lambda layer, x: _multiplies(layer, x) and int_mm_runs(layer.ready()["codes"]),
        lambda layer: layer.ready()["codes"],
        _int_mm,
        integer=True,
    ),
    Kernel(
        "fbgemm",
        lambda layer, x: _multiplies(layer, x) and x.device.type == "cpu" and has_fbgemm(),
        lambda layer: prepare_fbgemm(layer.ready()["codes"], input_bits=layer.spec["act_bits"]),
        _fbgemm,
        integer=True,
    ),
    Kernel(
        "oneDNN linear",
        lambda layer, x: _multiplies(layer, x) and x.device.type == "cpu" and has_onednn(),
        lambda layer: prepare_onednn(layer.ready()["codes"], layer.spec["act_bits"]),
        _onednn,
        integer=True,
    ),
    Kernel(
        "oneDNN convolution",
        lambda layer, x: (
            layer.spec["kernel"] == "integer"
            and not isinstance(layer, nn.Linear)
            and HAS_CONV
            and x.device.type == "cpu"
            and x.dim() == len(layer.shape)
        ),
        lambda layer: None,  # its weights are packed at the first call, when the window is known
        lambda layer, x, _: convolution(layer, x),
        integer=True,
    ),
    Kernel("inputs in three digits, fbgemm", _takes_digits, _for_digits, _digits, error=2e-4),
    Kernel("weights in floating point", lambda layer, x: True, lambda layer: layer.dense_weight(), _floating),
)


# -- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A kernel for a kind of layer and a size of inputs, with the seconds of all that fit; none where only one does."""

    kernel: Kernel
    seconds: dict[str, float]


_CHOICES: dict[Any, Choice] = {}


def choose(layer: Any, x: Tensor, *args: Any) -> Choice:
    """The kernel of a layer for inputs like these; measured at the first call, then remembered.

    Args:
        layer: in deployed form.
        x: an input; its values do not matter.
        *args: what else its forward takes.
    """
    exact = torch.are_deterministic_algorithms_enabled()
    key = (x.numel().bit_length(), x.dtype, x.device, torch.get_num_threads(), exact)
    own: dict[Any, Choice] = layer.ready()["choices"]
    if (found := own.get(key)) is None:
        shared = (*key, *_problem(layer))
        if (found := _CHOICES.get(shared)) is None:
            fitting = [kernel for kernel in KERNELS if kernel.fits(layer, x)]
            if fitting[0].integer:
                fitting = [kernel for kernel in fitting if kernel.integer]
            if exact:
                fitting = [kernel for kernel in fitting if kernel.error == 0][:1]
            found = _CHOICES[shared] = _measured(fitting, layer, x, args)
        own[key] = found
    return found


def compute(layer: Any, x: Tensor, *args: Any) -> Tensor:
    """The output of a deployed layer by the kernel that is fastest here."""
    kernel = choose(layer, x, *args).kernel
    return kernel.run(layer, x, prepared(layer, kernel), *args)


def prepared(layer: Any, kernel: Kernel) -> Any:
    """The layer's weight as that kernel wants it."""
    weights: dict[str, Any] = layer.ready()["weights"]
    if kernel.name not in weights:
        weights[kernel.name] = kernel.prepare(layer)
    return weights[kernel.name]


def _problem(layer: Any) -> tuple[Any, ...]:
    """What else the speed of a layer depends on."""
    spec, ready = layer.spec, layer.ready()
    own = (spec["bits"], spec["act_bits"], spec["act"], spec["group_size"], spec["kernel"], layer.zero is None)
    parts = needs_parts(ready["codes"]) if spec["kernel"] == "integer" and HAS_CONV else False
    return (type(layer), tuple(layer.shape), layer.like.dtype, str(sorted(spec["layer"].items())), parts, *own)


def _measured(kernels: list[Kernel], layer: Any, x: Tensor, args: tuple[Any, ...]) -> Choice:
    if len(kernels) == 1:
        return Choice(kernels[0], {})
    weights = {kernel.name: kernel.prepare(layer) for kernel in kernels}
    seconds = dict.fromkeys(weights, math.inf)
    with torch.no_grad():
        for repeat in range(_REPEATS + 1):  # the first run also makes what the kernels make at their first
            for kernel in kernels:
                if repeat > 1 and seconds[kernel.name] > _LONG:
                    continue
                start = time.perf_counter()
                kernel.run(layer, x, weights[kernel.name], *args)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                taken = time.perf_counter() - start
                if repeat:
                    seconds[kernel.name] = min(seconds[kernel.name], taken)
    fastest = min(kernels, key=lambda kernel: seconds[kernel.name] * (_MARGIN if kernel.error else 1))
    layer.ready()["weights"][fastest.name] = weights[fastest.name]
    return Choice(fastest, seconds)


def traced_product(layer: Any, x: Tensor) -> Tensor:
    """The output of a Linear layer with quantized inputs, in operations that `torch.compile` can take apart."""
    codes = layer.ready()["codes"]
    if int_mm_runs(codes):
        return _int_mm(layer, x, codes)
    return _by_rows(lambda levels, _, weight: int_linear(levels, weight), layer, x, codes)
