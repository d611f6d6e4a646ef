"""Writes the files of one release as `tests/data/VERSION.zip`: `python -m tests.data.write`, once for each release.

For each row: the training form (`NAME.ckpt` of a fit, `NAME.pt` of `compress_model`), the deployed form
(`NAME.safetensors`), and in `outputs.safetensors` what both compute for `MODEL.inputs()` in plain torch, which is the
same on every kind of CPU up to the order of sums.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor, nn

import pquant_lightning as pq
from pquant_lightning.core.compressed_layer import read_specs
from pquant_lightning.core.serialization import read_artifact, read_checkpoint
from tests.data.models import MODELS
from tests.models import quiet_trainer

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "low_rank": ("low_rank", {"rank": 2}),
    "low_rank_spatial": ("low_rank", {"rank": 2, "split": "spatial", "include": ["conv2d*"]}),
    "sparse_low_rank": ("factorization", {"kind": "sparse_low_rank", "rank": 1, "density": 0.2}),
    "nmf": ("factorization", {"kind": "nmf", "rank": 2}),
    "kronecker": ("factorization", {"kind": "kronecker", "rank": 1}),
    "monarch": ("factorization", {"kind": "monarch", "rank": 1, "blocks": 2}),
    "cur": ("factorization", {"kind": "cur", "rank": 3}),
    "lora": ("lora", {"r": 2, "init": "pissa"}),
    "dora": ("lora", {"r": 2, "use_dora": True, "bias": "all"}),
    "tensor_train": ("tensor_train", {"rank": 2}),
    "tucker": ("tucker", {"rank": 2}),
    "cp": ("cp", {"rank": 3}),
    "ptq_static": ("ptq", {"bits": 8}),
    "ptq_dynamic": ("ptq", {"scheme": "dynamic"}),
    "ptq_4bit_groups": ("ptq", {"bits": 4, "scheme": "weight_only", "group_size": 4, "rounding": "hqq"}),
    "ptq_3bit_gptq": ("ptq", {"bits": 3, "scheme": "weight_only", "rounding": "gptq"}),
    "qat": ("qat", {"bits": 8}),
    "qat_4bit": ("qat", {"bits": 4}),
    "mixed_precision": ("mixed_precision", {"average_bits": 4}),
    "structured": ("structured_pruning", {"sparsity": 0.5}),
    **{  # one layer keeps the record of what was removed: one file for each type that it can be
        f"structured_{pair}": ("structured_pruning", {"sparsity": 0.5, "include": [f"{pair}*"]})
        for pair in ("linear", "conv1d", "conv2d", "conv3d", "up1d", "up2d", "up3d", "embedding")
    },
}

STACKS: dict[str, tuple[str, Callable[[], list[Callback]]]] = {
    "low_rank+qat": ("tokens", lambda: [pq.LowRankCallback(rank=4), pq.QATCallback(bits=8)]),
    "pruning+qat": ("images", lambda: [pq.PruningCallback(sparsity=0.5), pq.QATCallback(bits=8)]),
    "structured+ptq": ("images", lambda: [pq.StructuredPruningCallback(sparsity=0.5), pq.PTQCallback(bits=8)]),
    "lora+ptq4": (
        "tokens",
        lambda: [pq.LoRACallback(r=2), pq.PTQCallback(bits=4, scheme="weight_only", min_saving=0.0)],
    ),
    "learned_scales": ("images", lambda: [pq.QATCallback(weight_bits=3, quantizer="lsq")]),
    "mixed_qat": ("tokens", lambda: [pq.QATCallback(average_bits=4)]),
    "pattern": ("tokens", lambda: [pq.PruningCallback(pattern="2:4"), pq.PTQCallback(scheme="dynamic")]),
    "lora_alone": ("tokens", lambda: [pq.LoRACallback(r=2)]),
}


def plain_output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """What a model computes without integer kernels: where a gradient is wanted, layers compute in plain torch."""
    inputs = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    frozen = [module for module in embeddings if not any(p.requires_grad for p in module.parameters())]
    handles = [m.register_forward_hook(lambda _layer, _inputs, output: output.requires_grad_()) for m in frozen]
    output = model.eval()(*inputs).detach()
    for handle in handles:
        handle.remove()
    return output


def made(model: str) -> nn.Module:
    """A model with reproducible weights."""
    torch.manual_seed(0)
    return MODELS[model]()


def write_layers(directory: Path) -> dict[str, Tensor]:
    """One file in each form for every method, on the model that has all types of layers."""
    outputs = {}
    loader = [MODELS["branches"].inputs(seed) for seed in range(1, 5)]
    for name, (method, options) in LAYERS.items():
        net = made("branches").train()
        method_object = pq.CompressionMethodRegistry.get(method, {**options, "min_saving": 0.0})
        method_object.compress_in_place(net, method_object.samples_of(loader))
        pq.prepare(net)
        torch.save(net.state_dict(), directory / f"{name}.pt")
        pq.save_compressed(net, directory / f"{name}.safetensors")
        outputs[f"{name}.pt"] = plain_output(net, MODELS["branches"].inputs())
        outputs[f"{name}.safetensors"] = plain_output(pq.finalize(net), MODELS["branches"].inputs())
    return outputs


def write_stacks(directory: Path) -> dict[str, Tensor]:
    """A fit of one epoch of each stack: its checkpoint and its artefact."""
    outputs = {}
    for name, (model, callbacks) in STACKS.items():
        net: Any = made(model)
        ours = callbacks()
        with tempfile.TemporaryDirectory() as place:
            trainer = quiet_trainer(Path(place), ours)
            trainer.fit(net, net.loader())
            trainer.save_checkpoint(directory / f"{name}.ckpt")
            (Path(place) / "compressed.safetensors").replace(directory / f"{name}.safetensors")
        outputs[f"{name}.ckpt"] = plain_output(net, MODELS[model].inputs())
        outputs[f"{name}.safetensors"] = plain_output(pq.finalize(net), MODELS[model].inputs())
    return outputs


def specs_in(path: Path) -> dict[str, dict[str, Any]]:
    """The specs in a file of either form."""
    if path.suffix == ".json" or path.name == "outputs.safetensors":
        return {}
    state = read_artifact(path)[0] if path.suffix == ".safetensors" else read_checkpoint(path)
    return read_specs(state.get("state_dict", state))


def own_kinds() -> set[str]:
    """The package's kinds of layers."""
    return {name for name, kind in pq.CompressedLayer.kinds.items() if kind.__module__.startswith("pquant_lightning.")}


def main() -> None:
    """Writes all files and `models.json`, the model of each."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        save_file({**write_layers(directory), **write_stacks(directory)}, directory / "outputs.safetensors")
        models = {**dict.fromkeys(LAYERS, "branches"), **{name: model for name, (model, _) in STACKS.items()}}
        (directory / "models.json").write_text(json.dumps(models, indent=1) + "\n")
        kinds = {spec["kind"] for path in directory.iterdir() for spec in specs_in(path).values()}
        if missing := sorted(own_kinds() - kinds):
            raise SystemExit(f"No file has a layer of the kinds {', '.join(missing)}: add a row for each.")
        shutil.make_archive(str(Path(__file__).parent / pq.__version__), "zip", directory)


if __name__ == "__main__":
    main()
