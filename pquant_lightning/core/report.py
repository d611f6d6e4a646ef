"""What compression did, in numbers: parameters, stored bytes, multiply-accumulates and error, layer by layer."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pquant_lightning.core.calibration import batch_size
from pquant_lightning.core.compressed_layer import (
    CompressedLayer,
    changed_layers,
    compressed_layers,
    drop_user_hooks,
    weight_of,
)
from pquant_lightning.core.compression_method import relative_error
from pquant_lightning.core.deploy import (
    count_params,
    dense_form,
    deployed_form,
    finalize_across_layers,
    iter_deployed,
    share_copy,
    sparse_count,
    stored_bytes,
    with_plain_names,
)
from pquant_lightning.core.errors import ModelError
from pquant_lightning.core.graph import norm_affine
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.plan import Skip
from pquant_lightning.core.serialization import file_bytes
from pquant_lightning.core.splitting import split_like
from pquant_lightning.core.structure import absolute_path

HEADINGS = ("Parameters", "Bytes", "MACs per sample", "Weight error")
"""The columns of figures, before and after: bytes are those of tensors, errors ||W - W'|| / ||W||."""


_NO_MACS = "MACs are not counted: they need example inputs, and a forward that runs without looking at their values."


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer before and after.

    Attributes:
        name: dotted module name.
        method: the kinds it is made of, outer before inner, with their parameters.
        params: numbers of parameters (integer weights count as parameters).
        size_bytes: bytes of its tensors in a file, the deployed form after.
        macs: multiply-accumulates per sample of the example; None where there was none.
        error: relative weight error ||W - W'|| / ||W||; None where the original is not known.
    """

    name: str
    method: str
    params: tuple[int, int]
    size_bytes: tuple[int, int]
    macs: tuple[int, int] | None
    error: float | None


@dataclass(frozen=True)
class CompressionReport:
    """The whole model before and after; prints as one table.

    Attributes:
        layers: the compressed layers.
        skipped: the layers left alone, with the reason.
        params: parameters of the whole model before and after.
        size_bytes: bytes of the tensors of the whole model before and after (deployed form, without a file's header).
        macs: multiply-accumulates per sample of the example; None where there was none.
        file_bytes: bytes of the files that `save_compressed` writes of both; None where they were not asked for.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[Skip, ...]
    params: tuple[int, int]
    size_bytes: tuple[int, int]
    macs: tuple[int, int] | None
    file_bytes: tuple[int, int] | None = None

    @property
    def compression_ratio(self) -> float:
        """Parameters before / parameters after."""
        return self.params[0] / max(self.params[1], 1)

    @property
    def size_ratio(self) -> float:
        """Bytes of the tensors after / before."""
        return self.size_bytes[1] / max(self.size_bytes[0], 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-able data."""
        return {**asdict(self), "compression_ratio": self.compression_ratio, "size_ratio": self.size_ratio}

    def __str__(self) -> str:
        table = Table(title="Compression", title_justify="left", caption_justify="left")
        for heading in ("Layer", "Method"):
            table.add_column(heading, overflow="fold")
        counted = self.macs is not None
        for heading in HEADINGS:
            if counted or not heading.startswith("MACs"):
                table.add_column(heading, justify="right")
        for layer in self.layers:
            error = "" if layer.error is None else f"{layer.error:.2%}"
            figures = (layer.params, layer.size_bytes, layer.macs)[: 3 if counted else 2]
            table.add_row(layer.name, layer.method, *map(_change, figures), error)
        table.add_section()
        table.add_row(
            "whole model",
            _kept(self.size_bytes),
            *map(_change, (self.params, self.size_bytes, self.macs)[: 3 if counted else 2]),
        )
        if self.file_bytes is not None:
            table.add_row("file", _kept(self.file_bytes), "", _change(self.file_bytes))
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(table)
        if not counted:
            console.print(_NO_MACS, highlight=False)
        for skip in self.skipped:
            console.print(
                f"left alone by {skip.by}: {skip.name}: {skip.reason}", highlight=False, markup=False, soft_wrap=True
            )
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def _kept(pair: tuple[int, int]) -> str:
    return f"{pair[1] / max(pair[0], 1):.1%} of the bytes"


def _change(pair: tuple[int, int] | None) -> str:
    return "" if pair is None else f"{pair[0]:,} → {pair[1]:,}"


def count_macs(model: nn.Module, example_inputs: Any) -> dict[str, int] | None:
    """Multiply-accumulates of one forward pass by module name ("" = all), counted on "meta" without computing.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        None where the forward cannot run on "meta" tensors (it looks at values).
    """
    meta = share_copy(model, "meta").eval()
    drop_user_hooks(meta)
    args, kwargs = as_call(example_inputs)
    args, kwargs = _to_meta(args), _to_meta(kwargs)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            meta(*args, **kwargs)
    except Exception:  # whatever a user's forward may raise on "meta", or on a batch that it does not take
        return None
    root = type(meta).__name__
    by_module = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return {"": by_module.get("Global", 0)} | {n.removeprefix(f"{root}."): macs for n, macs in by_module.items()}


def macs_per_sample(model: nn.Module, example_inputs: Any) -> dict[str, int] | None:
    """`count_macs` / the samples of the example: the same for every batch size where samples do not meet."""
    counted = count_macs(model, example_inputs)
    samples = max(batch_size(example_inputs), 1)
    return None if counted is None else {name: round(macs / samples) for name, macs in counted.items()}


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of `forward`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs), {}) if isinstance(example_inputs, tuple | list) else ((example_inputs,), {})


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(item) for key, item in value.items()}
    return type(value)(map(_to_meta, value)) if isinstance(value, tuple | list) else value


def make_report(
    model: nn.Module,
    *,
    original: nn.Module | None = None,
    example_inputs: Any = None,
    errors: Mapping[str, float] | None = None,
    skipped: Sequence[Skip] = (),
    files: bool = False,
) -> CompressionReport:
    """Reports a compressed model; what stood there before is read from its specs, or from `original`.

    Args:
        model: training form or deployed form; bytes and MACs are always those of the deployed form.
        original: the uncompressed model, for its own size and exact errors.
        example_inputs: what `forward` takes, for MACs.
        errors: relative weight errors by layer name, where they are known.
        skipped: layers left alone.
        files: whether to tell the bytes of the files, too; it rounds the weights of layers that are to be integers.
    """
    model = with_plain_names(model)
    before = dense_form(model) if original is None else split_like(original, model)
    after = deployed_form(model)
    sparse = _sparse_layers(model)
    macs_before = None if example_inputs is None else macs_per_sample(before, example_inputs)
    macs_after = None if example_inputs is None else macs_per_sample(after, example_inputs)
    counted = macs_before is not None and macs_after is not None

    def macs(name: str) -> tuple[int, int] | None:
        return (macs_before.get(name, 0), macs_after.get(name, 0)) if counted else None  # type: ignore[union-attr]

    layers = []
    resized = _resized_layers(before, after)
    for name in dict.fromkeys([*changed_layers(model), *sparse, *resized]):
        layer = model.get_submodule(name)
        old, new = before.get_submodule(name), after.get_submodule(name)
        error = (errors or {}).get(name)
        if original is not None:
            error = weight_error(old, layer, folded_factor(original, model, name))
        saved, share = sparse.get(name, (0, 0.0))
        params, size_bytes = (count_params(old), count_params(new)), (stored_bytes(old), stored_bytes(new) - saved)
        words = [_described(layer)] if isinstance(layer, CompressedLayer) else []
        words += [resized[name]] if name in resized else []
        words += [f"{share:.1%} zeros"] if name in sparse else []
        layers.append(LayerReport(name, ", ".join(words), params, size_bytes, macs(name), error))
    total = stored_bytes(before), stored_bytes(after) - sum(saved for saved, _ in sparse.values())
    params = count_params(before), count_params(after)
    dense = before if original is None else original
    on_disk = (file_bytes(dense, like=model), file_bytes(model)) if files else None
    return CompressionReport(tuple(layers), tuple(skipped), params, total, macs(""), on_disk)


def _resized_layers(before: nn.Module, after: nn.Module) -> dict[str, str]:
    """Modules whose own tensors have lost channels, with the widths of their weight before and after in words."""
    names = []
    for carrier, layer in compressed_layers(after).items():
        paths = layer.spec.get("group", {"tensors": {}})["tensors"]
        names += [absolute_path(carrier, path).rpartition(".")[0] for path in paths]
    names += [name for name, layer in compressed_layers(after, outermost=True).items() if "original" in layer.spec]
    found = {}
    for name in dict.fromkeys(names):
        old, new = before.get_submodule(name), after.get_submodule(name)
        shapes = [list(t.shape[:2]) for m in (old, new) if (t := _first_tensor(m)) is not None]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            found[name] = " → ".join("x".join(map(str, shape)) for shape in shapes)
    return found


def _first_tensor(module: nn.Module) -> Tensor | None:
    return next((p for p in module.parameters()), None)


def _sparse_layers(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Layers with so many zeros in their deployed form that a file leaves them out: bytes saved, and share of zeros."""
    if not any(sparse_count(parameter) is not None for parameter in model.parameters()):
        return {}
    model = share_copy(model)
    with contextlib.suppress(ModelError):  # what cannot be deployed yet counts as it is
        finalize_across_layers(model)
    deployed: dict[str, nn.Module] = {}
    changed = changed_layers(model)
    for name, final in iter_deployed(model):
        parts = [n for n in changed if n == name or n.startswith(f"{name}.")]
        deployed.update({n: final if n == name else final.get_submodule(n[len(name) + 1 :]) for n in parts})
    inside = tuple(f"{name}." for name in deployed)
    found = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        own = (
            deployed[name].state_dict(keep_vars=True)
            if name in deployed
            else dict(module.named_parameters(recurse=False))
        )
        matrices = [t for t in own.values() if isinstance(t, Tensor) and t.dim() > 1 and id(t) not in seen]
        seen.update(map(id, matrices))
        pairs = [(tensor, count) for tensor in matrices if (count := sparse_count(tensor)) is not None]
        if pairs:
            saved = sum((t.numel() - count) * t.element_size() - -(-t.numel() // 8) for t, count in pairs)
            zeros = sum(t.numel() - int(torch.count_nonzero(t)) for t in matrices)
            found[name] = saved, zeros / sum(t.numel() for t in matrices)
    return found


def weight_error(old: nn.Module, new: nn.Module, factor: Tensor | None = None) -> float | None:
    """Relative Frobenius error of the weight that `new` stands for; None where the layers do not correspond.

    Args:
        old: the layer before.
        new: the layer after.
        factor: what a norm that is folded into `new` multiplies `old` by (`folded_factor`).
    """
    ordinary = as_torch(old)
    if ordinary is None or not (isinstance(new, CompressedLayer) or as_torch(new) is new):
        return None
    with torch.no_grad():
        before, after = weight_of(ordinary), weight_of(new)
        before = before if factor is None or before.is_meta else before * factor.to(before)
        return relative_error(before, after) if before.shape == after.shape else None


def folded_factor(original: nn.Module, compressed: nn.Module, name: str) -> Tensor | None:
    """What the weight of a layer was multiplied by where the norm behind it is folded into it; else None.

    Args:
        original: the uncompressed model, which still has the norm.
        compressed: a model made of it.
        name: of the layer in both.

    Returns:
        `(out, 1, ...)`, or `(1, out, 1, ...)` for a transposed convolution: it multiplies the original weight, which is
        then comparable with that of the compressed layer.
    """
    for place, norm in compressed_layers(compressed).items():
        if not norm.unfolds or "into" not in norm.spec or absolute_path(place, norm.spec["into"]) != name:
            continue
        before: Any = original.get_submodule(place)
        if getattr(before, "running_var", None) is None or before.running_var.is_meta:
            return None
        weight = weight_of(compressed.get_submodule(name))
        dim = 1 if "Transpose" in type(as_torch(original.get_submodule(name))).__name__ else 0
        return norm_affine(before)[0].reshape([-1 if d == dim else 1 for d in range(weight.dim())])
    return None


def _described(layer: CompressedLayer) -> str:
    inner = dict.fromkeys(child.described() for name, child in compressed_layers(layer).items() if name)
    return " + ".join([layer.described(), *inner])
