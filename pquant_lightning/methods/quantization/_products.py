"""Exact products of 8-bit codes: the matrix products that torch ships, fed so that they never saturate.

Processors without VNNI multiply unsigned by signed bytes and add neighbouring pairs in 16 bits: two products of
255 x 127 do not fit. Weights in which no pair can exceed that (`fits_pairs`) are multiplied as they are; others in two
parts that add up to them. Whether this machine's kernels saturate is found out by multiplying the worst case.
"""

import logging
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pquant_lightning.core._private import fbgemm_engine, has_vnni, per_channel_tensor
from pquant_lightning.core.affine import int_product

log = logging.getLogger(__name__)

_LARGEST_PAIR = 32767 // 255  # of weights of one sign, beside inputs of 255
LONGEST_SUM = (2**31 - 1) // (255 * 127)  # inputs whose products fit into 32 bits, whatever the codes are


_VNNI = has_vnni()  # asked once: compiled programs cannot


class Prepared(NamedTuple):
    """A weight as a kernel wants it; `doubled` where its inputs come twice, once for either part of the codes."""

    weight: Any
    doubled: bool
    ones: Tensor | None = None
    zeros: Tensor | None = None


# -- what a kernel without VNNI multiplies exactly ------------------------------------------------------------------


def fits_pairs(codes: Tensor) -> bool:
    """Whether no two neighbours along the inputs can exceed 16 bits beside inputs of up to 255.

    Args:
        codes: int8 `(out, in, ...)`; neighbours are the pairs (0, 1), (2, 3), ... along dimension 1.

    >>> [fits_pairs(torch.tensor([pair])) for pair in ([127, 1], [64, 65], [99, -99])]
    [True, False, True]
    """
    odd = codes[:, 1::2].short()
    even = codes[:, : 2 * odd.shape[1] : 2].short()
    if odd.numel() == 0:
        return True
    positive, negative = even.clamp_min(0) + odd.clamp_min(0), even.clamp_max(0) + odd.clamp_max(0)
    return bool(positive.max() <= _LARGEST_PAIR) and bool(negative.min() >= -_LARGEST_PAIR)


