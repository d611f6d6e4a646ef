"""Layers with an adapter: a frozen layer of any form, and beside it two small trained factors."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning.core._private import MODULE_HOOKS
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, weight_of
from pquant_lightning.core.layer_adapter import SUPPORTED, build_layer
from pquant_lightning.methods.low_rank._lora_linear import Factors, added_weight, addition, autocasts, lora_linear

Matrices = tuple[Tensor, Tensor]


class LoRALayer(CompressedLayer, stage=Stage.ADAPT):
    """Base of the kinds. The weight is that of `base` plus `scaling * (B A - B0 A0)`, with DoRA rescaled by channel.

    What its spec says:

    * `r`, `alpha`, `use_rslora`: rank and scaling. `dropout`: of the adapter's input. `use_dora`.
    * `init`: how the factors started; "pissa" and "olora" start with a product that is not zero and is taken off again.
    * `bias`, `modules_to_save`: what else trains. `lr_ratio`: learning rate of B relative to that of A.

    Attributes:
        base: the layer below: an ordinary one, or what another method has made of it.
        lora_A: `(r, in)`, in the layout of the kind.
        lora_B: `(out, r)`, in the layout of the kind.
        lora_magnitude: `(out,)`, the norms that the channels of the weight have, with DoRA.
        start_A: A0, of the shape of `lora_A`, where the factors did not start with a product of zero.
        start_B: B0.
    """

    wraps = "base"
    unfolds = True  # a file that holds the ordinary layer was merged
    outputs: ClassVar[int] = 0  # the dimension of the weight with the outputs
    base: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter
    start_A: Tensor
    start_B: Tensor
    scaling: float
    _merged: Tensor | None

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = cls()
        layer.base = build_layer(spec["layer"])
        rank = spec["r"]
        shape_a, shape_b = cls.factor_shapes(spec["layer"], rank)
        layer.lora_A, layer.lora_B = nn.Parameter(torch.empty(shape_a)), nn.Parameter(torch.empty(shape_b))
        if spec["use_dora"]:
            layer.lora_magnitude = nn.Parameter(torch.empty(layer.base.weight.shape[cls.outputs]))
        if spec["init"] in ("pissa", "olora"):
            layer.register_buffer("start_A", torch.empty(shape_a))
            layer.register_buffer("start_B", torch.empty(shape_b))
        layer.scaling = spec["alpha"] / (rank**0.5 if spec["use_rslora"] else rank)
        layer._merged = None
        return layer

    # -- the kind's own: shapes, matrices and the product with an input -----------------------------------------------

    @staticmethod
    def factor_shapes(layer: dict[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for the ordinary layer of that structure."""
        raise NotImplementedError

    @classmethod
    def to_matrices(cls, weight: Tensor, groups: int) -> Tensor:
        """The weight of the ordinary layer as `(groups, out, in)`, whose product of factors is added."""
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    @classmethod
    def from_matrices(cls, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `to_matrices`."""
        return matrices.reshape(shape)

    def adapted(self, x: Tensor) -> Tensor:
        """What the adapter adds for an input: `scaling * (B A - B0 A0) x`."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        """Groups of the layer, each with a rank of r / groups."""
        return int(self.spec["layer"].get("groups", 1))

    def factors(self, a: Tensor, b: Tensor) -> Matrices:
        """Factors in the kind's layout as `(groups, out, r)` and `(groups, r, in)`."""
        rank = self.spec["r"] // self.groups
        return b.reshape(self.groups, -1, rank), a.reshape(self.groups, rank, -1)

    @torch.no_grad()
    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Copies `(groups, out, r)` and `(groups, r, in)` into the factors."""
        self.lora_B.copy_(left.reshape(self.lora_B.shape))
        self.lora_A.copy_(right.reshape(self.lora_A.shape))

    def set_start(self, left: Tensor, right: Tensor) -> None:
        """Copies `(groups, out, r)` and `(groups, r, in)` into the initial factors, whose product is taken off."""
        self.start_B.copy_(left.reshape(self.lora_B.shape))
        self.start_A.copy_(right.reshape(self.lora_A.shape))

    # -- the weight ----------------------------------------------------------------------------------------------------

    @property
    def start(self) -> Factors | None:
        """The initial factors, where their product is not zero."""
        return (self.start_A, self.start_B) if "start_A" in self._buffers else None

    def base_weight(self) -> Tensor:
        """The weight of the layer below, as its forward uses it."""
        weight = weight_of(self.base)
        return weight.detach()

    def sum_weight(self, base: Tensor) -> Tensor:
        """`base + scaling * (B A - B0 A0)`, in the shape of the ordinary layer's weight."""
        left, right = self.factors(self.lora_A, self.lora_B)
        product = left @ right
        if self.start is not None:
            first_left, first_right = self.factors(*self.start)
            product = product - first_left @ first_right
        return base + self.from_matrices(product * self.scaling, base.shape).to(base.dtype)

    def channel_norms(self, weight: Tensor) -> Tensor:
        """Euclidean norm of each output channel of the weight, `(out,)`."""
        return torch.linalg.vector_norm(weight.movedim(self.outputs, 0).flatten(1), dim=1)

    def channel_factors(self, weight: Tensor) -> Tensor:
        """`lora_magnitude / norm of the channel`, `(out,)`; the norm is a constant for the gradient.

        References:
            Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, section 4.3.
        """
        norms = self.channel_norms(weight.detach()).to(self.lora_magnitude.dtype)
        return self.lora_magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)  # a channel may be zero

    def dense_weight(self) -> Tensor:
        weight = self.sum_weight(self.base_weight())
        if self.spec["use_dora"]:
            shape = [1] * weight.dim()
            shape[self.outputs] = -1
            weight = weight * self.channel_factors(weight).reshape(shape).to(weight.dtype)
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight with the adapter in it, computed; read-only."""
        return self.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer below."""
        found: Tensor | None = getattr(self.base, "bias", None)
        return found

    # -- forward -------------------------------------------------------------------------------------------------------

    @property
    def dropout(self) -> float:
        """Probability of a zero in the adapter's input, now: none in eval mode."""
        return float(self.spec["dropout"]) if self.training else 0.0

    @property
    def on_ordinary(self) -> bool:
        """Whether the layer below is an ordinary one, whose weight the forward may use without calling it."""
        hooked = any(self.base.__dict__[table] for table in MODULE_HOOKS)
        return type(self.base) in SUPPORTED and not hooked

    @property
    def merged_weight(self) -> Tensor | None:
        """The weight that the forward uses instead of the layer below and the adapter, while they are merged."""
        return None if self.lora_A.is_meta else self._merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            return self.with_weight(x, self.merged_weight)
        y: Tensor = self.base(x)
        dropped = self.dropped(x)
        added = self.adapted(self._cast(dropped)).to(y.dtype)
        if not self.spec["use_dora"]:
            return y + added
        return self._scaled(y, y if dropped is x else self.base(dropped), added)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer below with another weight."""
        raise NotImplementedError

    def dropped(self, x: Tensor) -> Tensor:
        """The adapter's input."""
        return F.dropout(x, self.dropout) if self.dropout > 0 else x

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.lora_A.dtype) if x.is_floating_point() and not autocasts(x) else x

    def _scaled(self, y: Tensor, seen: Tensor, added: Tensor | float) -> Tensor:
        """`y + (f - 1) (seen - bias) + f * added`, which is y, bit for bit, where f is 1 and nothing is added."""
        shape = (-1, *[1] * len(self.spec["layer"].get("kernel_size", ())))
        with torch.no_grad():
            weight = self.sum_weight(self.base_weight())
        factor = self.channel_factors(weight).reshape(shape).to(y.dtype)
        bias = self.bias
        product = seen if bias is None else seen - bias.reshape(shape)
        return y + (factor - 1) * product + factor * added

    # -- merged and deployed -------------------------------------------------------------------------------------------

    def merge(self, weight: Tensor | None) -> None:
        """From now on, until training, a load or None, the forward uses this weight and leaves the adapter alone."""
        self._merged = weight

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._merged = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._merged = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self._merged is not None:
            self._merged = fn(self._merged)
        return super()._apply(fn, recurse)

    def finalized(self) -> nn.Module:
        """The ordinary layer with the adapter in its weight; itself where the layer below is quantized."""
        if type(self.base) not in SUPPORTED:
            return self
        trained = self.base.weight.requires_grad
        merged: Any = build_layer(self.spec["layer"], device="meta")
        merged.weight = nn.Parameter(self.dense_weight().detach(), requires_grad=trained)
        if self.bias is not None:
            merged.bias = self.bias
        return merged.train(self.training)

    def parameter_options(self) -> dict[str, dict[str, float]]:
        return {"lora_B": {"lr": self.spec["lr_ratio"]}} if self.spec["lr_ratio"] != 1 else {}

    def described(self) -> str:
        name = "DoRA" if self.spec["use_dora"] else "LoRA"
        return f"{name} {self.spec['r']}"


