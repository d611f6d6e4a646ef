"""A directory for JAX: a StableHLO program, its parameters, and a description of what goes in and comes out."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pquant_lightning.backends.base import as_numpy, require
from pquant_lightning.backends.lowering.program import to_function
from pquant_lightning.backends.lowering.trace import Traced
from pquant_lightning.exporters.base import PACKED, Exporter, Run
from pquant_lightning.exporters.safetensors import safetensors_types

PROGRAM, PARAMS, META = "program.stablehlo", "params.safetensors", "meta.json"
PLATFORMS = ("cpu", "cuda", "tpu")


class JaxExporter(Exporter):
    """`jax.export` with symbolic sizes; the parameters are the program's first argument, and can be trained."""

    is_directory = True
    marker = META
    extra = "jax"
    packages = ("jax",)
    bits = PACKED

    def write(self, traced: Traced, path: Path) -> None:
        import jax
        from jax import export

        from pquant_lightning.backends.lowering.jax_namespace import JaxNamespace

        run, weights = to_function(traced.program, JaxNamespace())
        shapes = {n: jax.ShapeDtypeStruct(tuple(t.shape), _native(t)) for n, t in weights.items()}
        inputs = _specs(traced)
        program = export.export(jax.jit(run), platforms=PLATFORMS)(shapes, inputs)
        (path / PROGRAM).write_bytes(program.serialize())
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path / PARAMS)
        described = {
            "format": "pquant_lightning jax",
            "version": 1,
            "program": f"{PROGRAM}: jax.export.deserialize(bytes).call(params, [inputs in this order])",
            "inputs": [
                {"name": name, "shape": [str(size) for size in spec.shape], "dtype": str(spec.dtype)}
                for name, spec in zip(traced.inputs, inputs, strict=True)
            ],
            "outputs": list(traced.outputs),
            "versions": {"jax": jax.__version__, "torch": torch.__version__},
        }
        (path / META).write_text(json.dumps(described, indent=2), encoding="utf-8")

    def open(self, path: Path, traced: Traced) -> Run:
        import jax

        program, params = load_jax(path)

        def run(inputs: Any) -> list[Any]:
            return [jax.device_get(value) for value in program(params, [as_numpy(x) for x in inputs])]

        return run

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        return safetensors_types(path / PARAMS)


def load_jax(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """A directory that `export_model(..., format="jax")` has written, as a function and its parameters.

    Returns:
        `program(params, inputs)`, which gives the list of the outputs, and the parameters, `jax.Array` by name;
        `inputs` is an array, a list of arrays in the order of the result's `inputs`, or a dict by these names.

    Raises:
        BackendUnavailable: JAX is not installed.
    """
    require("jax", "jax")
    import jax.numpy as jnp
    from jax import export
    from safetensors import safe_open

    program = export.deserialize(bytearray((Path(path) / PROGRAM).read_bytes()))
    with safe_open(Path(path) / PARAMS, framework="pt") as file:
        params = {name: jnp.asarray(as_numpy(file.get_tensor(name))) for name in file.keys()}  # noqa: SIM118
    specs = program.in_avals[-len(program.in_avals) + len(params) :]

    names = [entry["name"] for entry in json.loads((Path(path) / META).read_text(encoding="utf-8"))["inputs"]]

    def call(params: dict[str, Any], inputs: Any) -> Any:
        if isinstance(inputs, dict):
            inputs = [inputs[name] for name in names]
        elif not isinstance(inputs, list | tuple):
            inputs = [inputs]
        return program.call(params, [jnp.asarray(x, spec.dtype) for x, spec in zip(inputs, specs, strict=True)])

    return call, params


def _native(tensor: Tensor) -> Any:
    import jax

    return jax.dtypes.canonicalize_dtype(as_numpy(torch.empty(0, dtype=tensor.dtype)).dtype)


def _specs(traced: Traced) -> list[Any]:
    """Shapes and types of the inputs, with a symbol for each open size."""
    import jax
    from jax import export

    largest = traced.largest
    symbols = sorted({symbol for sizes in traced.axes.values() for symbol in sizes.values()})
    limits = [f"{symbol} <= {largest[symbol]}" for symbol in symbols if symbol in largest]
    sizes: dict[str, Any] = {}
    if symbols:
        sizes = dict(zip(symbols, export.symbolic_shape(", ".join(symbols), constraints=limits), strict=True))
    found = []
    for name, tensor in zip(traced.inputs, traced.tensors, strict=True):
        axes = {axis % tensor.dim(): symbol for axis, symbol in traced.axes[name].items()}
        shape = tuple(sizes[axes[i]] if i in axes else size for i, size in enumerate(tensor.shape))
        found.append(jax.ShapeDtypeStruct(shape, _native(tensor)))
    return found
