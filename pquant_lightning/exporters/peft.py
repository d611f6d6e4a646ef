"""Adapters in PEFT's format, `adapter_config.json` and `adapter_model.safetensors`: written and read without PEFT."""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pquant_lightning.backends.lowering.trace import Traced
from pquant_lightning.core.compressed_layer import CompressedLayer, compressed_layers, install_hook, weight_of
from pquant_lightning.core.compression_method import matches
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.errors import CheckpointError, ModelError, a_or_an, known
from pquant_lightning.core.layer_adapter import as_torch, build_layer, layer_spec
from pquant_lightning.core.partial import fingerprint, own_tensors, plain_name
from pquant_lightning.core.plan import LayerPlan
from pquant_lightning.core.serialization import atomic_file
from pquant_lightning.core.splitting import planned_splits, split_as_planned, split_view
from pquant_lightning.core.surgery import replace_layer
from pquant_lightning.exporters.base import Exporter, Run, run_in_torch
from pquant_lightning.exporters.safetensors import safetensors_types
from pquant_lightning.methods.low_rank._lora_layers import LORA_KINDS, LoRAConv, LoRAEmbedding, LoRALayer
from pquant_lightning.methods.low_rank.lora import FROM_FILE, adapters, train_adapters

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE, _NAME = "pquant_base", "pquant_model"  # in the header of the file with the weights
_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
_INITS = {"pissa": "pissa", "olora": "olora"}  # of PEFT that change the base in a way that can be found again
_OTHER_BASES = ("pissa_niter", "corda", "loftq", "lora_ga", "mica")
_UNREAD = ("lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora")
_COMMON = ("dropout", "bias", "use_dora", "use_rslora")