class LoRALinear(LoRALayer, kind="lora_linear"):
    """Linear with an adapter: A `(r, in)`, B `(out, r)`."""

    @staticmethod
    def factor_shapes(layer: dict[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, layer["in_features"]), (layer["out_features"], rank)

    def sum_weight(self, base: Tensor) -> Tensor:
        if base.dtype != self.lora_A.dtype:
            return super().sum_weight(base)
        return added_weight(base, self.lora_A, self.lora_B, self.scaling, self.start)

    def adapted(self, x: Tensor) -> Tensor:
        return addition(x, self.lora_A, self.lora_B, self.scaling, self.start)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        fits = self.merged_weight is None and self.on_ordinary and x.dtype == self.lora_A.dtype
        if not fits or (self.spec["use_dora"] and self.dropout > 0):
            return super().forward(x)
        parts = (self.lora_A, self.lora_B, self.scaling, self.dropout, self.start)
        y = lora_linear(x, self.base.weight, self.base.bias, *parts)
        return self._scaled(y, y, 0.0) if self.spec["use_dora"] else y


class LoRAConv(LoRALayer, kind="lora_conv"):
    """Convolution with an adapter: A `(r, in/groups, k)` with the layer's geometry, then a pointwise B."""

    @staticmethod
    def factor_shapes(layer: dict[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups, kernel = layer["groups"], tuple(layer["kernel_size"])
        pointwise = (layer["out_channels"], rank // groups, *[1] * len(kernel))
        return (rank, layer["in_channels"] // groups, *kernel), pointwise

    def adapted(self, x: Tensor) -> Tensor:
        added = self._through(x, self.lora_A, self.lora_B)
        if self.start is not None:
            added = added - self._through(x, *self.start)
        return added * self.scaling

    def _through(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[b.dim() - 3]
        return convolve(self.base._conv_forward(x, a, None), b, groups=self.groups)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = self.base._conv_forward(x, weight, self.bias)
        return result


class LoRAEmbedding(LoRALayer, kind="lora_embedding"):
    """Embedding with an adapter: A `(r, num)` looked up by column, B `(dim, r)`; no dropout, as in PEFT."""

    outputs = 1

    @staticmethod
    def factor_shapes(layer: dict[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, layer["num_embeddings"]), (layer["embedding_dim"], rank)

    @classmethod
    def to_matrices(cls, weight: Tensor, groups: int) -> Tensor:
        return weight.t()[None]

    @classmethod
    def from_matrices(cls, matrices: Tensor, shape: torch.Size) -> Tensor:
        return matrices[0].t()

    def adapted(self, x: Tensor) -> Tensor:
        padding = self.spec["layer"]["padding_idx"]

        def through(a: Tensor, b: Tensor) -> Tensor:
            return F.linear(F.embedding(x, a.t(), padding), b)

        added = through(self.lora_A, self.lora_B)
        if self.start is not None:
            added = added - through(*self.start)
        return added * self.scaling

    def dropped(self, x: Tensor) -> Tensor:
        return x

    def parameter_options(self) -> dict[str, dict[str, float]]:
        return {}  # here it is A that starts at zero

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, self.spec["layer"]["padding_idx"])


LORA_KINDS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv,
    nn.Conv2d: LoRAConv,
    nn.Conv3d: LoRAConv,
    nn.Embedding: LoRAEmbedding,
}
