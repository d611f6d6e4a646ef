"""LoRA: the model is frozen, and small trained factors are added to the weights of its layers."""

import math
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, compressed_layers, weight_of
from pquant_lightning.core.compression_method import CompressionContext, LayerMethod, matches
from pquant_lightning.core.errors import ModelError, OptionError, known
from pquant_lightning.core.options import check_count
from pquant_lightning.core.plan import CompressionPlan, LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.low_rank._lora_init import orthonormal_factors, principal_factors, quantization_factors
from pquant_lightning.methods.low_rank._lora_layers import LORA_KINDS, LoRALayer

FROM_FILE = "load_adapter"  # who made the layers of an adapter that was read from a file


@CompressionMethodRegistry.register("lora")
class LoRACompression(LayerMethod):
    """Low-rank adapters on Linear, Conv and Embedding layers, float or deployed as integers; the rest is frozen.

    Options and defaults are those of PEFT without the prefix `lora_`. At the start the output is that of the model, bit
    for bit; with "loftq" up to rounding. `finalize` merges an adapter into a float weight, and keeps it apart where the
    layer below is quantized: the deployed output is the trained one.

    Args:
        r: rank of the adapters, a count. A layer whose full rank is lower gets that.
        alpha: the addition to a weight is `alpha / r * B A`.
        dropout: probability of a zero in an adapter's input; embeddings have none.
        init: "default": A random and B zero (of embeddings A is zero); "pissa": the principal singular vectors;
            "olora": the first rows of a QR decomposition; "loftq": what rounding to `loftq_bits` loses, for a model
            that is quantized after, e.g. by a QAT callback behind this one.
        use_dora: magnitudes of the weight's output channels are trained, too (DoRA).
        use_rslora: the addition is `alpha / sqrt(r) * B A`, which suits high ranks.
        rank_pattern: ranks of single layers: glob patterns over module names; the last one that matches counts.
        alpha_pattern: the same for alpha.
        bias: which biases train: "none", "all", or "lora_only", those of layers with an adapter.
        modules_to_save: glob patterns over module names; matching modules are trained as they are, without adapters.
        lr_ratio: learning rate of B relative to that of A (LoRA+ recommends 16); embeddings are left out.
        loftq_bits: bits that "loftq" rounds to, 2 to 8.
        loftq_iter: turns of rounding and decomposition of "loftq".
        adapter_only: checkpoints of the fit leave out the frozen weights and name the base they need; they resume in a
            model with those weights. Files of weights only stay whole.
        include: glob patterns over module names; only matching layers get an adapter. None means all.
        exclude: glob patterns over module names; matching layers get none.
        min_saving: adapters save nothing, so that any other value than 0 leaves all layers alone.

    Raises:
        OptionError: a value out of range, or "loftq" with adapter_only.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Kalajdzievski, "A Rank Stabilization
        Scaling Factor for Fine-Tuning with LoRA", 2023. Liu et al., "DoRA", 2024. Hayou et al., "LoRA+", 2024.

    >>> plan = LoRACompression(r=4).plan(nn.Sequential(nn.Linear(64, 32)))
    >>> plan.layers[0].spec["kind"], plan.layers[0].spec["r"]
    ('lora_linear', 4)
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    init: Literal["default", "pissa", "olora", "loftq"] = "default"
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    lr_ratio: float = 1.0
    loftq_bits: int = 4
    loftq_iter: int = 1
    adapter_only: bool = False
    min_saving: float = 0.0

    stage = Stage.ADAPT
    trains = True
    takes_deployed = True

    # -- options -----------------------------------------------------------------------------------------------------

    def validate_config(self) -> None:
        super().validate_config()
        own = type(self)
        check_count(own, "r", self.r, 1)
        check_count(own, "loftq_bits", self.loftq_bits, 2, 8)
        check_count(own, "loftq_iter", self.loftq_iter, 1)
        for pattern, rank in (self.rank_pattern or {}).items():
            check_count(own, f"rank_pattern[{pattern!r}]", rank, 1)
        scales = {"alpha": self.alpha, "lr_ratio": self.lr_ratio}
        scales |= {f"alpha_pattern[{pattern!r}]": value for pattern, value in (self.alpha_pattern or {}).items()}
        for name, value in scales.items():
            if not (value > 0 and math.isfinite(value)):
                raise OptionError(f"LoRACompression: {name} is a positive number, got {value}.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"LoRACompression: dropout is a probability in [0, 1), got {self.dropout}.")
        if self.init == "loftq" and self.adapter_only:
            raise OptionError(
                "LoRACompression: init='loftq' changes the weights below the adapters, which adapter_only leaves out. "
                "Use another init, or whole checkpoints."
            )

    @property
    def omits_frozen(self) -> bool:
        return self.adapter_only

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        plan = super().plan(model, context)
        self._check_patterns(plan, [name for name, _ in model.named_modules() if name])
        ranks = [entry.spec["r"] for entry in plan.layers]
        if ranks and max(ranks) < self.r and not self.rank_pattern:
            raise OptionError(
                f"LoRACompression: r={self.r} is above the full rank of every layer; the largest is {max(ranks)}, of "
                f"{plan.layers[ranks.index(max(ranks))].name!r}. Use a smaller r."
            )
        return plan

    def _check_patterns(self, plan: CompressionPlan, modules: list[str]) -> None:
        """A pattern that matches nothing, or an alpha or rank for a layer without an adapter, would do nothing."""
        reasons = {skip.name: skip.reason for skip in plan.skipped}
        layers = [entry.name for entry in plan.layers]
        names = list(dict.fromkeys([*modules, *layers, *reasons]))
        for option in ("modules_to_save", "rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option) or ():
                if not any(matches(name, pattern) for name in names):
                    raise ModelError(f"The {option} pattern {pattern!r} matches no layer. {known(pattern, names)}")
                if option != "modules_to_save" and not any(matches(name, pattern) for name in layers):
                    why = next((reason for name, reason in reasons.items() if matches(name, pattern)), "it is no layer")
                    raise OptionError(
                        f"LoRACompression: {option} names {pattern!r}, where no layer gets an adapter ({why}). Take "
                        "the pattern out, or include the layer."
                    )

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> dict[str, Any] | Skip:
        kind = LORA_KINDS.get(type(layer))
        if kind is None:
            return Skip(name, f"lora does not cover {type(layer).__name__}")
        if any(matches(name, pattern) for pattern in self.modules_to_save or ()):
            return Skip(name, "trained as it is (modules_to_save)")
        if getattr(layer, "max_norm", None) is not None:
            return Skip(name, "its max_norm rewrites the weight in the forward")
        assert isinstance(layer.weight, torch.Tensor)
        if self.init == "loftq" and layer.weight.is_meta:
            raise ModelError(
                f"init='loftq' needs float weights, and layer {name!r} holds integers. Use another init, or start from "
                "the float model: callbacks=[LoRACallback(init='loftq'), QATCallback(bits=4)]."
            )
        rank = self._rank(name, layer, kind)
        if isinstance(rank, Skip):
            return rank
        return {
            "kind": kind.kind,
            "r": rank,
            "alpha": _last_match(name, self.alpha_pattern, self.alpha),
            "dropout": self.dropout,
            "init": self.init,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
            "bias": self.bias,
            "modules_to_save": self.modules_to_save or [],
            "lr_ratio": self.lr_ratio,
        }

    def _rank(self, name: str, layer: nn.Module, kind: type[LoRALayer]) -> int | Skip:
        named = _last_match(name, self.rank_pattern, None)
        groups = getattr(layer, "groups", 1)
        assert isinstance(layer.weight, torch.Tensor)
        full = groups * min(kind.to_matrices(layer.weight.detach(), groups).shape[1:])
        rank = int(named or min(self.r, full))
        if rank > full:
            raise OptionError(
                f"LoRACompression: rank_pattern gives layer {name!r} the rank {rank}, above its full rank {full}. Use "
                "a smaller one."
            )
        if rank % groups and named is None:
            return Skip(
                name, f"the rank {rank} does not divide into its {groups} groups; name a multiple in rank_pattern"
            )
        if rank % groups:
            raise OptionError(
                f"LoRACompression: rank_pattern gives layer {name!r} the rank {rank}, which does not divide into its "
                f"{groups} groups. Give it a multiple: rank_pattern={{{name!r}: {groups}}}."
            )
        return rank

    # -- applying ----------------------------------------------------------------------------------------------------

    def fill(self, new: LoRALayer, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> None:
        if isinstance(old, CompressedLayer):
            new.base = old
        context.errors[plan.name] = 0.0
        if new.spec["init"] == "default":
            _fill_default(new)
        else:
            self._fill_from_weight(new, weight_of(old).detach())
        if new.spec["use_dora"]:
            new.lora_magnitude.copy_(new.channel_norms(new.sum_weight(new.base_weight())))

    def _fill_from_weight(self, new: LoRALayer, weight: torch.Tensor) -> None:
        rank, init = new.spec["r"] // new.groups, new.spec["init"]
        matrices = new.to_matrices(weight, new.groups)
        if init == "loftq":

            def back(product: torch.Tensor) -> torch.Tensor:
                return new.from_matrices(product, weight.shape)

            left, right = quantization_factors(
                weight, rank, self.loftq_bits, self.loftq_iter, lambda w: new.to_matrices(w, new.groups), back
            )
        else:
            left, right = (principal_factors if init == "pissa" else orthonormal_factors)(matrices, rank)
        if init != "olora":  # whose product is used with the scaling
            left, right = left / new.scaling**0.5, right / new.scaling**0.5
        new.set_factors(left, right)
        if new.start is not None:
            new.set_start(left, right)
        else:
            product = new.sum_weight(weight) - weight
            new.base.weight.sub_(product.masked_fill(weight == 0, 0))  # what has been pruned stays zero

    # -- training ----------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, state: dict[str, Any]) -> None:
        train_adapters(model)

    def applied_to(self, model: nn.Module, state: dict[str, Any], by: str) -> bool:
        return any(layer.spec["by"] == FROM_FILE for layer in adapters(model).values())


def _fill_default(new: LoRALayer) -> None:
    """A as torch starts a Linear layer and B zero; of embeddings A zero and B normal, as in PEFT."""
    if isinstance(new.base, nn.Embedding):
        new.lora_A.zero_()
        new.lora_B.normal_()
    else:
        nn.init.kaiming_uniform_(new.lora_A, a=math.sqrt(5))
        new.lora_B.zero_()


def _last_match(name: str, patterns: dict[str, Any] | None, default: Any) -> Any:
    return next((value for pattern, value in reversed((patterns or {}).items()) if matches(name, pattern)), default)


def adapters(model: nn.Module) -> dict[str, LoRALayer]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in compressed_layers(model).items() if isinstance(layer, LoRALayer)}


def train_adapters(model: nn.Module) -> None:
    """Freezes everything but the adapters and what their specs (`bias`, `modules_to_save`) let train; idempotent.

    Parameters with options of their own in the optimizer, such as learned scales of quantizers, stay as they are.
    """
    layers = adapters(model)
    biases = {layer.spec["bias"] for layer in layers.values()}
    kept = {pattern for layer in layers.values() for pattern in layer.spec["modules_to_save"]}
    trained: set[int] = set()
    for layer in layers.values():
        layer.merge(None)
        trained.update(id(p) for p in (layer.lora_A, layer.lora_B, getattr(layer, "lora_magnitude", None)))
        if layer.spec["bias"] == "lora_only":
            trained.add(id(layer.bias))
    for name, module in model.named_modules():
        if any(matches(name, pattern) for pattern in kept):
            trained.update(map(id, module.parameters()))
    for name, parameter in model.named_parameters():
        if "all" in biases and fnmatchcase(name.rpartition(".")[2], "*bias*"):
            trained.add(id(parameter))
    own = {
        id(layer.get_parameter(name))
        for layer in compressed_layers(model).values()
        for name in layer.parameter_options()
        if name in dict(layer.named_parameters(recurse=False))
    }
    for parameter in model.parameters():
        if id(parameter) not in own - trained:
            parameter.requires_grad_(id(parameter) in trained)


def merge_lora(model: nn.Module) -> nn.Module:
    """Lets every adapted layer use one weight with the adapter in it, as fast as before; in place, and undone exactly.

    The adapters stay, in the state dict as well, and each layer holds one more weight. `unmerge_lora`, a load and
    training mode go back to the adapters. `finalize` merges for good.

    Returns:
        The same model, in eval mode.

    Raises:
        ModelError: no layer has an adapter, one stands on integers or fake-quantized weights, or a merged weight is NaN
            or infinite; nothing is merged then.

    >>> from pquant_lightning import compress_model
    >>> net = compress_model(nn.Sequential(nn.Linear(8, 4)), "lora", r=2).eval()
    >>> unmerge_lora(merge_lora(net)) is net
    True
    """
    layers = _adapters_of(model)
    for name, layer in layers.items():
        if isinstance(layer.base, CompressedLayer):
            raise ModelError(
                f"The adapter of layer {name!r} stands on {layer.base.described()}, and merging it would round it: "
                "keep it apart. finalize(model) does, and its output is the trained one."
            )
    merged = {name: layer.dense_weight().detach() for name, layer in layers.items()}
    for name, weight in merged.items():
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"The adapter of layer {name!r} gives weights that are NaN or infinite; nothing was merged. Go back to "
                "an earlier checkpoint, and train with a smaller learning rate."
            )
    for name, layer in layers.items():
        layer.merge(merged[name])
    return model.eval()


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Undoes `merge_lora`, in place and exactly; returns the same model.

    Raises:
        ModelError: no layer has an adapter.
    """
    for layer in _adapters_of(model).values():
        layer.merge(None)
    return model


def _adapters_of(model: nn.Module) -> dict[str, LoRALayer]:
    found = adapters(model)
    if not found:
        raise ModelError(
            f"No layer of {type(model).__name__} has an adapter: compress_model(model, 'lora') or load_adapter adds "
            "them, and finalize has merged them for good."
        )
    return found
