"""Layers that describe themselves: kinds, their specs in the state dict, and the rebuild of a model from specs."""

import json
import logging
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, Self, TypeGuard

import torch
from torch import Tensor, nn

from pquant_lightning.core._private import MODULE_HOOKS
from pquant_lightning.core.compiled import plain_name, rename_to_plain, unwrap
from pquant_lightning.core.errors import CheckpointError, PQuantError, counted, known
from pquant_lightning.core.layer_adapter import ATTRIBUTES, as_torch, attribute_of, build_layer, full_name
from pquant_lightning.core.load_checks import check_same_layer, separate_ties
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.structure import absolute_path, arrange, tensor_at
from pquant_lightning.core.surgery import materialize, replace_layer

log = logging.getLogger(__name__)

SPEC_VERSION = 1
CARRIED = ("original", "group", "adapted")  # what a spec knows of the model's own code, whichever layer stands there
_EXTRA = "_extra_state"


class Stage(IntEnum):
    """The one order in which methods act, for callbacks and pipelines.

    `UNFUSE` is that of no method: of layers that have only been taken apart, for methods to look inside.
    """

    UNFUSE = 0
    FACTORIZE = 1
    ADAPT = 2
    MASK = 3
    QUANTIZE = 4


def _keep_slow_path(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing: with any hook present, `nn.TransformerEncoderLayer` calls its layers
    instead of reading their `.weight` in its eval fast path, which would bypass a compressed layer silently."""


class CompressedLayer(nn.Module):
    """A layer put in by this library; a *kind* is a concrete subclass, registered by name as a class keyword.

    It carries its structure, the spec, as JSON in its extra state: a state dict alone says how to rebuild the model.
    Read from outside it is the ordinary layer of its spec: it has that one's `in_features`, `stride`, `padding_idx`.

    Args (class keywords):
        kind: the name in the spec; None for a shared base.
        stage: when it is applied; methods of the same or an earlier stage leave it alone.

    Attributes:
        spec: the structure; `kind`, `by`, `layer` (the ordinary layer it stands for), the kind's own entries, and where
            channels have been taken out of the model: `original` (that layer as the model's own code makes it) and, in
            one of its layers, `group` (see `core/structure.py`). `adapted` is the type in the model's own code where
            that holds other tensors than the ordinary layer, which then cannot stand there without a spec.
    """

    kinds: ClassVar[dict[str, type["CompressedLayer"]]] = {}
    kind: ClassVar[str]
    stage: ClassVar[Stage]
    deployed: ClassVar[bool] = False
    unfolds: ClassVar[bool] = False  # gives way to the ordinary layer again where a file holds that one
    wraps: ClassVar[str | None] = None  # the child that stands for the replaced layer, in the same or another form
    float32_tensors: ClassVar[tuple[str, ...]] = ()  # own parameters and buffers that stay float32 when cast
    parameter_buffers: ClassVar[tuple[str, ...]] = ()  # former parameters that a deployed form keeps as buffers
    derived_tensors: ClassVar[tuple[str, ...]] = ()  # functions of `weight` alone: shared where the weight was
    resizable: ClassVar[bool] = False  # may lose input and output channels; `layer` in the spec then says so
    input_tensors: ClassVar[tuple[str, ...]] = ()  # own tensors with one entry per input channel, in dimension 0
    output_tensors: ClassVar[tuple[str, ...]] = ()  # likewise per output channel
    tied_parameters: ClassVar[tuple[str, ...]] = ()  # of its layers, as "layer.weight": a spec may tie them to others
    spec: dict[str, Any]

    def __init_subclass__(cls, kind: str | None = None, stage: Stage | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if stage is not None:
            cls.stage = stage
        if kind is not None:
            holder = CompressedLayer.kinds.setdefault(kind, cls)
            if holder.__qualname__ != cls.__qualname__:
                raise PQuantError(f"The kind {kind!r} is already taken by {holder.__name__}; choose another name.")
            CompressedLayer.kinds[kind] = cls
            cls.kind = kind

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        """Structure only; called under `torch.device("meta")`. Buffers with a start value name their device."""
        raise NotImplementedError(f"{cls.__name__}.from_spec")

    def follow_resized(self, kept: Mapping[int, Tensor]) -> None:
        """Called when indices have been taken out of the weight; `kept` are those that stay, by dimension."""

    def finalized(self) -> nn.Module:
        """The deployed form of this layer; a new layer, or itself where nothing changes. Inner kinds are final."""
        return self

    def derivation(self) -> tuple[Any, ...]:
        """What the `derived_tensors` follow from besides the weight; where values are not known, equal ones tell."""
        return ()

    def dense_weight(self) -> Tensor:
        """The weight of the ordinary layer that this one stands for, same shape."""
        weight = self.weight
        assert isinstance(weight, Tensor)
        return weight

    def count_in(self, name: str) -> int:
        """Parameters that one of the `parameter_buffers` holds; more than its numbers where it is packed."""
        return self.get_buffer(name).numel()

    def left_out_bytes(self) -> int:
        """Bytes that a file does not store because the spec says that so many values are zero."""
        return 0

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Own parameters that want a group of their own in the optimizer: `lr` (a factor), and maybe `weight_decay`."""
        return {}

    def kernel_for(self, x: Tensor) -> str | None:
        """What computes inputs like this one on this machine; None where torch's own operations do."""
        return None

    def described(self) -> str:
        """The method and its parameters in a few words, for tables."""
        return self.kind

    @staticmethod
    def build(spec: dict[str, Any], replaced: nn.Module | None) -> "CompressedLayer":
        """Makes the layer a spec describes: the only way in which kinds come to be.

        Args:
            spec: its structure; stored in the layer.
            replaced: the layer whose place it takes: parameters of equal name and shape are taken over.

        Raises:
            PQuantError: the spec names no registered kind.
        """
        kind = find_kind(spec.get("kind"))
        ordinary = replaced if replaced is None else (as_torch(replaced) or replaced)
        if isinstance(replaced, CompressedLayer):
            spec = {**{key: replaced.spec[key] for key in CARRIED if key in replaced.spec}, **spec}
        elif replaced is not None and ordinary is not None and not _same_tensors(replaced, ordinary):
            spec = {"adapted": full_name(type(replaced)), **spec}
        with torch.device("meta"):
            layer = kind.from_spec(spec, ordinary)
        layer.spec = json.loads(json.dumps({"version": SPEC_VERSION, **spec}))
        layer.register_forward_pre_hook(_keep_slow_path)
        materialize(layer, ordinary)
        return layer

    def get_extra_state(self) -> Tensor:
        """The spec as a uint8 tensor of JSON text, shape `(bytes,)`."""
        text = json.dumps(self.spec, sort_keys=True, separators=(",", ":"))
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to do: the pre-hook has rebuilt the layer from this state before any weight is loaded."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        own = {**dict(self.named_buffers(recurse=False)), **dict(self.named_parameters(recurse=False))}
        kept = {name: own[name].data for name in self.float32_tensors if name in own}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                after.data = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return self.described()


def _of_ordinary(name: str) -> property:
    """An attribute of the ordinary layer: the value that the class or the user has set, else what the spec says."""

    def get(self: CompressedLayer) -> Any:
        own = self.__dict__
        if name in own:
            return own[name]
        if name in own["_modules"]:  # a child of that name
            return own["_modules"][name]
        return attribute_of(own["spec"].get("layer", {}) if "spec" in own else {}, name)

    def set_own(self: CompressedLayer, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, set_own, doc=f"`{name}` of the ordinary layer that this one stands for.")


# a model's own code may read them: transformers' MobileNet the stride, Mamba the kernel_size of a convolution
for _name in ATTRIBUTES:
    setattr(CompressedLayer, _name, _of_ordinary(_name))


def _same_tensors(layer: nn.Module, ordinary: nn.Module) -> bool:
    """Whether both hold the same parameters under the same names."""
    mine, others = dict(layer.named_parameters()), dict(ordinary.named_parameters())
    return mine.keys() == others.keys() and all(others[name] is parameter for name, parameter in mine.items())


def drop_user_hooks(twin: nn.Module) -> None:
    """Takes the forward hooks off a copy that is run for counting only; ours stay."""
    for module in twin.modules():
        for table in MODULE_HOOKS:
            hooks = module.__dict__[table]
            for key in [key for key, hook in hooks.items() if hook is not _keep_slow_path]:
                del hooks[key]


def allow_fast_path(layer: nn.Module) -> None:
    """Takes our own hook off an ordinary layer that stands where one of ours was."""
    for table in MODULE_HOOKS:
        hooks = layer.__dict__[table]
        for key in [key for key, hook in hooks.items() if hook is _keep_slow_path]:
            del hooks[key]


def find_kind(name: object) -> type[CompressedLayer]:
    """The kind of that name; where it is unknown, installed packages that announce methods are imported first.

    Raises:
        PQuantError: no kind has that name.
    """
    if str(name) not in CompressedLayer.kinds:
        CompressionMethodRegistry.load_announced()
    if not isinstance(name, str) or name not in CompressedLayer.kinds:
        raise PQuantError(
            f"unknown kind of compressed layer {name!r}. {known(name, CompressedLayer.kinds)} If it comes from another "
            "package, import that package first."
        )
    return CompressedLayer.kinds[name]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of an ordinary layer, or the one that a compressed layer stands for."""
    weight = layer.dense_weight() if isinstance(layer, CompressedLayer) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def compressed_layers(model: nn.Module, *, outermost: bool = False) -> dict[str, CompressedLayer]:
    """The compressed layers by name, outer before inner; a layer used twice appears under its first name."""
    found: dict[str, CompressedLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
            if not (outermost and inside):
                found[name] = module
    return found


def changed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The outermost compressed layers by name; of those that have only been taken apart, the ones inside."""
    found: dict[str, CompressedLayer] = {}
    for name, layer in compressed_layers(model).items():
        if layer.stage is not Stage.UNFUSE and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found[name] = layer
    return found


def decode_spec(state: Any) -> dict[str, Any] | None:
    """The spec in a layer's extra state; None for anything else (a user's own extra state)."""
    if not (isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1):
        return None
    try:
        spec = json.loads(plain_name(bytes(state.tolist()).decode()))
    except ValueError:
        return None
    return spec if isinstance(spec, dict) and "kind" in spec else None


def read_specs(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """The specs in a state dict by layer name, outermost first.

    Raises:
        CheckpointError: a spec is of a newer version than this release reads.
    """
    specs = {}
    for key, value in state_dict.items():
        if key.startswith(prefix) and key.endswith(f".{_EXTRA}") and (spec := decode_spec(value)) is not None:
            specs[plain_name(key[len(prefix) : -len(_EXTRA) - 1])] = spec
    for name, spec in specs.items():
        if spec.get("version") != SPEC_VERSION:
            raise CheckpointError(
                f"Layer {name!r} of the checkpoint has a spec of version {spec.get('version')!r}; this release reads "
                f"version {SPEC_VERSION}. Install the release of pquant_lightning that wrote it."
            )
    return dict(sorted(specs.items(), key=lambda item: item[0].count(".")))


def rebuild(
    root: nn.Module, specs: Mapping[str, dict[str, Any]], state_dict: Mapping[str, Any], prefix: str = ""
) -> None:
    """Gives the model the structure that the specs describe, before the weights are loaded.

    Layers that have it already are kept, parameters of equal name and shape are taken over.

    Raises:
        CheckpointError: the specs do not fit the model or the tensors beside them.
    """
    stale = _layers_plain_in_file(root, specs, state_dict, prefix)
    if stale:
        name, layer = next(iter(stale.items()))
        raise CheckpointError(
            f"The checkpoint holds {counted(len(stale), 'uncompressed layer')}, compressed in this model; the first is "
            f"{name!r} ({layer.described()}). Load it into the uncompressed model first, then compress: fit without "
            "ckpt_path, or compress_model(model, ...) after load_state_dict."
        )
    unfolded = _unfolded(root, specs, state_dict, prefix)
    resized = _check_groups(root, specs, state_dict, prefix)
    changed = {
        absolute_path(name, path): attributes
        for name, spec in specs.items()
        for path, attributes in spec.get("group", {}).get("attributes", {}).items()
    }
    layers: dict[str, CompressedLayer] = {}  # of the file, as the model will have them
    pending: dict[str, CompressedLayer] = {}  # nothing is put into the model before everything has been checked
    owners: dict[int, str] = {}
    aliases: list[str] = []  # further names of a layer that is used in several places
    for name, spec in specs.items():
        if any(name.startswith(f"{alias}.") for alias in aliases):
            continue
        outer = next((other for other in pending if name.startswith(f"{other}.")), None)
        holder, own_name = (root, name) if outer is None else (pending[outer], name[len(outer) + 1 :])
        existing = _existing(holder, own_name, name)
        if _fits(existing, name, spec, specs):
            layers[name] = existing
            continue
        if outer is None and specs[owners.setdefault(id(existing), name)] == spec and owners[id(existing)] != name:
            aliases.append(name)
            layers[name] = pending[owners[id(existing)]]
            continue
        if outer is None:
            check_same_layer(name, spec, existing, type(root).__name__, changed.get(name, {}))
        layers[name] = layer = _build_checked(name, spec, existing, specs, state_dict, prefix, resized)
        if outer is None:
            pending[name] = layer
        else:
            replace_layer(holder, own_name, layer)
    ties = _ties(layers)
    for name, ordinary in unfolded.items():
        replace_layer(root, name, ordinary)
        allow_fast_path(ordinary)
    replaced = [(replace_layer(root, name, layer), layer) for name, layer in pending.items()]
    restored = sum(getattr(old, "deployed", False) and not new.deployed for old, new in replaced)
    if restored:
        log.info(
            "The file that is loaded holds a training form: finalized layers become trainable again (%d).", restored
        )
    for holder, own, shared in ties:
        setattr(holder, own, shared)
    for name, spec in specs.items():
        if "group" in spec:
            arrange(root, name, spec["group"], "now", skip=changed_layers(root))


def _check_groups(
    root: nn.Module, specs: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str
) -> dict[str, list[int]]:
    """The shapes that groups give to tensors by name, compared with the file's before anything changes."""
    shapes = {}
    for name, spec in specs.items():
        try:
            for path, both in spec.get("group", {"tensors": {}})["tensors"].items():
                tensor, now = absolute_path(name, path), both["now"]
                inside = any(tensor.startswith(f"{other}.") for other in specs)
                stored = state_dict.get(f"{prefix}{tensor}")
                if not ((inside and stored is None) or (isinstance(stored, Tensor) and list(stored.shape) == now)):
                    raise ValueError(f"{tensor!r} of shape {now} is not in the file")
                if not inside:
                    tensor_at(root, tensor)
                shapes[tensor] = now
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The group in the spec of layer {name!r} is damaged: {error!r}.") from error
    return shapes


def _existing(holder: nn.Module, own_name: str, name: str) -> nn.Module:
    try:
        return holder.get_submodule(own_name)
    except AttributeError:
        names = [other for other, _ in holder.named_modules() if other]
        raise CheckpointError(
            f"The checkpoint holds a compressed layer {name!r} that this {type(holder).__name__} does not have; it "
            f"belongs to another model. {known(own_name, names)}"
        ) from None


def _fits(existing: nn.Module, name: str, spec: dict[str, Any], specs: Mapping[str, Any]) -> TypeGuard[CompressedLayer]:
    if not isinstance(existing, CompressedLayer) or existing.spec != spec:
        return False
    inner = [child for child in compressed_layers(existing) if child]
    return all(f"{name}.{child}" in specs for child in inner)


def _build_checked(
    name: str,
    spec: dict[str, Any],
    existing: nn.Module,
    specs: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    prefix: str,
    resized: Mapping[str, list[int]],
) -> CompressedLayer:
    """Builds a layer from a file's spec, after its shapes have been compared with the tensors in the file.

    A file is not trusted: a spec with absurd sizes must not make us allocate them.
    """
    try:
        kind = find_kind(spec["kind"])
    except PQuantError as error:
        raise CheckpointError(f"Layer {name!r} of the checkpoint: {error}") from error
    try:
        if "device" in spec.get("layer", ()):
            raise ValueError("a layer's device is that of the model, never that of a file")
        tied = spec.get("tied_to", {})
        known_ties = {*kind.derived_tensors, *kind.tied_parameters}
        if not (tied.keys() <= known_ties and all(isinstance(target, str) for target in tied.values())):
            raise ValueError(f"tied_to names a tensor for any of {known_ties}, got {tied}")
        with torch.device("meta"):
            structure = kind.from_spec(spec, as_torch(existing) or existing)
        structure.spec = spec
    except Exception as error:  # whatever a kind raises on a spec that it did not write
        raise CheckpointError(f"The spec of layer {name!r} in the checkpoint is damaged: {error!r}.") from error
    for key, tensor in structure.state_dict(keep_vars=True).items():
        stored = state_dict.get(f"{prefix}{name}.{key}")
        in_inner_kind = any(f"{name}.{key}".startswith(f"{other}.") for other in specs if other != name)
        if key.endswith(_EXTRA) or in_inner_kind:
            continue
        shape = torch.Size(resized.get(f"{name}.{key}", tensor.shape))
        if not isinstance(stored, Tensor) or stored.shape != shape:
            found = f"shape {tuple(stored.shape)}" if isinstance(stored, Tensor) else "no tensor"
            raise CheckpointError(
                f"The checkpoint is damaged: the spec of layer {name!r} calls for {key!r} of shape "
                f"{tuple(shape)}, the file holds {found}."
            )
    return CompressedLayer.build(spec, existing)


def _layers_plain_in_file(
    root: nn.Module, specs: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str
) -> dict[str, CompressedLayer]:
    """Layers compressed here that the file holds in plain form, and that no rebuilt ancestor will replace."""
    plain = {}
    for name, layer in compressed_layers(root, outermost=True).items():
        if not _may_unfold(layer) and _is_plain(name, specs, state_dict, prefix):
            plain[name] = layer
    return plain


def _may_unfold(layer: CompressedLayer) -> bool:
    """Whether the tensors of a file without a spec can be those of the ordinary layer that this one stands for."""
    return layer.unfolds and "adapted" not in layer.spec


def _is_plain(name: str, specs: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str) -> bool:
    covered = name in specs or any(name.startswith(f"{other}.") for other in specs)
    return bool(name) and not covered and any(key.startswith(f"{prefix}{name}.") for key in state_dict)


def _unfolded(
    root: nn.Module, specs: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str
) -> dict[str, nn.Module]:
    """Ordinary layers to put back where they were folded away, since the file holds them."""
    found = {}
    reference = next(root.parameters(), torch.empty(0))
    for name, layer in compressed_layers(root, outermost=True).items():
        if _may_unfold(layer) and _is_plain(name, specs, state_dict, prefix):
            found[name] = build_layer(layer.spec["layer"]).to(reference.device, reference.dtype)
    return found


def _ties(layers: Mapping[str, CompressedLayer]) -> list[tuple[nn.Module, str, Tensor]]:
    """Each tensor that a spec declares `tied_to` another layer's: its module, its name, the tensor to take its place.

    Raises:
        CheckpointError: the other is no tensor that is shared, of the same shape.
    """
    ties = []
    for name, layer in layers.items():
        for own, target in layer.spec.get("tied_to", {}).items():
            of_parts = own in layer.tied_parameters
            owner_name = _owner_of_part(target, layers) if of_parts else target.rpartition(".")[0]
            owner = layers.get(owner_name)
            if owner is None:  # in a part of the saved model that is not loaded
                continue
            path = target[len(owner_name) + 1 :]
            holder, attribute, mine = _tensor_at(layer, own)
            allowed = path in (owner.tied_parameters if of_parts else owner.derived_tensors)
            shared = _tensor_at(owner, path)[2] if allowed else None
            if of_parts and (
                mine is None or shared is None
            ):  # the part is deployed, and its own spec says what is tied
                continue
            if shared is None or mine is None or shared.shape != mine.shape:
                shape = None if mine is None else tuple(mine.shape)
                raise CheckpointError(
                    f"The spec of layer {name!r} in the checkpoint is damaged: {own!r} of shape {shape} is tied "
                    f"to {target!r}, which is no shared tensor of that shape."
                )
            ties.append((holder, attribute, shared))
    return ties


def _owner_of_part(target: str, layers: Mapping[str, CompressedLayer]) -> str:
    return next((n for n, layer in layers.items() if target in {f"{n}.{p}" for p in layer.tied_parameters}), "")


def _tensor_at(layer: nn.Module, path: str) -> tuple[nn.Module, str, Tensor | None]:
    """The module that holds a tensor of a layer, its name there, and the tensor if there is one."""
    module_name, _, attribute = path.rpartition(".")
    holder = layer.get_submodule(module_name)
    held = {**holder._parameters, **holder._buffers}  # a weight that is computed is none
    tensor = held.get(attribute)
    return holder, attribute, tensor if isinstance(tensor, Tensor) else None


def _load_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    from pquant_lightning.core.partial import complete  # it needs this module

    unwrap(module)
    rename_to_plain(state_dict)
    complete(module, state_dict, prefix)
    rebuild(module, read_specs(state_dict, prefix), state_dict, prefix)
    separate_ties(module, state_dict, prefix)


def is_hooked(model: nn.Module) -> bool:
    """Whether `install_hook` has been called on the model or on the one it is a copy of."""
    return "_pquant_hooked" in model.__dict__


def install_hook(model: nn.Module) -> None:
    """Makes `model.load_state_dict` rebuild compressed layers from the state dict; idempotent, survives copies."""
    unwrap(model)
    if not is_hooked(model):
        model.__dict__["_pquant_hooked"] = True
        model.register_load_state_dict_pre_hook(_load_hook)
