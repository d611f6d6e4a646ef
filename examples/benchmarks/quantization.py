"""Cost of quantization-aware training, speed of integer inference and size of integer files, relative to plain fp32.

    python examples/benchmarks/quantization.py [--rounds 15] [--models MLP]
        [--only training inference compile layers size]

Models are compressed as users do it: a callback with default options in a short `Trainer.fit`, and for inference
`load_compressed` of the artefact. Time is CPU time on one thread relative to fp32 eager in the same round, the median
over the rounds; each round takes the contenders in another order. Compilation itself is not timed. A column "bar" holds
what the column before it is to reach: at most that for training and size, at least that for speed-ups.
"""

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Batch, linear_encoder, machine, mlp, print_table, relative_times, resnet18, torch_encoder
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import PTQCallback, QATCallback, compress_model, load_compressed, save_compressed
from pquant_lightning.methods.quantization._kernels import compute


class Network(NamedTuple):
    """A model of the tables: how it is made, what it takes, and its bars."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]  # the shape of one input
    train_batch: int
    infer_batch: int
    bars: tuple[float, float, float, float]  # QAT step straight-through, LSQ; times faster eager, compiled
    legacy: bool  # whether torch.ao's quantize_dynamic works: Linear only, fails in nn.TransformerEncoder


NETWORKS = {
    "MLP": Network(mlp, (784,), 128, 32, (1.35, 1.6, 3.0, 3.7), True),
    "nn.TransformerEncoder": Network(torch_encoder, (128, 384), 8, 1, (1.20, 1.35, 2.2, 2.6), False),
    "encoder of Linear": Network(linear_encoder, (128, 384), 8, 1, (1.20, 1.35, 2.2, 2.6), True),
    "ResNet-18": Network(resnet18, (3, 32, 32), 32, 32, (1.12, 1.25, 3.0, 4.4), False),
}


class Classifier(LightningModule):
    """Any of `NETWORKS` as an ordinary LightningModule, which knows nothing of compression."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = NETWORKS[name].build()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def random_batch(name: str, size: int) -> Batch:
    return torch.randn(size, *NETWORKS[name].sample), torch.randint(10, (size,))


def fit(module: Classifier, callback: Any, root: str) -> Classifier:
    """Trains a copy for two batches, in which the callback does its work; the artefact goes to `root`."""
    name = module.hparams["name"]
    data = TensorDataset(*random_batch(name, 2 * NETWORKS[name].train_batch))
    trainer = Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fitted = copy.deepcopy(module)
    trainer.fit(fitted, DataLoader(data, NETWORKS[name].train_batch))
    return fitted


def deployed(module: Classifier, callback: Any) -> Classifier:
    """What is loaded from the artefact of a fit."""
    with tempfile.TemporaryDirectory() as root:
        fit(module, callback, root)
        return load_compressed(Classifier, callback.artifact)


def legacy_dynamic(module: Classifier) -> nn.Module:
    """A copy with the int8 Linear layers of torch.ao, which is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module.net, {nn.Linear})


def training_step(module: Classifier, batch: Batch) -> Callable[[], None]:
    optimizer = module.train().configure_optimizers()

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def inference(module: nn.Module, inputs: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    forward = torch.compile(module.eval()) if compiled else module.eval()
    return torch.inference_mode()(lambda: forward(inputs))


def training(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Rows: time of a training step / time of that of fp32."""
    yield ["model, batch", "`QATCallback()`", "bar", '`QATCallback(quantizer="lsq")`', "bar"]
    for name in names:
        network, modules = NETWORKS[name], {"fp32": Classifier(name)}
        with tempfile.TemporaryDirectory() as root:
            modules["ste"] = fit(modules["fp32"], QATCallback(), root)
            modules["lsq"] = fit(modules["fp32"], QATCallback(quantizer="lsq"), root)
        batch = random_batch(name, network.train_batch)
        times = relative_times({key: training_step(module, batch) for key, module in modules.items()}, rounds)
        figures = (times["ste"], network.bars[0], times["lsq"], network.bars[1])
        yield [f"{name}, {network.train_batch}", *(f"{figure:.2f}" for figure in figures)]


def speed_ups(names: list[str], rounds: int, compiled: bool) -> Iterator[list[str]]:
    """Rows: time of fp32 eager / time of each contender."""
    peer = "compiled fp32" if compiled else "torch.ao `quantize_dynamic`"
    yield ["model, batch", "`PTQCallback()`", "bar", '`PTQCallback(scheme="dynamic")`', peer]
    for name in names:
        torch.compiler.reset()  # torch gives up compiling a function that it has compiled for too many models
        network, module = NETWORKS[name], Classifier(name)
        inputs, _ = random_batch(name, network.infer_batch)
        runs = {"fp32": inference(module, inputs)}
        runs["static"] = inference(deployed(module, PTQCallback()), inputs, compiled)
        runs["dynamic"] = inference(deployed(module, PTQCallback(scheme="dynamic")), inputs, compiled)
        if compiled:
            runs["peer"] = inference(module, inputs, compiled=True)
        elif network.legacy:
            runs["peer"] = inference(legacy_dynamic(module), inputs)
        faster = {key: f"{1 / ratio:.2f}" for key, ratio in relative_times(runs, rounds).items()}
        bar = f"{network.bars[3 if compiled else 2]:.1f}"
        title = f"{name}, {network.infer_batch}"
        yield [title, faster["static"], bar, faster["dynamic"], faster.get("peer", "-")]


