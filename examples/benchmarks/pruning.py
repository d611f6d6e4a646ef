"""Cost of pruning while training: masks per step, a change of the masks, the threshold over many weights; and what
removed channels bring.

    python examples/benchmarks/pruning.py [--rounds 7] [--only steps update threshold channels]

Beside Lightning's ModelPruning (global, L1) and a threshold in plain torch. Training runs in a Trainer, with default
options but for the share of zeros, at once and in all layers; what is timed is the second epoch. CPU time on one
thread, median over the rounds of the ratio within a round; each round takes the contenders in another order. The bar is
what our column is to reach at most.
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import Batch, linear_encoder, mlp, print_table, relative_times, resnet18
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import PruningCallback, UnstructuredPruning, compress_model
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.methods.pruning._selection import kth_smallest

SPARSITY = 0.9
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, float]] = {
    # how it is made, one input, batch, batches per epoch, bar
    "MLP, batch 128": (mlp, (784,), 128, 30, 1.10),
    "encoder, batch 8": (linear_encoder, (128, 384), 8, 3, 1.03),
}


class Classifier(LightningModule):
    """An ordinary LightningModule, which knows nothing of compression."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class SecondEpoch(Callback):
    """CPU time from the second batch of the second epoch to its last."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            self.start = time.process_time()
        self.seconds = time.process_time() - getattr(self, "start", 0.0)


def fit_seconds(model: nn.Module, data: TensorDataset, batch: int, callbacks: list[Callback]) -> float:
    clock = SecondEpoch()
    trainer = Trainer(
        max_epochs=2,
        callbacks=[*callbacks, clock],
        accelerator="cpu",
        devices=1,
        barebones=True,
    )
    trainer.fit(Classifier(copy.deepcopy(model)), DataLoader(data, batch))
    return clock.seconds


def steps(rounds: int) -> Iterator[list[str]]:
    """Rows: time of a training step with masks / time of a plain one."""
    yield ["model", "`PruningCallback`", "bar", "`ModelPruning`"]
    contenders: dict[str, Callable[[], list[Callback]]] = {
        "plain": list,
        "ours": lambda: [PruningCallback(sparsity=SPARSITY, schedule="constant", include=["*"])],
        "peer": lambda: [ModelPruning("l1_unstructured", amount=SPARSITY, use_global_unstructured=True)],
    }
    for name, (build, sample, batch, batches, bar) in NETWORKS.items():
        model, names = build(), list(contenders)
        data = TensorDataset(torch.randn(batch * batches, *sample), torch.randint(10, (batch * batches,)))
        ratios: dict[str, list[float]] = {key: [] for key in names}
        for turn in range(rounds + 1):  # the first warms up
            order = names[turn % 3 :] + names[: turn % 3]
            seconds = {key: fit_seconds(model, data, batch, contenders[key]()) for key in order}
            for key in names if turn else []:
                ratios[key].append(seconds[key] / seconds["plain"])
        ours, peer = (statistics.median(ratios[key]) for key in ("ours", "peer"))
        yield [name, f"{ours:.2f}", f"{bar:.2f}", f"{peer:.2f}"]


def update(rounds: int) -> Iterator[list[str]]:
    """Rows: time of choosing and applying new masks for ResNet-18 / time that ModelPruning takes."""
    yield ["new masks", "ours / `ModelPruning`", "bar"]
    model, pruned = resnet18(), resnet18()
    method, context = UnstructuredPruning(sparsity=SPARSITY, include=["*"], interval=1), CompressionContext(by="")
    method.apply(model, method.plan(model, context), context)
    layers = [(m, "weight") for m in pruned.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    peer = ModelPruning("l1_unstructured", parameters_to_prune=layers, use_global_unstructured=True)
    peer.setup(None, pruned, "fit")  # type: ignore[arg-type]
    progress = iter(torch.linspace(0.01, 0.69, 3 * 100).tolist())
    runs = {
        "peer": lambda: peer.apply_pruning(0.01),
        "ours": lambda: method.step(model, context.state, next(progress)),
    }
    ratio = relative_times(runs, rounds)["ours"]
    yield ["ResNet-18, 11 million weights", f"{ratio:.2f}", "0.30"]


def threshold(rounds: int) -> Iterator[list[str]]:
    """Rows: time of the exact global threshold / time of `weights.abs().kthvalue(k)`, for 90 % zeros."""
    yield ["threshold", "ours / `abs` + `kthvalue`", "bar", "exact"]
    for millions in (11, 100):
        weights = torch.randn(millions * 1_000_000)
        drop = int(SPARSITY * weights.numel())
        runs = {
            "peer": lambda w=weights, k=drop: w.abs().kthvalue(k),
            "ours": lambda w=weights, k=drop: kth_smallest([w], k, absolute=True),
        }
        exact = kth_smallest([weights], drop, absolute=True)[0] == float(weights.abs().kthvalue(drop).values)
        yield [f"{millions} million weights", f"{relative_times(runs, rounds)['ours']:.2f}", "0.45", str(exact)]


def channels(rounds: int) -> Iterator[list[str]]:
    """Rows: how many times faster a forward pass in eager PyTorch is with half of the channels."""
    yield ["half of the channels", "times faster", "bar", "parameters", "planning and removal / forward pass"]
    model, images = resnet18().eval(), torch.randn(32, 3, 32, 32)
    small = compress_model(model, "structured_pruning", train_loader=[images])
    runs = {
        "dense": lambda: run(model, images),
        "small": lambda: run(small, images),
    }
    faster = 1 / relative_times(runs, rounds)["small"]
    runs = {
        "dense": lambda: run(model, images),
        "removal": lambda: compress_model(model, "structured_pruning", train_loader=[images]),
    }
    removal = relative_times(runs, 1)["removal"]
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    yield ["ResNet-18, batch 32", f"{faster:.2f}", "2.50", f"{left:.2f}", f"{removal:.1f}"]


def run(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


def main() -> None:
    """Reads the command line and prints the tables."""
    tables = {
        "steps": ("Training step with masks: time / plain", steps),
        "update": ("New masks", update),
        "threshold": ("Threshold over all weights", threshold),
        "channels": ("Channels removed", channels),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(tables), default=list(tables), help="default: all")
    options = parser.parse_args()
    for logger in ("lightning.pytorch", "pquant_lightning"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*barebones.*"):
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, medians of {options.rounds} rounds")
    for name, (title, rows) in tables.items():
        if name in options.only:
            print_table(title, rows(options.rounds))


if __name__ == "__main__":
    main()
