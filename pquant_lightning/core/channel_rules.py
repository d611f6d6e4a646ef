"""What each of torch's operations does to labels (`core/channel_labels.py`): one rule for all that behave alike.

A rule is given the operation's arguments and its result, and returns the labels of the tensors in the result. Those
that only move elements are in `core/channel_views.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from pquant_lightning.core import channel_views as views
from pquant_lightning.core.channel_labels import (
    FIXED_SIZE,
    HEAD_WIDTH,
    Block,
    Ids,
    Labelling,
    Labels,
    Operand,
    block_at,
    moved,
    take,
)
from pquant_lightning.core.channel_views import KERNEL, LOOKED_UP, argument, fresh_labels, tensors_of, tiled

Rule = Callable[[Labelling, Any, Any, Any], list[Labels]]

GROUP_WIDTH = "they are the width of a group"
NORMALIZED = "a norm takes its mean and variance over all of them, and these would change without some"
SUMMED = "a sum, mean or maximum is taken over all of them (as an RMS norm does), and it would change without some"
RANKED = "they are sorted, or the largest of them are chosen"
WEIGHT_NORM = "the weight of each is divided by its own norm (weight_norm), and none can be zero"
SOFTMAX = "a softmax runs over them, in which a zero has a share too"
CUMULATED = "a running sum or product goes along them"


def name_of(func: Any) -> str:
    """The name of one of torch's operations, without its namespace and overload."""
    name: str = func.name()
    return name.removeprefix("aten::").partition(".")[0]


def rule_of(func: Any) -> Rule | None:
    """The rule of one of torch's operations; None where it is not followed."""
    name = name_of(func)
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    return views.pointwise if rule is None and torch.Tag.pointwise in func.tags else rule


# -- joining ---------------------------------------------------------------------------------------------------------


