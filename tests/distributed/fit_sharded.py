"""Run by test_sharded.py in two processes: ModelParallelStrategy (FSDP2) shards a model that is compressed before."""

import argparse
import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pquant_lightning import LowRankCallback, PruningCallback, QATCallback, StructuredPruningCallback
from pquant_lightning.core.compressed_layer import compressed_layers
from tests.models import MLP


class ShardedMLP(MLP):
    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            for layer in (self.fc1, self.fc2, self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def full(model: torch.nn.Module) -> dict[str, list[float]]:
    tensors = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.named_parameters()}
    return {name: tensor.detach().flatten().tolist() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--distributed-checkpoint", action="store_true")
    parser.add_argument("--prune", action="store_true", help="prune instead")
    parser.add_argument("--channels", action="store_true", help="prune channels instead")
    options = parser.parse_args()

    def trainer(epochs: int) -> Trainer:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=options.distributed_checkpoint
        )
        callbacks: list[Callback] = [LowRankCallback(rank=4), QATCallback(bits=8)]
        if options.prune:
            callbacks = [PruningCallback(sparsity=0.8, include=["*"], min_saving=0.0)]
        if options.channels:
            callbacks = [StructuredPruningCallback(sparsity=0.5, round_to=1)]
        return Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=epochs,
            callbacks=callbacks,
            default_root_dir=options.root,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    torch.manual_seed(0)
    first, model = trainer(1), ShardedMLP()
    first.fit(model, MLP.loader())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    first.save_checkpoint(options.root / "one.ckpt")
    after_one = full(model)
    kinds = {name: layer.kind for name, layer in compressed_layers(model).items()}

    torch.manual_seed(1)
    tested, fresh = trainer(1), ShardedMLP()
    tested.test(fresh, MLP.loader(), ckpt_path=options.root / "one.ckpt", verbose=False)
    tested_equal = full(fresh) == after_one

    second, resumed = trainer(2), ShardedMLP()
    second.fit(resumed, MLP.loader(), ckpt_path=options.root / "one.ckpt")
    resumed_kinds = {name: layer.kind for name, layer in compressed_layers(resumed).items()}
    found = {
        "kinds": kinds,
        "tested_equal": tested_equal,
        "resumed_kinds": resumed_kinds,
        "moved": full(resumed) != after_one,
        "steps": second.global_step,
        "full": full(resumed),
    }
    (options.root / f"rank{second.global_rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # so that neither process leaves while the other still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
