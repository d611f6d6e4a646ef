"""The training form of quantized layers: a float master weight, fake-quantized in the forward or kept for later.

Both quantization methods use these kinds. Post-training quantization runs them in floating point, where they only
remember what calibration has measured; quantization-aware training rounds. `finalized` gives the integer form.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pquant_lightning.core.affine import (
    Grid,
    affine_scale,
    blocks,
    dequantize,
    fake_quantize_activation,
    fake_quantize_weight,
    learned_fake_quantize_activation,
    learned_fake_quantize_weight,
    learned_grid,
    make_grid,
    mse_scale,
    unblock,
)
from pquant_lightning.core.calibration import InputStatistics
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage
from pquant_lightning.core.errors import CheckpointError
from pquant_lightning.methods.quantization import _integer
from pquant_lightning.methods.quantization._forms import (
    FLOAT,
    Conv1dForm,
    Conv2dForm,
    Conv3dForm,
    ConvTranspose1dForm,
    ConvTranspose2dForm,
    ConvTranspose3dForm,
    LinearForm,
    describe,
    layer_config,
)
from pquant_lightning.methods.quantization._grids import Rounded, code_bits, nearest_codes, weight_grid

_ROUNDED = ("rounded_codes", "rounded_scale", "rounded_zero")  # in a state dict, where there is a rounded weight
RANGE_MOMENTUM = 0.01  # of the moving average of the inputs' minimum and maximum, as in torch's observers


class QuantLayer(CompressedLayer, stage=Stage.QUANTIZE):
    """Base of the training form. What its spec says:

    * `bits`, `act_bits`: of weights and inputs in the end; 16 leaves them alone. `code_bits`: of the weight's codes
      where they are fewer than those that it is stored in. `act`: "static" or "dynamic" grids, or
      None for inputs in floating point. `kernel`: "integer", or why not.
    * `trains`: whether the forward rounds. `weight_quantizer`: "ste", or "lsq" with a learned `weight_scale`
      `(channels, 1)`. `act_quantizer`: "ste" over a moving `act_range`, or "lsq" or "pact" with a learned `act_scale`.
    * `range`: "max", "mse" or "hqq", how the grid of weights that learn none is found; `zero_point`: whether it has
      one. `group_size`: values that share a scale. `rounding`: "nearest", or the name of what gives `rounded`.
    * `norm`: path, from this layer, of the batch norm to be folded in. `correct_bias`: whether `act_mean` is kept.
    * `schedule`: of training, see `QATCompression`; where bits change over it, those in force are in `active_bits`.
    * `scale_lr`: learning rate of learned scales, relative to that of the weights.

    Attributes:
        act_range: float32 `(2,)`, minimum and maximum of the inputs; (inf, -inf) before they are known.
        act_mean: float32 `(in,)`, mean of the inputs per channel.
        output_range: float32 `(2,)`, minimum and maximum of the outputs, after the norm that is to be folded in, of
            convolutions that do not train: integer runtimes round what they put out.
        active_bits: float32 `(2,)`, bits of weights and inputs that are in force.
        act_scale: `(1,)`, learned; 0 before it is known.
        act_zero: `(1,)`, zero point, learned with LSQ.
    """

    axis: ClassVar[int]  # the channel dimension of the weight
    float32_tensors = ("act_range", "act_mean", "output_range", "active_bits", "weight_scale", "act_scale", "act_zero")
    resizable = True
    input_tensors = ("act_mean",)
    output_tensors = ("weight_scale",)
    deployed_type: ClassVar[type[_integer.IntLayer]]
    weight: Tensor
    weight_scale: Tensor
    act_range: Tensor
    act_mean: Tensor
    output_range: Tensor
    active_bits: Tensor
    act_scale: Tensor
    act_zero: Tensor
    _bits: tuple[int, int]
    _cache: Any
    _known: bool | None
    observing: bool  # whether training moves `act_range`
    first_range: tuple[float, float] | None  # what a learned input scale starts from, where no calibration has said it
    meets: bool  # whether `meet` moves it, after each step in all processes, and not each forward in this one
    seen: Tensor | None  # (2,): -minimum and maximum of the inputs since the processes have met
    unmet: bool  # whether the range is one that this process alone has seen
    refused: bool  # whether inputs were not finite, and the range has not taken them
    told: bool  # whether that has been said
    is_rescaled: bool  # whether factors have been moved into or out of the weight since it was made or loaded
    outdated: bool  # whether weights from before that have been loaded, for which no range is known
    folded: tuple[Tensor, Tensor] | None  # factor and shift of the norm to be folded in, while the model is deployed
    rounded: Rounded | None  # the weight as calibration has rounded it; until the weight is trained again

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        if any(spec[name] not in (*range(2, 9), FLOAT) for name in ("bits", "act_bits")):
            raise ValueError(f"bits are 2 to 8 or 16, got {spec['bits']!r} and {spec['act_bits']!r}")
        layer = cls(**layer_config(spec))
        layer.observing = True
        layer.first_range = None
        layer.meets = layer.unmet = layer.refused = layer.told = False
        layer.seen = None
        layer.is_rescaled = layer.outdated = False
        layer.folded = None
        layer.rounded = None
        layer._bits = (spec["bits"], spec["act_bits"]) if spec["trains"] else (FLOAT, FLOAT)
        layer._cache = None
        layer._known = None
        if spec["weight_quantizer"] == "lsq":
            layer.weight_scale = nn.Parameter(torch.empty(layer.weight.shape[cls.axis], 1))
        if spec["act"] == "static":
            unknown = torch.tensor([torch.inf, -torch.inf], dtype=torch.float32, device="cpu")
            if spec["act_quantizer"] == "ste":
                layer.register_buffer("act_range", unknown)
            else:
                layer.act_scale = nn.Parameter(torch.empty(1))
                zero = torch.zeros(1, dtype=torch.float32, device="cpu")
                if spec["act_quantizer"] == "lsq":
                    layer.act_zero = nn.Parameter(torch.empty(1))
                else:
                    layer.register_buffer("act_zero", zero)
            if not spec["trains"] and convolves_in_integers(spec):
                layer.register_buffer("output_range", unknown.clone())
        if spec["correct_bias"]:
            channels = spec["layer"].get("in_features") or spec["layer"]["in_channels"]
            layer.register_buffer("act_mean", torch.zeros(channels, dtype=torch.float32, device="cpu"))
        if spec["schedule"] and spec["schedule"]["moves"]:
            layer.register_buffer("active_bits", torch.tensor([FLOAT, FLOAT], dtype=torch.float32, device="cpu"))
            layer._bits = (FLOAT, FLOAT)
        return layer

    # -- forward -----------------------------------------------------------------------------------------------------

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input on its grid; unchanged before any range is known (a sanity check before the first batch)."""
        spec, bits = self.spec, self._bits[1]
        if spec["act"] != "static" or not spec["trains"]:
            return x
        if spec["act_quantizer"] != "ste":
            return self._learned_input(x, bits)
        exceeds = self.observe(x) if self.training and self.observing else True
        grid = None if bits == FLOAT else self.input_grid(bits)
        return x if grid is None else fake_quantize_activation(x, grid, exceeds)

    def _learned_input(self, x: Tensor, bits: int) -> Tensor:
        if not self.known and self.training and x.numel():
            low, high = (float(value) for value in torch.aminmax(x.detach()))
            self.first_range = low, high
            self.set_range(low, high)
        if bits == FLOAT or not self.known:
            return x + 0 * (self.act_scale + self.act_zero).sum() if self.training else x
        rounding = self.spec["act_quantizer"] == "lsq"
        return learned_fake_quantize_activation(x, self.act_scale, self.act_zero, bits, rounding)

    def observe(self, x: Tensor) -> bool:
        """Moves the range towards this batch's minimum and maximum; those that are not finite are left out.

        Where several processes train, `meet` does so for all of them.

        Returns:
            Whether a value may lie outside the range.
        """
        if x.numel() == 0:
            return False
        with torch.no_grad():
            low, high = torch.aminmax(x.detach())
            extremes = torch.stack([-low, high]).float()
            finite = extremes.isfinite().all()
            waits = extremes.is_cuda or torch.compiler.is_compiling()
            if not waits and not finite:
                self.refused = not self.told
                return True
            if self.meets:
                extremes = extremes.where(finite, -torch.inf)
                self.seen = extremes if self.seen is None else self.seen.maximum(extremes)
            if not (self.meets and self.known):
                self.unmet = self.meets  # a first batch is rounded by what this process sees
                self._move_range(extremes, finite)
            if waits:
                return True
            (batch_low, batch_high), (low, high) = (-extremes[0], extremes[1]), self.act_range.tolist()
            return bool(batch_low < min(low, 0.0) or batch_high > max(high, 0.0))

    def _move_range(self, extremes: Tensor, finite: Tensor) -> None:
        """Moves the range towards -minimum and maximum `(2,)`, if these are finite."""
        ends = torch.stack([-extremes[0], extremes[1]])
        if self.known:
            self.act_range.copy_(torch.where(finite, self.act_range.lerp(ends, RANGE_MOMENTUM), self.act_range))
        else:
            self.act_range.copy_(torch.where(finite, ends, self.act_range))
            self._known = True if finite.is_meta or torch.compiler.is_compiling() else bool(finite) or None

    def meet(self, extremes: Tensor) -> None:
        """Takes what all processes have seen since they last met, -minimum and maximum `(2,)`; -inf is nothing."""
        if self.unmet:
            self.act_range.copy_(self.act_range.new_tensor([torch.inf, -torch.inf]))
            self._known = None
        self._move_range(extremes, extremes.isfinite().all())
        self.seen, self.unmet = None, False

    @property
    def known(self) -> bool:
        """Whether the range of the inputs is known, by calibration or from a batch; on "meta", whether it may be."""
        if self._known is None:
            learned = hasattr(self, "act_scale")
            measured = self.act_scale if learned else getattr(self, "act_range", None)
            if measured is None or measured.is_meta:
                return True
            found = bool(measured != 0) if learned else bool(measured[0] <= measured[1])
            self._known = found or None
            return found
        return self._known

    def input_grid(self, bits: int) -> Grid | None:
        """The static grid of the inputs; None before it is known."""
        if not self.known or self.weight.is_meta:
            return None
        if hasattr(self, "act_scale"):
            return learned_grid(self.act_scale, self.act_zero, bits)
        if self.act_range.is_cuda or torch.compiler.is_compiling():
            return make_grid(*affine_scale(self.act_range[0], self.act_range[1], bits), bits)
        key = (*self.act_range.tolist(), bits)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, make_grid(*affine_scale(self.act_range[0], self.act_range[1], bits), bits))
        return self._cache[1]

    def _code_bits(self, bits: int) -> int:
        """Bits of the weight's codes while so many bits are in force."""
        return code_bits(self.spec) if bits == self.spec["bits"] else bits

    def quantized_weight(self) -> Tensor:
        """The weight on the grid in force."""
        bits = self._code_bits(self._bits[0])
        if self.training:
            self.rounded = None
        if hasattr(self, "weight_scale"):
            if bits == FLOAT:
                return self.weight + 0 * self.weight_scale.sum() if self.training else self.weight
            return learned_fake_quantize_weight(self.weight, self.weight_scale, bits, self.axis)
        return self.weight if bits == FLOAT else fake_quantize_weight(self.weight, bits, self.axis)

    def dense_weight(self) -> Tensor:
        if self.spec["trains"] or self.spec["bits"] == FLOAT:
            return self.quantized_weight()
        codes, scale, zero = self.weight_codes()
        return dequantize(codes, scale, self.axis, zero).to(self.weight.dtype)

    @property
    def bits_in_force(self) -> tuple[int, int]:
        """Bits of weights and inputs that the forward rounds to; 16 = not at all."""
        return self._bits

    # -- calibration and schedule ------------------------------------------------------------------------------------

    def miss_range(self) -> None:
        """The inputs have not been seen, and may never be."""
        self._known = self.spec["act"] != "static"

    def set_range(self, low: float, high: float) -> None:
        """Takes over a measured range of the inputs; PACT, with one clipping level, takes a signed one symmetric."""
        limits = torch.tensor([low, high], device=self.weight.device)
        with torch.no_grad():
            if not hasattr(self, "act_scale"):
                self.act_range.copy_(limits)
            else:
                if self.spec["act_quantizer"] == "pact" and low < 0:
                    limits = limits.abs().max() * torch.tensor([-1.0, 1.0], device=limits.device)
                bits = self.spec["act_bits"] if self._bits[1] == FLOAT else self._bits[1]  # of those in force
                scale, zero_point = affine_scale(limits[0], limits[1], bits)
                self.act_scale.copy_(scale)
                self.act_zero.copy_(zero_point)
        self._known = True
        self.outdated = False

    def set_statistics(self, found: InputStatistics, limits: tuple[float, float]) -> None:
        """Takes over what calibration has measured, and the range chosen from it."""
        if hasattr(self, "act_range") or hasattr(self, "act_scale"):
            self.set_range(*limits)
        if hasattr(self, "act_mean"):
            self.act_mean.copy_(found.mean)

    def rescaled(self) -> None:
        """Its weight has been scaled, together with that of its neighbours; what was found out before is stale."""
        self.is_rescaled = True
        self.rounded = None

    def set_bits(self, weight_bits: int, act_bits: int) -> None:
        """Puts bits in force: the weight's learned scale starts anew, the inputs' keeps its range."""
        old_weight, old_act = self._bits
        old_act = self.spec["act_bits"] if old_act == FLOAT else old_act
        with torch.no_grad():
            if hasattr(self, "weight_scale") and weight_bits not in (old_weight, FLOAT):
                self.weight_scale.copy_(mse_scale(blocks(self.weight, self.axis), self._code_bits(weight_bits)))
            if hasattr(self, "act_scale") and act_bits not in (old_act, FLOAT):
                ratio = (2**old_act - 1) / (2**act_bits - 1)
                self.act_scale.mul_(ratio)
                self.act_zero.div_(ratio)
            self.active_bits.copy_(torch.tensor([weight_bits, act_bits]))
        self._bits = (weight_bits, act_bits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}act_range")
        unmeasured = not self.spec["trains"] and stored is not None and bool(stored[0] > stored[1])
        self.outdated = unmeasured and self.is_rescaled
        if unmeasured and not self.is_rescaled and self.known:
            # a checkpoint from before the calibration at the end of fit: what has been measured since stays
            measured = ("act_range", "act_mean", "output_range")
            kept = {f"{prefix}{key}": getattr(self, key).clone() for key in measured if hasattr(self, key)}
            state_dict = {**state_dict, **kept}
        state_dict, self.rounded = self._stored_rounding(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_rescaled = False
        self._known = None
        if self.spec["trains"] and not self.weight.is_meta:
            self._known = self.known
        if hasattr(self, "active_bits") and not self.active_bits.is_meta:
            weight_bits, act_bits = (round(bits) for bits in self.active_bits.tolist())
            self._bits = (FLOAT if weight_bits > 8 else weight_bits, FLOAT if act_bits > 8 else act_bits)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        parts = {} if self.rounded is None else dict(zip(_ROUNDED, self.rounded, strict=True))
        destination.update({prefix + name: part for name, part in parts.items() if part is not None})

    def _stored_rounding(self, state_dict: dict[str, Any], prefix: str) -> tuple[dict[str, Any], Rounded | None]:
        """The state dict without the rounded weight, and that weight; the present one where the weights are the same.

        Raises:
            CheckpointError: it does not fit the layer.
        """
        names = [prefix + name for name in _ROUNDED]
        codes, scale, zero = (state_dict.get(name) for name in names)
        weight = state_dict.get(f"{prefix}weight")
        if codes is None or scale is None:
            known = self.rounded is not None and not self.weight.is_meta
            same = known and isinstance(weight, Tensor) and torch.equal(weight.to(self.weight), self.weight)
            return state_dict, self.rounded if same else None
        channels = self.weight.shape[self.axis]
        groups = self.weight.numel() // channels // (self.spec["group_size"] or self.weight.numel() // channels)
        grids = [scale] if zero is None else [scale, zero]
        wanted = (self.weight.shape, *[(channels, groups)] * len(grids))
        if tuple(map(tuple, wanted)) != tuple(tuple(part.shape) for part in (codes, *grids)):
            raise CheckpointError(f"The checkpoint is damaged: {names[0]!r} and its grid do not fit the layer's spec.")
        if (zero is None) == self.spec["zero_point"]:
            raise CheckpointError(f"The checkpoint is damaged: {names[2]!r} does not fit the layer's spec.")
        state_dict = {key: value for key, value in state_dict.items() if key not in names}
        return state_dict, Rounded(codes.clone(), scale.clone(), None if zero is None else zero.clone())

    def parameter_options(self) -> dict[str, dict[str, float]]:
        learned = [name for name in ("weight_scale", "act_scale", "act_zero") if name in self._parameters]
        return {name: {"lr": self.spec["scale_lr"], "weight_decay": 0.0} for name in learned}

    # -- deployment --------------------------------------------------------------------------------------------------

    def weight_codes(self) -> Rounded:
        """int8 codes of the weight's shape, and the grid."""
        if self.rounded is not None:
            (codes, scale, zero), device = self.rounded, self.weight.device
            return Rounded(codes.to(device), scale.to(device), None if zero is None else zero.to(device))
        values = blocks(self.weight.detach(), self.axis, self.spec["group_size"])
        if hasattr(self, "weight_scale"):
            scale = self.weight_scale.detach().float().abs().clamp_min(torch.finfo(torch.float32).tiny)
            codes, scale, zero = nearest_codes(values, (scale, None), code_bits(self.spec))
        else:
            codes, scale, zero = nearest_codes(values, weight_grid(values, self.spec), code_bits(self.spec))
        return Rounded(unblock(codes, self.weight.shape, self.axis).to(torch.int8), scale, zero)

    def follow_resized(self, kept: Mapping[int, Tensor]) -> None:
        """The rounded weight loses what the weight has lost; groups of inputs are no longer those it was rounded in."""
        group = self.spec["group_size"]
        if group is not None and set(kept) - {self.axis}:
            per_channel = self.weight.numel() // self.weight.shape[self.axis]
            rounding = "hqq" if self.rounded is not None else self.spec["rounding"]
            divides = per_channel % group == 0
            self.spec = {**self.spec, "rounding": rounding, "group_size": group if divides else None}
            self.rounded = None
        if self.rounded is None or self.weight.is_meta:
            self.rounded = None
            return
        codes, scale, zero = self.rounded
        for dim, indices in kept.items():
            codes = codes.index_select(dim, indices.to(codes.device))
        if self.axis in kept:
            rows = kept[self.axis].to(scale.device)
            scale, zero = scale[rows], None if zero is None else zero[rows]
        self.rounded = Rounded(codes, scale, zero)

    @property
    def deployable(self) -> bool:
        """Whether there are integers to deploy: not for 16-bit weights, nor where calibration never saw an input."""
        return bool(self.spec["bits"] < FLOAT and (self.known or self.spec["trains"]))

    def finalized(self) -> nn.Module:
        return _deploy(self) if self.deployable else self

    def described(self) -> str:
        if self._known is False and not self.deployable and self.spec["bits"] < FLOAT:
            return "floating point: calibration has not reached it"
        return describe(self.spec)


def convolves_in_integers(spec: dict[str, Any]) -> bool:
    """Whether the deployed layer is a convolution of integers on a static grid."""
    return spec["act"] == "static" and spec["kernel"] == "integer" and "kernel_size" in spec["layer"]


def _deploy(layer: QuantLayer) -> nn.Module:
    """The integer form: codes, scales, and a bias that holds bias correction and the folded norm.

    A scale per channel commutes with a factor per channel, so that folding a norm multiplies scales, not codes: the
    codes are those that training saw.
    """
    spec = layer.spec
    static = spec["act"] == "static" and layer.known
    grid = layer.input_grid(spec["act_bits"]) if static else None
    codes, scale, zero = layer.weight_codes()
    bias = getattr(layer, "bias", None)
    bias = None if bias is None else bias.detach().float()
    if spec["correct_bias"]:
        bias = _corrected(layer, dequantize(codes, scale, layer.axis, zero), bias)
    if layer.folded is not None:
        factor, shift = layer.folded
        bias = shift if bias is None else bias * factor + shift
        codes, scale, zero = _multiplied(codes, scale, zero, factor, layer.axis)
    copied = ("by", "layer", "bits", "act_bits", "act", "group_size", "zero_point", "rounding", "kernel", "version")
    kept = {key: spec[key] for key in copied}
    if layer.rounded is None and spec["rounding"] not in ("nearest", "hqq", "awq"):
        kept["rounding"] = spec["range"]
    if spec["act"] == "static" and not static:
        kept.update(act_bits=FLOAT, act=None, kernel="dequantize: no input has been seen")
    dtype = str(layer.weight.dtype).removeprefix("torch.")
    extra = {"kind": layer.deployed_type.kind, "has_bias": bias is not None, "dtype": dtype}
    extra["output_range"] = hasattr(layer, "output_range")
    carried: dict[str, Any] = {key: spec[key] for key in ("sensitivity", "measured_on") if key in spec}
    final: Any = CompressedLayer.build({**kept, **carried, **extra}, layer)
    final.set_values(codes, scale, zero, bias, grid)
    if hasattr(layer, "output_range"):
        final.output_range.copy_(layer.output_range)
    if hasattr(layer, "weight_scale"):
        final.derived_tensors = ()  # its codes follow from the learned scale too
    return final


def _multiplied(
    codes: Tensor, scale: Tensor, zero: Tensor | None, factor: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of the weight times a factor per channel; a negative one mirrors the codes."""
    mirrored = (factor < 0).reshape([-1 if d == axis else 1 for d in range(codes.dim())])
    turned = codes.neg() if zero is None else codes.bitwise_not()  # -c, or -1 - c, which keeps to the range of codes
    if zero is not None:
        zero = torch.where(factor[:, None] < 0, -1 - zero, zero)
    return torch.where(mirrored, turned, codes), scale * factor.abs()[:, None], zero


def _corrected(layer: Any, rounded: Tensor, bias: Tensor | None) -> Tensor:
    """The bias that makes the mean output what it was: + (W - W') E[x].

    References:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, equation 12.
    """
    lost = layer.weight.detach().float() - rounded
    per_channel = lost.flatten(2).sum(2) if lost.dim() > 2 else lost  # (out, in / groups)
    mean = layer.act_mean.to(lost.device)
    groups = getattr(layer, "groups", 1)
    error = torch.einsum(
        "goi,gi->go", per_channel.unflatten(0, (groups, -1)), mean.unflatten(0, (groups, -1))
    ).flatten()
    return error if bias is None else bias + error


class _Computing(QuantLayer):
    """A layer with inputs."""

    compute: Any

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        result: Tensor = self.compute(self.quantized_input(x), self.quantized_weight(), self.bias, *args)
        return result


class QuantLinear(_Computing, LinearForm, kind="quant_linear"):
    """Linear in training form; `weight` (out, in) is the float master weight."""

    deployed_type = _integer.IntLinear


class QuantConv1d(_Computing, Conv1dForm, kind="quant_conv1d"):
    """Conv1d in training form."""

    deployed_type = _integer.IntConv1d


class QuantConv2d(_Computing, Conv2dForm, kind="quant_conv2d"):
    """Conv2d in training form."""

    deployed_type = _integer.IntConv2d


class QuantConv3d(_Computing, Conv3dForm, kind="quant_conv3d"):
    """Conv3d in training form."""

    deployed_type = _integer.IntConv3d


class QuantConvTranspose1d(_Computing, ConvTranspose1dForm, kind="quant_conv_transpose1d"):
    """ConvTranspose1d in training form."""

    deployed_type = _integer.IntConvTranspose1d


class QuantConvTranspose2d(_Computing, ConvTranspose2dForm, kind="quant_conv_transpose2d"):
    """ConvTranspose2d in training form."""

    deployed_type = _integer.IntConvTranspose2d


class QuantConvTranspose3d(_Computing, ConvTranspose3dForm, kind="quant_conv_transpose3d"):
    """ConvTranspose3d in training form."""

    deployed_type = _integer.IntConvTranspose3d


class QuantEmbedding(QuantLayer, nn.Embedding, kind="quant_embedding"):
    """Embedding in training form: only the rows looked up are rounded, each on its own scale; indices stay indices."""

    axis = 0
    deployed_type = _integer.IntEmbedding

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.Embedding.forward(self, x)
        bits = self._bits[0]
        return rows if bits == FLOAT else fake_quantize_weight(rows.reshape(-1, self.embedding_dim), bits).view_as(rows)


TRAINING_KINDS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Embedding: QuantEmbedding,
}