def two_parts(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights of at most 7 bits that add up to the codes.

    >>> [part.tolist() for part in two_parts(torch.tensor([[127, -127]], dtype=torch.int8))]
    [[[63, -64]], [[64, -63]]]
    """
    half = codes >> 1
    return half, codes - half


def _exact_codes(codes: Tensor, saturates: bool) -> Tensor:
    """The codes `(out, in)`, or where the kernel would saturate both parts side by side, `(out, 2 in)`."""
    if not saturates or fits_pairs(codes):
        return codes.contiguous()
    say_two_parts()
    return torch.cat(two_parts(codes), 1)


@cache
def say_two_parts() -> None:
    """Says, once in a process, that sums are exact here at about half of the speed."""
    log.info(
        "This processor has no VNNI: 8-bit weights that use all their codes are multiplied in two parts, exactly, at "
        "about half of the speed. Weights quantized with reduce_range=True, the default, take one."
    )


def _twice(levels: Tensor, weight: Prepared) -> Tensor:
    return torch.cat([levels, levels], 1) if weight.doubled else levels


# -- fbgemm ----------------------------------------------------------------------------------------------------------


def has_fbgemm() -> bool:
    """Whether this build of torch multiplies with fbgemm."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@cache
def fbgemm_saturates() -> bool:
    """Whether fbgemm adds pairs in 16 bits here, found on the largest codes."""
    weight = _fbgemm_weight(torch.full((8, 8), 127, dtype=torch.int8))
    return bool((fbgemm_product(torch.full((1, 8), 255.0), 0, weight) != 8 * 255 * 127).any())


def prepare_fbgemm(
    codes: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, input_bits: int = 8
) -> Prepared:
    """The weight for `fbgemm_product`, which then multiplies its result by `scale` and adds `bias`, each `(out,)`."""
    return _fbgemm_weight(codes, scale, bias, input_bits == 8 and fbgemm_saturates())


def _fbgemm_weight(
    codes: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, saturates: bool = False
) -> Prepared:
    exact = _exact_codes(codes, saturates)
    scale = torch.ones(len(codes)) if scale is None else scale
    with fbgemm_engine(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is going to replace its quantized tensors
        packed = torch.ops.quantized.linear_prepack(per_channel_tensor(exact, scale), bias)
    return Prepared(packed, exact.shape != codes.shape)


def fbgemm_product(levels: Tensor, zero_point: int, weight: Prepared) -> Tensor:
    """float32 `(rows, out)`: the sums of levels times codes, in 32-bit integers, then scaled.

    Args:
        levels: float32 `(rows, in)`, whole numbers in [-zero_point, 255 - zero_point]; 127 - zero_point where the
            weight is prepared for fewer bits.
        zero_point: what makes them unsigned.
        weight: by `prepare_fbgemm`.
    """
    multiply: Any = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    result: Tensor = multiply(_twice(levels, weight), 1.0, zero_point, weight.weight)
    return result


# -- oneDNN ----------------------------------------------------------------------------------------------------------


def has_onednn() -> bool:
    """Whether this build of torch multiplies codes with oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


@cache
def onednn_saturates() -> bool:
    """Whether oneDNN adds pairs in 16 bits here, found on the largest codes."""
    weight = _onednn_weight(torch.full((16, 16), 127, dtype=torch.int8), saturates=False)
    return bool((onednn_product(torch.full((1, 16), 255.0), 0, weight) != 16 * 255 * 127).any())


def prepare_onednn(codes: Tensor, input_bits: int = 8) -> Prepared:
    """The weight for `onednn_product`."""
    return _onednn_weight(codes, input_bits == 8 and onednn_saturates())


def _onednn_weight(codes: Tensor, saturates: bool) -> Prepared:
    exact = _exact_codes(codes, saturates)
    packed = torch.ops.onednn.qlinear_prepack(exact, None)
    zeros = torch.zeros(len(codes), dtype=torch.int32)
    return Prepared(packed, exact.shape != codes.shape, torch.ones(len(codes)), zeros)


def onednn_product(levels: Tensor, zero_point: int, weight: Prepared) -> Tensor:
    """As `fbgemm_product`, without a scale."""
    codes = (_twice(levels, weight) + zero_point).to(torch.uint8)
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero_point, *(weight.weight, weight.ones, weight.zeros), None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


# -- torch._int_mm ---------------------------------------------------------------------------------------------------


def int_mm_runs(codes: Tensor) -> bool:
    """Whether `torch._int_mm` has a fast kernel: on CUDA for multiples of 8, on processors with VNNI."""
    if codes.is_cuda:
        return codes.shape[0] % 8 == 0 and codes.shape[1] % 8 == 0
    return codes.device.type == "cpu" and _VNNI


def int_mm_product(levels: Tensor, codes: Tensor) -> Tensor:
    """float32 `(rows, out)` of levels in [-128, 127], exact; CUDA wants more than 16 rows, which are filled up."""
    rows, missing = levels.to(torch.int8), 17 - len(levels)
    if levels.is_cuda and missing > 0:
        return int_product(torch.nn.functional.pad(rows, (0, 0, 0, missing)), codes)[: len(levels)]
    return int_product(rows, codes)


# -- for compiled programs -------------------------------------------------------------------------------------------

_PREPARED: Any = WeakTensorKeyDictionary()  # codes -> the weight that compiled programs multiply by


def _int_linear(levels: Tensor, codes: Tensor) -> Tensor:
    owner = codes if codes._base is None else codes._base
    if (weight := _PREPARED.get(owner)) is None:
        weight = _PREPARED[owner] = prepare_fbgemm(codes) if has_fbgemm() else prepare_onednn(codes)
    return (fbgemm_product if has_fbgemm() else onednn_product)(levels, 128, weight)


int_linear = torch.library.custom_op("pquant::int_linear", _int_linear, mutates_args=())
"""levels float32 `(rows, in)` in [-128, 127] times codes int8 `(out, in)`, exact, as float32 `(rows, out)`."""


@int_linear.register_fake
def _(levels: Tensor, codes: Tensor) -> Tensor:
    return levels.new_empty((levels.shape[0], codes.shape[0]))


def forget(codes: Tensor) -> None:
    """Drops what was prepared from these codes: they are about to change."""
    _PREPARED.pop(codes, None)
