"""First and second moments of what the weights of layers are multiplied with, collected within a bound on memory."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pquant_lightning.core.block_chain import BlockInputs, find_chain
from pquant_lightning.core.calibration import Samples, visit_inputs
from pquant_lightning.core.errors import named
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.reduction import from_rank_zero, on_all, reduced_by_name

log = logging.getLogger(__name__)

DAMPING = 0.01
"""Share of the mean second moment that is added to all, as in SparseGPT and GPTQ."""

LARGEST_BYTES = 2**32
"""What the moments of a single layer may take where no option allows more."""

_MAX_ROWS = 2**22  # numbers that the windows of a convolution take at a time: 16 MiB

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class InputMoments:
    """Means over all positions of all samples of the vectors x that the weight of a layer is multiplied with.

    The second moments are held around the mean, where a mean much larger than the deviations costs no digits.
    With a reference model, x' is what the same layer receives there.

    Attributes:
        count: positions.
        mean: `(groups, n)`, of x.
        covariance: `(groups, n, n)`, of (x - mean) (x - mean)^T.
        reference_mean: `(groups, n)`, of x'; None without a reference.
        cross_covariance: `(groups, n, n)`, of (x' - x - their mean) (x - mean)^T; None without a reference.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    reference_mean: Tensor | None = None
    cross_covariance: Tensor | None = None

    @property
    def width(self) -> int:
        """n."""
        return self.mean.shape[1]

    @property
    def second(self) -> Tensor:
        """`(groups, n, n)`, of x x^T."""
        return torch.baddbmm(self.covariance, self.mean.unsqueeze(-1), self.mean.unsqueeze(-2))

    @property
    def cross(self) -> Tensor | None:
        """`(groups, n, n)`, of (x' - x) x^T; None without a reference."""
        if self.cross_covariance is None or self.reference_mean is None:
            return None
        shift = self.reference_mean - self.mean
        return torch.baddbmm(self.cross_covariance, shift.unsqueeze(-1), self.mean.unsqueeze(-2))


def input_rows(layer: Any, x: Tensor) -> Tensor:
    """What the weight of an ordinary layer is multiplied with at each position of its input, `(groups, positions, n)`.

    For Linear n is the number of inputs; for a convolution the inputs of a group times the window, in the order of
    the weight; for a transposed convolution the inputs of a group alone, as each is multiplied with the whole window.

    >>> input_rows(nn.Conv2d(4, 8, 3, padding=1, groups=2), torch.zeros(5, 4, 6, 7)).shape
    torch.Size([2, 210, 18])
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    spatial = len(layer.kernel_size)
    if x.dim() == spatial + 1:
        x = x.unsqueeze(0)
    if not isinstance(layer, _CONV_TRANSPOSE):
        x = F.pad(x, _margins(layer), "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        for dim, (size, stride, step) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
        ):
            x = x.unfold(dim, step * (size - 1) + 1, stride)[..., ::step]
    positions = range(2, 2 + spatial)
    x = x.permute(0, *positions, 1, *range(2 + spatial, x.dim()))  # (N, *positions, channels, *window)
    return x.reshape(x.shape[: 1 + spatial].numel(), layer.groups, -1).transpose(0, 1)


def _margins(conv: Any) -> list[int]:
    """What is padded on both sides of each dimension, the last one first."""
    margins: list[int] = []
    for dim in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            whole = conv.dilation[dim] * (conv.kernel_size[dim] - 1)
            margins += [whole // 2, whole - whole // 2]
        else:
            margins += [0, 0] if conv.padding == "valid" else [conv.padding[dim]] * 2
    return margins


def has_moments(layer: nn.Module) -> bool:
    """Whether an ordinary layer, or a subclass of one, multiplies floating-point inputs with its weight."""
    return isinstance(layer, (nn.Linear, *_CONV, *_CONV_TRANSPOSE))


def moment_size(layer: Any) -> tuple[int, int]:
    """`(groups, n)` of a layer's moments."""
    if isinstance(layer, nn.Linear):
        return 1, layer.in_features
    window = 1 if isinstance(layer, _CONV_TRANSPOSE) else torch.Size(layer.kernel_size).numel()
    return layer.groups, layer.in_channels // layer.groups * window


class _Products:
    """The sum of rows and their product with themselves; for layers that read one tensor (q, k, v) computed once."""

    def __init__(self) -> None:
        # rows, their sum, their distance from the shift, the shift, and the sum and product of these distances
        self._last: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows `(groups, positions, n)` minus the shift `(groups, n)`, their sum, and their product `(n, n)`."""
        total = rows.sum(1)
        last = self._last
        same = last is not None and _same(rows, last[0]) and torch.equal(total, last[1]) and torch.equal(shift, last[3])
        if last is None or not same:
            away = rows - shift.unsqueeze(1)
            last = self._last = (rows, total, away, shift, away.sum(1).double(), away.mT @ away)
        return last[2], last[4], last[5]


def _same(rows: Tensor, last: Tensor) -> bool:
    """Whether they view the same memory; its values may have been changed in between."""
    return rows.data_ptr() == last.data_ptr() and rows.shape == last.shape and rows.stride() == last.stride()


class _Sums:
    """The sums behind `InputMoments`, in float32 (float64 where the inputs are), around the first batch's mean."""

    def __init__(self, layer: nn.Module, paired: bool, products: _Products) -> None:
        self.layer, self.paired, self.products = layer, paired, products
        self.count = 0
        self.shift = torch.empty(0)  # (groups, n), about the mean
        # of x - shift (float64) and its product, and where paired of x' - x (float64) and its product with x - shift
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        if not isinstance(self.layer, _CONV):
            self._add_rows(self._rows(x), None if reference is None else self._rows(reference).to(x.device))
            return
        window, unbatched = torch.Size(self.layer.kernel_size), x.dim() == len(self.layer.kernel_size) + 1
        if unbatched:
            x, reference = x.unsqueeze(0), None if reference is None else reference.unsqueeze(0)
        share = max(_MAX_ROWS // (x[0].numel() * window.numel()), 1)
        for start in range(0, len(x), share):
            part = slice(start, start + share)
            other = None if reference is None else self._rows(reference[part]).to(x.device)
            self._add_rows(self._rows(x[part]), other)

    def _rows(self, x: Tensor) -> Tensor:
        return input_rows(self.layer, x if x.dtype == torch.float64 else x.float())

    def _add_rows(self, rows: Tensor, other: Tensor | None) -> None:
        groups, positions, n = rows.shape
        if not self.sums:
            self.shift = rows.mean(1)
            empty = [rows.new_zeros(groups, n, dtype=torch.float64), rows.new_zeros(groups, n, n)]
            self.sums = [*empty, *(torch.zeros_like(total) for total in empty if self.paired)]
        self.count += positions
        away, total, product = self.products(rows, self.shift)
        self.sums[0] += total
        self.sums[1] += product
        if other is not None:
            change = other - rows
            self.sums[2] += change.sum(1).double()
            self.sums[3].baddbmm_(change.mT, away)

    def first_order(self) -> Tensor:
        """float64 `(1 + paired, groups, n + 1)`: sums of x (and of x' - x), with the positions beside them."""
        count = self.sums[0].new_full((len(self.shift), 1), self.count)
        sums = [self.sums[0] + self.count * self.shift.double(), *self.sums[2:3]]
        return torch.stack([torch.cat([total, count], -1) for total in sums])

    def around(self, means: Tensor) -> list[Tensor]:
        """The products, around the means `(1 + paired, groups, n)` instead of the shift; the sums are given up."""
        away = (means[0] - self.shift.double()).to(self.shift.dtype)
        total = self.sums[0].to(away.dtype)
        found = [self.sums[1]]
        _subtract_outer(found[0], total, away)
        _subtract_outer(found[0], away, total - self.count * away)
        if self.paired:  # sum of (d - D) (x - m)^T with d = x' - x, from the sum of d (x - shift)^T
            found.append(self.sums[3])
            _subtract_outer(found[1], self.sums[2].to(away.dtype), away)
            _subtract_outer(found[1], means[1].to(away.dtype), total - self.count * away)
        return found


def _subtract_outer(product: Tensor, left: Tensor, right: Tensor) -> None:
    product.baddbmm_(left.unsqueeze(-1), right.unsqueeze(-2), alpha=-1)


def collect_moments(
    model: nn.Module,
    names: Sequence[str],
    samples: Samples,
    reference: nn.Module | None = None,
    max_bytes: int | None = None,
) -> dict[str, InputMoments]:
    """Moments of the inputs of the named layers, in one pass over the samples.

    Args:
        model: holds the layers.
        names: of ordinary layers or their subclasses, or of a user's with an adapter.
        samples: what it is run on; in a distributed run every process calls this with samples of its own.
        reference: a twin of the model with the same layers, whose inputs these are to be compared with; it is run
            batch by batch beside the model.
        max_bytes: of the moments, where the caller has seen to it; None leaves out single layers above `LARGEST_BYTES`.

    Returns:
        Moments by layer name; layers that receive nothing (or no floating-point tensor) are missing.

    Raises:
        CalibrationError: a layer receives values that are not finite, or the model cannot be run.
    """
    found: dict[str, _Sums] = {}
    products = _Products()
    left_out = _too_large(model, names, LARGEST_BYTES) if max_bytes is None else {}
    names = [name for name in names if name not in left_out]

    def sums_of(name: str) -> _Sums:
        if name not in found:
            found[name] = _Sums(_ordinary(model, name), reference is not None, products)
        return found[name]

    if reference is None:
        visit_inputs(model, names, samples, lambda name, x: sums_of(name).add(x))
    else:
        for number, batch in enumerate(samples.batches, start=1):
            one = replace(samples, batches=(batch,))
            expected: dict[str, list[Tensor]] = {name: [] for name in names}
            visit_inputs(reference, names, one, partial(_keep, expected), number=number)
            visit_inputs(
                model,
                names,
                one,
                lambda name, x: sums_of(name).add(x, expected[name].pop(0)),  # noqa: B023
                number=number,
            )
    return _moments(found, names, samples)


def _moments(found: dict[str, _Sums], names: Sequence[str], samples: Samples) -> dict[str, InputMoments]:
    """The sums of all processes as means: first the means of x, then the products around them."""
    firsts = reduced_by_name({name: [sums.first_order()] for name, sums in found.items()}, names, samples)
    means = {name: first[..., :-1] / first[..., -1:] for name, (first,) in firsts.items()}
    products = {name: found.pop(name).around(means[name]) for name in list(found)}
    result = {}
    for name, totals in reduced_by_name(products, names, samples).items():
        count, own = int(firsts[name][0][0, 0, -1]), means[name].to(totals[0].dtype)
        covariance, *crosses = (total.div_(count) for total in totals)
        reference = (means[name][0] + means[name][1]).to(covariance.dtype) if crosses else None
        result[name] = InputMoments(count, own[0], covariance, reference, *crosses)
    return result


def _keep(kept: dict[str, list[Tensor]], name: str, x: Tensor) -> None:
    kept[name].append(x)


def _ordinary(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    layer = module if has_moments(module) else as_torch(module)
    assert layer is not None, name
    return layer


class MomentSource:
    """Moments of many layers, collected when they are asked for: all in one pass where they fit, else part by part.

    Where they do not fit and the model is a chain of blocks, whose inputs do fit, the parts are those of one block
    after the other: each block then runs twice per sample, on the inputs that the block before has left in memory,
    instead of the whole model once per part.

    Args:
        model: holds the layers; parts that are collected later see the model as it is then.
        names: of the layers, in the order in which they will be asked for.
        samples: what the model is run on.
        max_bytes: what the moments held at one time may take, and the inputs of a block; a single layer may take up to
            `LARGEST_BYTES`, and more only where this says so.

    Attributes:
        parts: names of the layers that are collected together.
        blocks: the blocks that are run one by one; empty where the model is run as a whole.
        passes: of the whole model over the samples so far.
        counts: positions at which each layer was seen.
        too_large: layers that are left without moments, and the bytes that these would take.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], samples: Samples, max_bytes: int) -> None:
        self.model, self.samples, self.max_bytes = model, samples, max_bytes
        self.too_large = _too_large(model, names, max(max_bytes, LARGEST_BYTES))
        names = [name for name in names if name not in self.too_large]
        self.parts = list(_parts(model, names, max_bytes))
        self.blocks: tuple[str, ...] = ()
        self.passes = 0
        self.counts: dict[str, int] = {}
        self._part: list[str] = []
        self._held: dict[str, InputMoments] = {}
        self._inputs: BlockInputs | None = None
        if len(self.parts) > 1:
            self.blocks = from_rank_zero(find_chain(model, names, samples), samples)
        if self.blocks and self._start_chain():
            of_block = {name: self._block_of(name) for name in names}
            groups = [[n for n in names if of_block[n] == block] for block in dict.fromkeys(of_block.values())]
            self.parts = [part for group in groups for part in _parts(model, group, max_bytes)]

    def collect_first(self) -> None:
        """Collects the first part now, before the model is changed."""
        if self.parts and self._part != self.parts[0]:
            self._collect(self.parts[0])

    def get(self, name: str) -> InputMoments | None:
        """The moments of one layer; None where it is not among the names or was not reached by the samples."""
        if name not in self._part:
            part = next((part for part in self.parts if name in part), None)
            if part is None:
                return None
            self._collect(part)
        return self._held.get(name)

    def _block_of(self, name: str) -> int | None:
        found = (i for i, block in enumerate(self.blocks) if name == block or name.startswith(f"{block}."))
        return next(found, None)

    def _start_chain(self) -> bool:
        """Takes the inputs of the first block from a pass of the model; False where they do not fit."""
        self._inputs = BlockInputs(self.model, self.blocks, self.samples, self.max_bytes)
        self.passes += 1
        if not on_all(self._inputs.fits, self.samples):
            log.info("The inputs of the blocks take more than %s bytes: the whole model is run.", f"{self.max_bytes:,}")
            self.blocks, self._inputs = (), None
        return self._inputs is not None

    def _collect(self, part: list[str]) -> None:
        self._held = {}  # before the new ones take its memory
        place = self._block_of(part[0])
        if place is None:
            self._held = collect_moments(self.model, part, self.samples, max_bytes=self.max_bytes)
            self.passes += 1
        else:
            if self._inputs is None or self._inputs.block > place:
                self._start_chain()
            assert self._inputs is not None
            while self._inputs.block < place:
                self._inputs.advance()
            block, whole = self.model.get_submodule(self.blocks[place]), self.blocks[place]
            local = {name: name[len(whole) + 1 :] for name in part}
            found = collect_moments(block, list(local.values()), self._inputs.samples(), max_bytes=self.max_bytes)
            self._held = {name: found[own] for name, own in local.items() if own in found}
        self._part = part
        self.counts.update({own: found.count for own, found in self._held.items()})


def moment_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's moments: they grow with the square of its inputs times its window."""
    groups, n = moment_size(layer)
    return 4 * groups * n * (n + 1)


def _too_large(model: nn.Module, names: Sequence[str], most: int) -> dict[str, int]:
    """The layers whose moments alone would take more, with a line for the log: nothing is allocated for them."""
    sizes = {name: moment_bytes(_ordinary(model, name)) for name in names}
    found = {name: size for name, size in sizes.items() if size > most}
    if found:
        log.warning(
            "The moments of the inputs of %s are not measured: they would take %s bytes (the square of inputs times "
            "window), more than %s. What they are for is done without data there; raise max_statistics_bytes to "
            "measure them all the same.",
            named(found),
            f"{max(found.values()):,}",
            f"{most:,}",
        )
    return found


def _parts(model: nn.Module, names: Sequence[str], max_bytes: int) -> Iterator[list[str]]:
    part: list[str] = []
    held = 0
    for name in names:
        size = moment_bytes(_ordinary(model, name))
        if part and held + size > max_bytes:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    if part:
        yield part


# -- what follows from moments -----------------------------------------------------------------------------------------


def covariance(moments: InputMoments, centred: bool) -> Tensor:
    """E[x x^T] `(groups, n, n)`, around the mean where a bias takes care of that."""
    return moments.covariance if centred else moments.second


def relative_moment(moment: Tensor) -> Tensor:
    """The moment `(groups, n, n)` over its mean diagonal, so that nothing depends on the unit of the inputs; 0 stays.

    >>> relative_moment(torch.tensor([[[2e-30, 1e-30], [1e-30, 6e-30]]]))
    tensor([[[0.5000, 0.2500],
             [0.2500, 1.5000]]])
    """
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return moment / level.where(level > 0, 1.0)


def damped_root(moment: Tensor, damping: float = DAMPING) -> Tensor | None:
    """Lower triangular S `(groups, n, n)` with S S^T = C + damping * mean(diag C) * I; None for a moment of zero.

    Where rounding leaves that indefinite, ten times as much is added, and so on.
    """
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((level > 0).all()):
        return None
    while True:
        damped = moment.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * level.unsqueeze(-1))
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return root
        damping *= 10


def energy(matrix: Tensor, moment: Tensor) -> float:
    """tr(W C W^T), summed over groups: E ||W x||^2."""
    return float(((matrix @ moment.to(matrix.dtype)) * matrix).sum(dtype=torch.float64))


def mean_shift(before: Tensor, after: Tensor, moments: InputMoments) -> Tensor:
    """What must be added to the bias so that the mean output stays, `(groups * outputs,)`."""
    reference = moments.mean if moments.reference_mean is None else moments.reference_mean
    wanted = before @ reference.to(before.dtype).unsqueeze(-1)
    given = after @ moments.mean.to(after.dtype).unsqueeze(-1)
    return (wanted - given).flatten()


def column_moment(moment: Tensor, width: int) -> Tensor:
    """Of moments over windows (inputs * height * width) those of single columns, `(groups, in * h, in * h)`, summed."""
    groups, n = moment.shape[0], moment.shape[1] // width
    return moment.reshape(groups, n, width, n, width).diagonal(dim1=2, dim2=4).sum(-1)
