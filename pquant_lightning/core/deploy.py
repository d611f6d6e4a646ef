"""From the training form to the deployed form and back: copies that share tensors, finalized layers, dense twins."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pquant_lightning.core._private import (
    COMPILED_PART,
    MODULE_TABLE,
    TENSOR_TABLES,
    is_compiled_wrapper,
    shallow_copy,
)
from pquant_lightning.core.adapted_layer import in_place_of_adapted
from pquant_lightning.core.compiled import forget_compiled
from pquant_lightning.core.compressed_layer import (
    CompressedLayer,
    allow_fast_path,
    changed_layers,
    compressed_layers,
)
from pquant_lightning.core.layer_adapter import build_layer
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.structure import arrange
from pquant_lightning.core.surgery import materialize, replace_layer

Model = TypeVar("Model", bound=nn.Module)

SPARSE_FROM = 0.9  # share of a tensor's bytes up to which a file stores only the values that are not zero


Shared = Mapping[str, Mapping[str, str]]  # layer -> own tensor -> the other layer's tensor that it is


def deploy(model: nn.Module, shared: Shared | None = None) -> None:
    """Gives every compressed layer its deployed form, in place: first what spans layers, then layer by layer.

    Args:
        model: changed in place.
        shared: see `iter_deployed`.
    """
    finalize_across_layers(model)
    for name, final in iter_deployed(model, shared):
        replace_layer(model, name, final)
        if not isinstance(final, CompressedLayer):
            allow_fast_path(final)


def finalize_across_layers(model: nn.Module) -> None:
    """Lets each registered method deploy what spans several layers, in the order of the stages."""
    staged = [method for method in CompressionMethodRegistry.loaded() if hasattr(method, "stage")]
    for method in sorted(staged, key=lambda method: method.stage):
        method.finalize(model)


def dense_form(model: nn.Module) -> nn.Module:
    """The uncompressed structure on "meta": every changed layer as the ordinary layer it stands for."""
    dense = share_copy(model, "meta")
    layers = changed_layers(dense)
    for name, layer in layers.items():
        ordinary: Any = build_layer(layer.spec.get("original", layer.spec["layer"]), device="meta")
        materialize(ordinary, layer)
        for target in layer.spec.get("tied_to", {}).values():
            owner: Any = dense.get_submodule(next((n for n in layers if target.startswith(f"{n}.")), name))
            if owner is not layer and owner.weight.shape == ordinary.weight.shape:
                ordinary.weight = owner.weight
        replace_layer(dense, name, ordinary)
    for name, layer in compressed_layers(model).items():
        if "group" in layer.spec:
            arrange(dense, name, layer.spec["group"], "before")
    return dense


def deployed_form(model: nn.Module, shared: Shared | None = None) -> nn.Module:
    """The deployed structure on "meta": the shapes and bytes of `finalize` without its work.

    Args:
        model: not changed.
        shared: what is known of the tensors that its layers share; see `iter_deployed`.
    """
    deployed = share_copy(model, "meta")
    deploy(deployed, shared)
    return deployed


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers that a state dict stores, each tensor once; specs are not counted."""
    state = module.state_dict(keep_vars=True)
    tensors = {id(t): t for key, t in state.items() if isinstance(t, Tensor) and not key.endswith("_extra_state")}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def sparse_count(tensor: Any) -> int | None:
    """How many values are not zero, where storing only those and one bit per value saves a tenth or more; else None.

    A tensor of nothing but zeros is where training starts from, not what it leaves, and is None as well.
    """
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.dim() < 2 or not tensor.numel():
        return None
    count = int(torch.count_nonzero(tensor))
    return (
        count if count and sparse_bytes(tensor, count) <= SPARSE_FROM * tensor.numel() * tensor.element_size() else None
    )