# -- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Writes the adapters of a model, and what else was trained, in PEFT's format; a few hundred kB.

    What a fit measures beside, the running statistics of norms, is written, too.
    `PeftModel.from_pretrained(base, path)` and `load_adapter(base, path)` read it. The names in the file are those of
    the modules inside `model`: give the module that the base is, e.g. `lightning_module.net`. An adapter that started
    as "pissa" or "olora" is written for the unchanged base, with twice its rank. The file says which base it needs.

    Args:
        model: with adapters, training form or deployed form.
        path: a directory; it is made.

    Returns:
        The directory.

    Raises:
        ModelError: no layer has an adapter, or they have different options where PEFT has one for all.
    """
    path, compressed = Path(path), compressed_layers(model)
    layers = {plain_name(name, compressed): layer for name, layer in adapters(model).items()}
    if not layers:
        raise ModelError(
            f"No layer of {type(model).__name__} has an adapter: compress_model(model, 'lora') adds them, and finalize "
            "has merged them for good."
        )
    config = _config(model, layers)
    tensors = {plain_name(name, compressed): buffer for name, buffer in _measured(model).items()}
    tensors.update(_also_trained(model, layers, config))
    for name, layer in layers.items():
        tensors.update({f"{name}.{own}": tensor for own, tensor in _to_peft(name, layer).items()})
    header = {"format": "pt", _BASE: _base_of(layers), _NAME: type(model).__name__}
    stored = {_PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.mkdir(parents=True, exist_ok=True)
    with atomic_file(path / WEIGHTS) as file:
        file.write(save(stored, header))
    with atomic_file(path / CONFIG) as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    return path


def _config(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """PEFT's LoraConfig as plain data."""
    common = {}
    for option in _COMMON:
        values = {layer.spec[option] for layer in layers.values()}
        if len(values) > 1:
            raise ModelError(f"The adapters have different {option}, {sorted(values)}; PEFT's format has one for all.")
        common[option] = values.pop()
    ranks = {name: layer.spec["r"] * (1 if layer.start is None else 2) for name, layer in layers.items()}
    alphas = {name: _alpha(layer) for name, layer in layers.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    patterns = {pattern for layer in layers.values() for pattern in layer.spec["modules_to_save"]}
    whole = [name for name, _ in model.named_modules() if name and any(matches(name, p) for p in patterns)]
    outermost = [name for name in whole if not any(name.startswith(f"{other}.") for other in whole)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(model, list(layers)),
        "modules_to_save": outermost or None,
        "lora_dropout": common["dropout"],
        "bias": common["bias"],
        "use_dora": common["use_dora"],
        "use_rslora": common["use_rslora"],
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def _alpha(layer: LoRALayer) -> float:
    """The alpha with which PEFT scales as this layer does, where the initial factors are written beside the others."""
    alpha = float(layer.spec["alpha"])
    if layer.start is not None:
        alpha *= 2**0.5 if layer.spec["use_rslora"] else 2
    return int(alpha) if alpha.is_integer() else alpha


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Names of the adapted layers; PEFT matches endings of names, so where that is ambiguous a regular expression."""
    compressed = compressed_layers(model)
    every = {plain_name(name, compressed) for name, _ in model.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in every for name in names):
        return f"(?:{'|'.join(map(re.escape, names))})"
    return sorted(names)


def _also_trained(model: nn.Module, layers: Mapping[str, LoRALayer], config: dict[str, Any]) -> dict[str, Tensor]:
    """Biases and whole modules that trained beside the adapters, by PEFT's names."""
    found: dict[str, Tensor] = {}
    for name in config["modules_to_save"] or ():
        state = model.get_submodule(name).state_dict()
        found.update({f"{name}.{own}": tensor for own, tensor in state.items() if not own.endswith("_extra_state")})
    if config["bias"] != "none":
        biases = {f"{name}.base_layer.bias": layer.bias for name, layer in layers.items()}
        found.update({name: bias for name, bias in biases.items() if bias is not None})
    if config["bias"] == "all":
        inside = tuple(f"{name}.base." for name in adapters(model))
        other = {n: p for n, p in model.named_parameters() if n.endswith(".bias") and not n.startswith(inside)}
        found.update(other)
    return found


def _measured(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training changes, by name: of floating point, or a count; not those of compressed layers."""
    state, layers = model.state_dict(keep_vars=True), compressed_layers(model)
    inside = tuple(f"{name}." for name in layers)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in state and not name.startswith(inside) and (buffer.is_floating_point() or buffer.dim() == 0)
    }


def _to_peft(name: str, layer: LoRALayer) -> dict[str, Tensor]:
    """Factors in PEFT's layout by its names; the initial ones beside them, where they are no zero product."""
    left, right = layer.factors(layer.lora_A, layer.lora_B)
    if layer.start is not None:
        first_left, first_right = layer.factors(*layer.start)
        left, right = torch.cat([left, -first_left], 2), torch.cat([right, first_right], 1)
    found: dict[str, Tensor] = {}
    if isinstance(layer, LoRAEmbedding):
        found = {"lora_embedding_A": right[0], "lora_embedding_B": left[0]}
    elif isinstance(layer, LoRAConv):
        found = {"lora_A.weight": _spread(right, layer.lora_A), "lora_B.weight": _pointwise(left, layer.lora_B)}
        spec = layer.spec["layer"]
        if set(spec["dilation"]) != {1} or spec["padding_mode"] != "zeros":
            log.warning("PEFT's adapters neither dilate nor pad other than with zeros: it cannot use that of %r.", name)
        if layer.groups > 1 and layer.spec["use_dora"]:
            log.warning("PEFT takes the norms of a grouped convolution otherwise: its output of %r differs.", name)
    else:
        found = {"lora_A.weight": right[0], "lora_B.weight": left[0]}
    if layer.spec["use_dora"]:
        magnitude = layer.lora_magnitude
        shaped = magnitude.reshape(1, -1, *[1] * (layer.lora_A.dim() - 2)) if isinstance(layer, LoRAConv) else magnitude
        found["lora_magnitude_vector"] = shaped
    return found


def _spread(right: Tensor, a: Tensor) -> Tensor:
    """A of a grouped convolution, `(groups, r / groups, in / groups * k)`, over all inputs, as in PEFT."""
    groups, rank, _ = right.shape
    inputs, *kernel = a.shape[1:]
    spread = right.new_zeros(groups, rank, groups, inputs, *kernel)
    for group in range(groups):
        spread[group, :, group] = right[group].reshape(rank, inputs, *kernel)
    return spread.reshape(groups * rank, groups * inputs, *kernel)


def _pointwise(left: Tensor, b: Tensor) -> Tensor:
    return left.reshape(b.shape[0], -1, *b.shape[2:])


def _base_of(layers: Mapping[str, nn.Module]) -> str:
    """Fingerprint of the weights below adapters, or of those that adapters are about to be put on."""
    tensors = {}
    for name, layer in layers.items():
        below = layer.base if isinstance(layer, LoRALayer) else layer
        tensors.update({f"{name}.{own}": t for own, t in own_tensors(below).items() if t.dim() > 1})
    return fingerprint(tensors)


# -- reading ---------------------------------------------------------------------------------------------------------


def load_adapter(model: Model, path: str | Path) -> Model:
    """Reads adapters in PEFT's format, written by `save_adapter` or by PEFT, into a model; in place.

    Adapters that the model has already on those layers are replaced. All but what the file trained is frozen; a fit
    with a LoRACallback goes on with these adapters.

    Args:
        model: the base, with the weights that the adapter was trained on; its layers may be integers.
        path: the directory.

    Returns:
        The same model.

    Raises:
        CheckpointError: the files are missing or damaged, the adapter is for another base (both are named), or uses
            what is not covered here. The model is not changed then.
    """
    config, tensors, header = _read(Path(path))
    groups: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX).replace(".modules_to_save.", ".")
        if found := _KEY.fullmatch(name):
            groups.setdefault(found[1], {})[found[2].removesuffix(".weight")] = tensor
        elif ".original_module." not in name:  # with bias="all", PEFT writes those of its own wrappers, too
            others[name] = tensor
    if not groups:
        raise CheckpointError(f"{path} holds no LoRA factors.")
    view = split_view(model)
    below = {name: _below(view, name) for name in groups}
    _check_base(model, header, below)
    patterns = [n for n, _ in view.named_modules() if any(_ends(n, e) for e in config.get("modules_to_save") or ())]
    splits = planned_splits(view, [LayerPlan(name, {}) for name in groups], FROM_FILE)
    for attempt in (view, model) if splits else (model,):  # nothing is changed before all has been checked
        if attempt is model:
            split_as_planned(model, splits)
        below = {name: _below(attempt, name) for name in groups}
        new = {name: _build(name, below[name], parts, config, patterns) for name, parts in groups.items()}
        targets = _places(attempt, new, others)
    for name, layer in new.items():
        replace_layer(model, name, layer)
    with torch.no_grad():
        for target, tensor in targets:
            target.copy_(tensor)
    train_adapters(model)
    install_hook(model)
    return model


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no directory with {CONFIG} and {WEIGHTS}: {error}.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {path} is damaged: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{path} holds an adapter of type {kind!r}; only LORA is read.")
    active = [option for option in _UNREAD if config.get(option)]
    if active:
        raise CheckpointError(f"The adapter in {path} uses {', '.join(active)}, which is not covered.")
    init = str(config.get("init_lora_weights"))
    if init.startswith(_OTHER_BASES):
        raise CheckpointError(
            f"The adapter in {path} started as {init!r}, which changed its base in a way that cannot be found again. "
            "Save it from PEFT with path_initial_model_for_weight_conversion, which makes it an ordinary one."
        )
    return config, tensors, header


def _below(model: nn.Module, name: str) -> nn.Module:
    """The layer that an adapter is for: where there is one already, what is below it."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise CheckpointError(
            f"The adapter is for a layer {name!r} that this {type(model).__name__} does not have. Give the module that "
            f"the names start from. {known(name, (n for n, m in modules.items() if n and as_torch(m) is not None))}"
        )
    module = modules[name]
    return module.base if isinstance(module, LoRALayer) else module


def _check_base(model: nn.Module, header: dict[str, str], below: Mapping[str, nn.Module]) -> None:
    found = _base_of(below)
    if header.get(_BASE, found) != found:
        raise CheckpointError(
            f"The adapter was trained on a {header.get(_NAME)} with the base weights {header[_BASE]}; this "
            f"{type(model).__name__} has the base weights {found}. Load those base weights into the model first."
        )


def _build(
    name: str, below: nn.Module, parts: dict[str, Tensor], config: dict[str, Any], modules_to_save: list[str]
) -> LoRALayer:
    """The layer with the adapter; the layer below is not changed."""
    below_spec = below.spec if isinstance(below, CompressedLayer) else None
    ordinary = as_torch(below) if below_spec is None else build_layer(below_spec["layer"], device="meta")
    kind = None if ordinary is None else LORA_KINDS.get(type(ordinary))
    if ordinary is None or kind is None:
        raise CheckpointError(f"The adapter of {name!r} is for {a_or_an(type(below).__name__)}, which is not covered.")
    a, b = (parts.get(f"lora_embedding_{x}" if issubclass(kind, LoRAEmbedding) else f"lora_{x}") for x in "AB")
    if a is None or b is None:
        raise CheckpointError(
            f"The adapter of {name!r} has the factors {sorted(parts)}, which do not fit {type(below).__name__}."
        )
    init = _INITS.get(str(config.get("init_lora_weights")), "default")
    spec = {
        "kind": kind.kind,
        "by": FROM_FILE,
        "layer": layer_spec(ordinary),
        "r": a.shape[0],
        "alpha": _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)),
        "dropout": config.get("lora_dropout", 0.0),
        "init": init,
        "use_dora": "lora_magnitude_vector" in parts,
        "use_rslora": bool(config.get("use_rslora")),
        "bias": config.get("bias", "none"),
        "modules_to_save": modules_to_save,
        "lr_ratio": 1.0,
    }
    layer: Any = CompressedLayer.build(spec, below)
    if below_spec is not None:
        layer.base = below
    a = _gathered(name, a, layer) if isinstance(layer, LoRAConv) else a
    pairs = [(layer.lora_A, a), (layer.lora_B, b)]
    if spec["use_dora"]:
        pairs.append((layer.lora_magnitude, parts["lora_magnitude_vector"].flatten()))
    for target, tensor in pairs:
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"The adapter of {name!r} has a factor of shape {tuple(tensor.shape)}; this layer takes "
                f"{tuple(target.shape)}."
            )
        with torch.no_grad():
            target.copy_(tensor)
    if layer.start is not None:
        layer.set_start(*_initial(weight_of(ordinary if below_spec is None else below).detach(), layer))
    return layer


def _initial(weight: Tensor, layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """The factors that PEFT starts from, found again."""
    matrices, rank = layer.to_matrices(weight.float(), layer.groups), layer.spec["r"] // layer.groups
    if layer.spec["init"] == "olora":
        q, r = torch.linalg.qr(matrices)
        return q[..., :rank], r[..., :rank, :]
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    root = (s[..., :rank] / layer.scaling).sqrt()
    return u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]


def _gathered(name: str, a: Tensor, layer: LoRAConv) -> Tensor:
    """The inverse of `_spread`."""
    groups, own = layer.groups, layer.lora_A.shape
    if groups == 1 or a.shape[1] != own[1] * groups:
        return a
    blocks = a.reshape(groups, -1, groups, *own[1:])
    diagonal = torch.stack([blocks[group, :, group] for group in range(groups)])
    if blocks.count_nonzero() != diagonal.count_nonzero():
        raise CheckpointError(
            f"The adapter of {name!r} mixes the {groups} groups of the convolution, which a weight with groups cannot "
            "hold; train it without that layer."
        )
    return diagonal.reshape(own)


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _places(
    model: nn.Module, new: Mapping[str, LoRALayer], others: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Where each further tensor of the file goes."""
    targets: list[tuple[Tensor, Tensor]] = []
    state = model.state_dict(keep_vars=True)
    for name, tensor in others.items():
        owner, _, own = name.rpartition(".base_layer.")
        found = new[owner].base.state_dict(keep_vars=True).get(own) if owner in new else state.get(name)
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else None
            raise CheckpointError(
                f"The adapter holds {name!r} of shape {tuple(tensor.shape)}; this {type(model).__name__} has "
                f"{'no such tensor' if shape is None else f'one of shape {shape}'}."
            )
        targets.append((found, tensor))
    return targets


class PeftExporter(Exporter):
    """A directory with the adapters of a model, for `PeftModel.from_pretrained` and `load_adapter`."""

    is_directory = True
    marker = "adapter_config.json"
    finalizes = False  # that would merge the adapters
    bits: ClassVar[dict[int, str]] = dict.fromkeys(range(2, 9), "as the base has them")

    def write(self, traced: Traced, path: Path) -> None:
        save_adapter(traced.model, path)

    def open(self, path: Path, traced: Traced) -> Run:
        """The model with its adapters thrown away and read again."""
        model = deep_copy(traced.model)
        for name, layer in adapters(model).items():
            replace_layer(model, name, layer.base)
        for buffer in _measured(model).values():  # of the trained model; the base has others
            buffer.zero_()
        load_adapter(model, path).eval()
        return run_in_torch(model, traced)

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        return safetensors_types(path / WEIGHTS)