def _glu(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    dim = argument(args, kwargs, 1, "dim", -1) % args[0].dim()
    half = result.shape[dim]
    parts = [take(t.of(args[0]), dim, numpy.arange(start, start + half)) for start in (0, half)]
    return [t.merge([(labels, result.shape) for labels in parts], result.shape)]


def _cat(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    tensors = [x for x in args[0] if x.dim() == result.dim()]
    dim = argument(args, kwargs, 1, "dim", 0) % result.dim()
    held = [t.of(x) for x in tensors]
    joint = {d for labels in held if (block := block_at(labels, dim)) is not None for d in block.dims}
    along: Labels = []
    if joint:
        dims, parts = sorted(joint), []
        for index, x in enumerate(tensors):
            held[index], ids = _over(t, held[index], x.shape, dims, dim)
            parts.append(ids)
        along = [Block(tuple(dims), numpy.concatenate(parts, dims.index(dim)))]
    rest: list[Operand] = [
        (labels, [1 if d == dim or d in joint else n for d, n in enumerate(x.shape)])
        for x, labels in zip(tensors, held, strict=True)
    ]
    return [[*t.merge(rest, result.shape), *along]]


def _over(t: Labelling, labels: Labels, shape: Sequence[int], dims: Sequence[int], dim: int) -> tuple[Labels, Ids]:
    """The labels without those over some dimensions, and these as one array; what is not labelled is fixed."""
    labels, block = t.single(labels, dims)
    for other in () if block is None else [d for d in block.dims if d not in dims]:
        labels = t.collapse(labels, other, "they are concatenated with something of another structure")
    block = next((b for b in labels if set(b.dims) & set(dims)), None)
    if block is None:
        block = Block((dim,), t.ids.fresh(shape[dim]))
        t.ids.fix(block.ids, FIXED_SIZE)
    sizes = [shape[d] for d in dims]
    ids = block.transposed([d for d in dims if d in block.dims])
    ids = ids.reshape([n if d in block.dims else 1 for d, n in zip(dims, sizes, strict=True)])
    return [b for b in labels if not set(b.dims) & set(dims)], numpy.broadcast_to(ids, sizes)


def _stack(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    dim = argument(args, kwargs, 1, "dim", 0) % result.dim()
    items = []
    for x in args[0]:
        shape = list(x.shape)
        shape.insert(dim, 1)
        items.append((moved(t.of(x), lambda d: d + (d >= dim)), shape))
    return [t.merge(items, result.shape)]


# -- reductions ------------------------------------------------------------------------------------------------------


def _reduce(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """Sums, means, norms over some dimensions, or all."""
    x, outs = args[0], tensors_of(result)
    given = next(
        (a for a in args[1:] if isinstance(a, int | list | tuple) and not isinstance(a, bool)), kwargs.get("dim")
    )
    dims = range(x.dim()) if given is None or given == [] else [given] if isinstance(given, int) else given
    gone = sorted({dim % x.dim() for dim in dims}) if x.dim() else []
    labels = t.of(x)
    for dim in gone:
        labels = t.collapse(labels, dim, SUMMED)
    if outs and outs[0].dim() != x.dim():
        labels = moved(labels, lambda d: d - sum(g < d for g in gone))
    return [labels for _ in outs]


def _extreme(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """`max` and `min`: of two tensors, or over dimensions."""
    return (views.pointwise if len(args) > 1 and isinstance(args[1], Tensor) else _reduce)(t, args, kwargs, result)


def _norm(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """`linalg_vector_norm` (x, order, dims, ...)."""
    dims = argument(args, kwargs, 2, "dim")
    return _reduce(t, [args[0]], {"dim": dims}, result)


def _along(place: int, default: int, reason: str) -> Rule:
    """Operations that mix all values along one dimension: softmax, cumulative sums, sorting."""

    def rule(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
        x = args[0]
        dim = argument(args, kwargs, place, "dim", default) % max(x.dim(), 1)
        labels = t.settle(t.of(x), dim, reason)
        return [
            labels if out.shape == x.shape else [b for b in labels if dim not in b.dims] for out in tensors_of(result)
        ]

    return rule


# -- products --------------------------------------------------------------------------------------------------------


def _mm(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`mm` and `addmm`."""
    a, b = args[-2:]
    first, second = t.contract(t.of(a), 1, t.of(b), 0)
    items: list[Operand] = [(first, [a.shape[0], 1]), (second, [1, b.shape[1]])]
    if len(args) == 3:
        items.append(t.item(args[0], 2 - args[0].dim()))
    return [t.merge(items, result.shape)]


def _bmm(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`bmm` and `baddbmm`."""
    a, b = args[-2:]
    first, second = t.contract(t.of(a), 2, t.of(b), 1, [(0, 0)])
    n, m, p = result.shape
    items: list[Operand] = [(first, [n, m, 1]), (second, [n, 1, p])]
    if len(args) == 3:
        items.append(t.item(args[0], 3 - args[0].dim()))
    return [t.merge(items, result.shape)]


def _vector_product(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`mv`, `addmv` and `dot`: a product with a vector."""
    a, b = args[-2:]
    first, _ = t.contract(t.of(a), a.dim() - 1, t.of(b), 0)
    items: list[Operand] = [(first, a.shape[:-1])]
    if len(args) == 3:
        items.append(t.item(args[0], result.dim() - args[0].dim()))
    return [t.merge(items, result.shape)]


def _attention(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """Scaled dot product attention of `(batch, heads, tokens, width)`; keys and values may have fewer heads."""
    q, k, v = args[:3]
    outs = tensors_of(result)
    last, heads = q.dim() - 1, q.dim() - 3
    key, value = (_more_heads(t, x, q.shape[heads], heads) for x in (k, v))
    query, key = t.contract(t.of(q), last, key, last, [(dim, dim) for dim in range(last - 1)])
    shape = [*outs[0].shape[:-2], 1, outs[0].shape[-1]]
    scores: list[Operand] = [(query, list(q.shape)), (key, list(q.shape))]
    if isinstance(bias := argument(args, kwargs, 3, "attn_mask", kwargs.get("attn_bias")), Tensor):
        scores.append(t.item(bias, q.dim() - bias.dim()))
    leading: list[Operand] = [
        ([b for b in labels if max(b.dims) < last - 1], [*sizes[: last - 1], 1, 1]) for labels, sizes in scores
    ]
    merged = t.merge([*leading, (value, shape)], shape)
    return [t.collapse(merged, last, HEAD_WIDTH), *([] for _ in outs[1:])]


def _more_heads(t: Labelling, x: Tensor, heads: int, dim: int) -> Labels:
    if x.shape[dim] == 1:
        return t.of(x) + fresh_labels(t, [*x.shape[:dim], heads], [dim])
    return tiled(t.of(x), dim, heads // x.shape[dim])


def _grouped_mm(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """Rows `(rows, k)` by one of the matrices `(experts, k, n)` each."""
    a, b = args[:2]
    if a.dim() != 2 or b.dim() != 3:
        for x in (a, b):
            t.fix(t.of(x), "_grouped_mm is applied to them in shapes that are not followed")
        return [[]]
    first, second = t.contract(t.of(a), 1, t.of(b), 1)
    second = t.collapse(second, 0, LOOKED_UP)
    items: list[Operand] = [(first, [a.shape[0], 1]), (moved(second, lambda d: d - 1), [1, b.shape[2]])]
    return [t.merge(items, result.shape)]


def _convolution(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    labels, given = t.of(weight), t.of(x)
    for dim in range(2, weight.dim()):
        labels = t.collapse(labels, dim, KERNEL)
        given = t.collapse(given, dim, "they are places in an image")
    into, out = (0, 1) if transposed else (1, 0)
    outputs = block_at(labels, out)
    if groups == 1:
        rest, _ = t.contract(given, 1, labels, into)
        ids = None if outputs is None else outputs.ids
    else:
        rest, ids = _in_groups(t, given, labels, result.shape[1], groups)
    found = [block for block in rest if max(block.dims) < 1]
    if ids is not None:
        if (own := block_at(t.of(bias), 0)) is not None:
            t.ids.join(ids, own.ids)
        found.append(Block((1,), ids))
    return [[block for block in found if all(result.shape[d] > 1 for d in block.dims)]]


def _in_groups(t: Labelling, labels: Labels, weight: Labels, outs: int, groups: int) -> tuple[Labels, Ids | None]:
    """A group of a grouped convolution goes as a whole, inputs and outputs."""
    block, rows = block_at(labels, 1), block_at(weight, 0)
    t.fix([b for b in weight if 1 in b.dims], GROUP_WIDTH)
    if block is None or len(block.dims) > 1:
        labels = t.collapse(labels, 1, FIXED_SIZE)
        t.fix([] if rows is None else [rows], FIXED_SIZE)
        return labels, None
    inside = block.ids.reshape(groups, -1)
    whole = inside[:, :1]
    t.ids.join(inside, whole)
    if rows is not None:
        t.ids.join(rows.ids.reshape(groups, -1), whole)
    return [b for b in labels if b is not block], whole.repeat(outs // groups, 1).ravel()


# -- normalization ---------------------------------------------------------------------------------------------------


def _batch_norm(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    x = args[0]
    shape = [1, x.shape[1], *[1] * (x.dim() - 2)]
    vectors: list[Operand] = [(moved(t.of(p), lambda d: 1), shape) for p in args[1:5] if isinstance(p, Tensor)]
    return [t.merge([t.item(x), *vectors], x.shape), *([] for _ in tensors_of(result)[1:])]


def _layer_norm(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """`native_layer_norm` and `_fused_rms_norm`."""
    x, offset = args[0], args[0].dim() - len(args[1])
    held = t.of(x)
    for dim in range(offset, x.dim()):
        held = t.settle(held, dim, NORMALIZED)
    vectors = [t.item(p, offset) for p in args[2:4] if isinstance(p, Tensor)]
    return [t.merge([(held, x.shape), *vectors], x.shape), *([] for _ in tensors_of(result)[1:])]


def _group_norm(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    x, groups = args[0], args[6]
    labels = _batch_norm(t, args[:3], {}, result)[0]
    if (block := block_at(labels, 1)) is not None:
        if len(block.dims) > 1 or groups == 1:
            labels = t.settle(labels, 1, NORMALIZED)
        else:
            inside = block.ids.reshape(groups, -1)
            t.ids.join(inside, inside[:, :1])
    for dim in range(2, x.dim()):
        labels = t.settle(labels, dim, NORMALIZED)
    return [labels, [], []]


def _weight_norm(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """A weight `g * v / |v|`, the norm over all dimensions but one, along which nothing can be zero."""
    v, g, kept = args[0], args[1], argument(args, kwargs, 2, "dim", 0) % args[0].dim()
    labels = t.merge([t.item(v), t.item(g)], v.shape)
    return [t.settle(labels, kept, WEIGHT_NORM), []]


def _rows(*rules: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rules for name in names.split()}


_RULES: dict[str, Rule] = _rows(
    (views.view, "view _unsafe_view reshape unsqueeze squeeze _reshape_alias flatten unflatten"),
    (views.carry, "detach alias clone _to_copy contiguous lift_fresh native_dropout"),
    (views.carry, "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d"),
    (views.carry, "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d constant_pad_nd"),
    (views.carry, "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d"),
    (views.carry, "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"),
    (views.carry, "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    (
        views.carry,
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
    ),
    (views.constant, "zeros ones full empty scalar_tensor new_zeros new_ones new_full new_empty"),
    (views.like, "zeros_like ones_like full_like empty_like"),
    (views.pointwise, "masked_fill where copy addcmul addcdiv lerp _prelu_kernel fill zero hardswish"),
    (_reduce, "mean sum amax amin var std prod logsumexp any all var_mean std_mean argmax argmin median"),
    (_extreme, "max min"),
    (_norm, "linalg_vector_norm"),
    (_along(1, -1, SOFTMAX), "_softmax _log_softmax _safe_softmax"),
    (_along(1, -1, CUMULATED), "cumsum cumprod logcumsumexp"),
    (_along(2, -1, RANKED), "topk"),
    (_along(1, -1, RANKED), "sort argsort"),
    (_mm, "mm addmm"),
    (_bmm, "bmm baddbmm"),
    (_vector_product, "mv addmv dot"),
    (views.split, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
    (_batch_norm, "_native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm miopen_batch_norm"),
    (_batch_norm, "_native_batch_norm_legit _batch_norm_with_update"),
    (_layer_norm, "native_layer_norm _fused_rms_norm"),
    (views.pick, "index_select gather"),
    (views.put, "index_add scatter scatter_add scatter_reduce index_copy"),
    (_attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention"),
    (_attention, "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention"),
    (views.transpose, "transpose t"),
    (views.rolled, "roll flip"),
    (views.positional, "tril triu"),
    (views.as_strided, "as_strided"),
    (views.permute, "permute"),
    (views.expand, "expand"),
    (views.repeat, "repeat"),
    (views.select, "select"),
    (views.part, "slice"),
    (views.unbind, "unbind"),
    (views.unfold, "unfold"),
    (views.windows, "im2col col2im"),
    (views.pixel_shuffle, "pixel_shuffle"),
    (views.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    (views.fill_places, "index_fill"),
    (views.carry, "grid_sampler_2d grid_sampler_3d"),
    (views.pixel_unshuffle, "pixel_unshuffle"),
    (_glu, "glu"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_grouped_mm, "_grouped_mm"),
    (_convolution, "convolution"),
    (_group_norm, "native_group_norm"),
    (_weight_norm, "_weight_norm_interface"),
    (views.embedding, "embedding"),
    (views.embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    (views.index, "index"),
)

# what makes something of any size out of something of fixed size
ALWAYS_FOLLOWED = {name for name, rule in _RULES.items() if rule in (views.constant, views.expand, views.repeat)}