LAYER_SCHEMES: dict[str, dict[str, Any]] = {
    "8-bit weights": {"scheme": "weight_only"},
    "4-bit weights in groups of 32": {"scheme": "weight_only", "bits": 4, "group_size": 32},
    "`PTQCallback()`": {},
    '`scheme="dynamic"`': {"scheme": "dynamic"},
}
LAYER_SIZES = ((4096, (1,)), (1024, (1, 8, 32, 128, 512)))  # inputs and outputs, batches


def layers(rounds: int) -> Iterator[list[str]]:
    """Rows: time in floating point / time of the deployed layer, and the error of its sums against int64."""
    yield ["layer, batch, model", *LAYER_SCHEMES, "error of the sums"]
    for dtype in (torch.float32, torch.bfloat16):
        for width, batches in LAYER_SIZES:
            module = nn.Sequential(nn.Linear(width, width)).to(dtype)
            data = [torch.randn(64, width, dtype=dtype)]
            found = {
                name: compress_model(module, "ptq", train_loader=data, rounding="nearest", **options)
                for name, options in LAYER_SCHEMES.items()
            }
            for batch in batches:
                inputs = torch.randn(batch, width, dtype=dtype)
                runs = {name: inference(model, inputs) for name, model in {"float": module, **found}.items()}
                times = relative_times(runs, rounds)
                faster = [f"{times['float'] / times[name]:.2f}" for name in LAYER_SCHEMES]
                title = f"{width} x {width}, {batch}, {str(dtype).removeprefix('torch.')}"
                yield [title, *faster, f"{error_of_sums(found['`PTQCallback()`'][0], batch):.0e}"]


def error_of_sums(layer: Any, rows: int) -> float:
    """Relative error of what the layer's kernel adds up, for the largest input codes, against int64."""
    codes, grid = layer.weight_codes(), layer.ready()["grid"]
    x = torch.full((rows, codes.shape[1]), float(grid.scale) * (grid.top - float(grid.zero_point)))
    exact = (grid.top - int(grid.zero_point)) * codes.long().sum(1)
    expected = exact.double() * layer.ready()["multiplier"].double() + layer.ready()["bias"].double()
    with torch.no_grad():
        found = compute(layer, x).double()
    return float((found - expected).abs().max() / expected.abs().max()) // 1e-6 * 1e-6  # float32 rounds the rest


def sizes() -> Iterator[list[str]]:
    """Rows: bytes of a file of the MLP / bytes of that of fp32."""
    yield ["file of the MLP", "bytes", "/ fp32", "bar"]
    module, callback = Classifier("MLP"), PTQCallback()
    int4 = compress_model(module, "ptq", bits=4, scheme="weight_only", group_size=32)
    with tempfile.TemporaryDirectory() as root:
        fit(module, callback, root)
        fp32_bytes = save_compressed(module, Path(root, "fp32.safetensors")).stat().st_size
        int4_bytes = save_compressed(int4, Path(root, "int4.safetensors")).stat().st_size
        int8_bytes = callback.artifact.stat().st_size
    yield ["fp32", f"{fp32_bytes:,}", "1.000", "-"]
    yield ["`PTQCallback()`", f"{int8_bytes:,}", f"{int8_bytes / fp32_bytes:.3f}", "0.27"]
    yield ["4-bit weights in groups of 32", f"{int4_bytes:,}", f"{int4_bytes / fp32_bytes:.3f}", "0.17"]


def main() -> None:
    """Reads the command line and prints the tables."""
    parts = ["training", "inference", "compile", "layers", "size"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="default: all")
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="default: all")
    options = parser.parse_args()
    for logger in ("lightning.pytorch", "pquant_lightning"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*LeafSpec.*"):  # the latter: Lightning 2.6 on torch 2.13
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    print(f"{machine()}, medians of {options.rounds} rounds")
    tables = {
        "training": ("Training step: time / fp32", training(options.models, options.rounds)),
        "inference": ("Inference: times faster than fp32 eager", speed_ups(options.models, options.rounds, False)),
        "compile": ("Compiled: times faster than fp32 eager", speed_ups(options.models, options.rounds, True)),
        "layers": ("One Linear layer: times faster than floating point", layers(options.rounds)),
        "size": ("File size", sizes()),
    }
    for part in parts:
        if part in options.only:
            print_table(*tables[part])


if __name__ == "__main__":
    main()
