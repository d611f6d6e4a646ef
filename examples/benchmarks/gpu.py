"""What compression costs and gives on a GPU, relative to the plain model there; says so where there is no GPU.

    python examples/benchmarks/gpu.py [--rounds 15]

Time is that between CUDA events, contenders alternating, medians of the ratios. Inference in bfloat16 is the peer that
integers have to beat: that is what people run on a GPU.
"""

import argparse
import copy
import gc
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import linear_encoder, mlp, print_table, resnet18
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import (
    LoRACallback,
    LowRankCallback,
    PruningCallback,
    QATCallback,
    compress_model,
)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP, batch 4096": (mlp, (784,), 4096),
    "encoder of Linear, batch 64": (linear_encoder, (128, 384), 64),
    "ResNet-18, batch 512": (resnet18, (3, 32, 32), 512),
}
CALLBACKS: dict[str, Callable[[], Any]] = {
    "`QATCallback()`": QATCallback,
    "`PruningCallback(sparsity=0.9)`": lambda: PruningCallback(sparsity=0.9),
    "`LoRACallback()`": LoRACallback,
    "`LowRankCallback(param_ratio=0.25)`": lambda: LowRankCallback(param_ratio=0.25),
}


class Classifier(LightningModule):
    """Any of `NETWORKS` as an ordinary LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, fused=True)


def fit(net: nn.Module, batch: tuple[Tensor, Tensor], callback: Any) -> tuple[Classifier, list[Any]]:
    """Two steps of a copy, in which the callback does its work."""
    module = Classifier(copy.deepcopy(net))
    trainer = Trainer(
        max_epochs=2,
        callbacks=[callback] if callback else [],
        accelerator="gpu",
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*batch), len(batch[1])))
    return module.cuda().train(), trainer.callbacks


def relative_times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median over the rounds of the time of each contender / that of the first one in the same round."""
    names = list(runs)
    for run in (*runs.values(), *runs.values(), *runs.values()):
        run()
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        times = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                runs[name]()
            end.record()
            torch.cuda.synchronize()
            times[name] = start.elapsed_time(end)
        for name in names:
            ratios[name].append(times[name] / times[names[0]])
    return {name: statistics.median(values) for name, values in ratios.items()}


def training_step(module: Classifier, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    optimizer = module.configure_optimizers()

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def training(rounds: int) -> Iterator[list[str]]:
    """Rows: time of a training step / time of that of the plain model (layers and optimizer; hooks not among it)."""
    yield ["training step / fp32", *CALLBACKS]
    for name, (build, sample, size) in NETWORKS.items():
        net, batch = build(), (torch.randn(size, *sample), torch.randint(10, (size,)))
        modules = {"fp32": fit(net, batch, None)[0]}
        modules |= {label: fit(net, batch, make())[0] for label, make in CALLBACKS.items()}
        there = (batch[0].cuda(), batch[1].cuda())
        times = relative_times({label: training_step(m, there) for label, m in modules.items()}, rounds)
        yield [name, *(f"{times[label]:.2f}" for label in CALLBACKS)]


def inference(rounds: int) -> Iterator[list[str]]:
    """Rows: how many times as fast as fp32 on the same GPU."""
    names = ["bfloat16", "`ptq`", "`ptq`, dynamic", "half of the channels", "half of the channels, bfloat16"]
    yield ["times faster than fp32", *names, "`ptq` compiled", "bfloat16 compiled"]
    for name, (build, sample, size) in NETWORKS.items():
        torch.compiler.reset()
        net, x = build().eval(), torch.randn(size, *sample)
        calibration = [x[:64] for _ in range(4)]
        thin = compress_model(net, "structured_pruning", train_loader=calibration, sparsity=0.5).eval()
        models = {"fp32": net, "bfloat16": copy.deepcopy(net).bfloat16()}
        models["`ptq`"] = compress_model(net, "ptq", train_loader=calibration).eval()
        models["`ptq`, dynamic"] = compress_model(net, "ptq", train_loader=calibration, scheme="dynamic").eval()
        models |= {"half of the channels": thin, "half of the channels, bfloat16": copy.deepcopy(thin).bfloat16()}
        runs = {label: _forward(model, x) for label, model in models.items()}
        runs["`ptq` compiled"] = _forward(models["`ptq`"], x, compiled=True)
        runs["bfloat16 compiled"] = _forward(models["bfloat16"], x, compiled=True)
        times = relative_times(runs, rounds)
        yield [name, *(f"{1 / times[label]:.2f}" for label in list(runs)[1:])]


def _forward(model: nn.Module, x: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    model = copy.deepcopy(model).cuda()
    inputs = x.cuda().to(torch.bfloat16 if any(p.dtype is torch.bfloat16 for p in model.parameters()) else x.dtype)
    forward = torch.compile(model) if compiled else model
    return torch.inference_mode()(lambda: forward(inputs))


def peak_memory() -> Iterator[list[str]]:
    """Rows: peak memory of one training step / that of the plain model."""
    yield ["peak memory of a step / fp32", *CALLBACKS]
    for name, (build, sample, size) in NETWORKS.items():
        net, batch = build(), (torch.randn(size, *sample), torch.randint(10, (size,)))
        peaks = {}
        for label, make in {"fp32": lambda: None, **CALLBACKS}.items():
            module = fit(net, batch, make())[0]
            step = training_step(module, (batch[0].cuda(), batch[1].cuda()))
            for _ in range(3):
                step()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[label] = torch.cuda.max_memory_allocated()
            del module, step
            gc.collect()
        yield [name, *(f"{peaks[label] / peaks['fp32']:.2f}" for label in CALLBACKS)]


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        print("There is no CUDA device here; nothing was measured.")
        return
    for logger in ("lightning.pytorch", "pquant_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, medians of {rounds} rounds")
    print_table("Training", training(rounds))
    print_table("Peak memory", peak_memory())
    print_table("Inference", inference(rounds))


if __name__ == "__main__":
    main()