def sparse_bytes(tensor: Tensor, count: int) -> int:
    """Bytes of a tensor in a file that stores only `count` values of it, and one bit for every place."""
    return count * tensor.element_size() + -(-tensor.numel() // 8)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as uint8 `(ceil(values / 8),)`, the first value in the lowest bit."""
    return torch.from_numpy(numpy.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack_bits`."""
    values = numpy.unpackbits(bits.cpu().numpy(), count=shape.numel(), bitorder="little")
    return torch.from_numpy(values).bool().reshape(shape)


def count_params(module: nn.Module) -> int:
    """Numbers the model learns or derives its weights from: parameters and integer weights, each tensor once."""
    counts = {id(parameter): parameter.numel() for parameter in module.parameters()}
    for layer in compressed_layers(module).values():
        own = dict(layer.named_buffers(recurse=False))
        counts.update({id(own[name]): layer.count_in(name) for name in layer.parameter_buffers if name in own})
    return sum(counts.values())


def deployed_bytes(spec: dict[str, Any], layer: nn.Module) -> int:
    """Stored bytes that the layer would take in deployed form, were it replaced as the spec says."""
    new = CompressedLayer.build(spec, share_copy(layer, "meta"))
    return stored_bytes(_finalize_nested(new)) - new.left_out_bytes()


def iter_deployed(model: nn.Module, shared: Shared | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The outermost compressed layers and their deployed forms, one at a time; the model is not changed by this.

    What derives from one shared weight (`derived_tensors`) is one tensor again, and the spec says so (`tied_to`), where
    the values are equal: two layers may round their weight differently, or fold different norms into it.

    Args:
        model: training form or deployed form.
        shared: for a model on "meta", which tensors have turned out equal, as the specs say it. Without, those of
            layers that derive them alike are taken as equal, as in an estimate.
    """
    layers = compressed_layers(model)
    weights = {name: weight for name, layer in layers.items() if (weight := _own_weight(layer)) is not None}
    uses = Counter(map(id, weights.values()))
    owners: dict[int, tuple[str, CompressedLayer]] = {}
    for outer, layer in compressed_layers(model, outermost=True).items():
        deployed = _finalize_nested(layer)
        for name in [n for n in weights if n == outer or n.startswith(f"{outer}.")]:
            key = id(weights[name])
            final = deployed.get_submodule(name[len(outer) + 1 :]) if uses[key] > 1 else None
            if isinstance(final, CompressedLayer):
                owner_name, owner = owners.setdefault(key, (name, final))
                if owner is not final:
                    known = None if shared is None else shared.get(name, {})
                    _share_derived(final, owner_name, owner, known)
        yield outer, deployed


def _own_weight(layer: nn.Module) -> nn.Parameter | None:
    return next((p for name, p in layer.named_parameters(recurse=False) if name == "weight"), None)


def _finalize_nested(layer: CompressedLayer) -> nn.Module:
    """Innermost first, on a shell that shares the layer's tensors, so that the layer itself stays as it is."""
    inner = [name for name in compressed_layers(layer) if name]
    shell = share_copy(layer) if inner else layer
    for name in sorted(inner, key=lambda name: -name.count(".")):
        child = shell.get_submodule(name)
        assert isinstance(child, CompressedLayer)
        replace_layer(shell, name, child.finalized())
    final = shell.finalized()
    return in_place_of_adapted(final, layer.spec) if "adapted" in layer.spec else final


def _share_derived(
    final: CompressedLayer, owner_name: str, owner: CompressedLayer, known: Mapping[str, str] | None
) -> None:
    tied = {}
    for tensor_name in set(final.derived_tensors) & set(owner.derived_tensors):
        mine, other, path = getattr(final, tensor_name), getattr(owner, tensor_name), f"{owner_name}.{tensor_name}"
        if not isinstance(mine, Tensor) or not isinstance(other, Tensor) or other.shape != mine.shape:
            continue
        if not mine.is_meta:
            equal = torch.equal(other, mine)
        elif known is not None:
            equal = known.get(tensor_name) == path
        else:
            equal = final.derivation() == owner.derivation()
        if equal:
            setattr(final, tensor_name, other)
            tied[tensor_name] = path
    if tied:
        final.spec = {**final.spec, "tied_to": tied}


def with_plain_names(model: Model) -> Model:
    """The model, or where torch.compile has wrapped parts of it, a copy without it that shares all memory."""
    return share_copy(model) if any(is_compiled_wrapper(module) for module in model.modules()) else model


def share_copy(model: Model, device: str | None = None) -> Model:
    """A copy of the module tree that shares everything else: tensors (or their twins on `device`), attributes, hooks.

    It costs no memory and copies no user's attribute, and its layers can be replaced without touching the model. It is
    not compiled: what torch.compile has made would run the original.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def twin_of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or device is None:
            return tensor
        if id(tensor) not in tensors:
            if isinstance(tensor, DTensor):  # what this process holds of it stands for nothing
                moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            else:
                moved = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
        return tensors[id(tensor)]

    def clone(module: nn.Module) -> nn.Module:
        while is_compiled_wrapper(module):
            module = module.__dict__[MODULE_TABLE][COMPILED_PART]
        if id(module) not in modules:
            modules[id(module)] = twin = shallow_copy(module)
            forget_compiled(twin.__dict__)
            for table in TENSOR_TABLES:
                twin.__dict__[table] = {name: twin_of(t) for name, t in module.__dict__[table].items()}
            twin.__dict__[MODULE_TABLE] = {
                name: child if child is None else clone(child) for name, child in module.__dict__[MODULE_TABLE].items()
            }
        return modules[id(module)]

    return cast(Model, clone(model))
