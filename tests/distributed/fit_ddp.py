"""Run by test_ddp.py in two processes: a fit with another seed in each, then what each rank has, as JSON lines."""

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from pquant_lightning import (
    DistillationCallback,
    LowRankCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.methods.low_rank import _truncated_svd
from pquant_lightning.methods.low_rank.svd import LowRankCompression
from tests.models import ConvNet


def counting(owner: object, name: str, counts: dict[str, int]) -> None:
    original = getattr(owner, name)

    def counted(*args: object, **kwargs: object) -> object:
        counts[name] = counts.get(name, 0) + 1
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def digest(model: torch.nn.Module) -> str:
    """Of everything but the statistics of batch norms, which plain DDP leaves different after the last step."""
    state = {name: t for name, t in model.state_dict().items() if "running_" not in name}
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--ckpt")
    parser.add_argument("--nan", action="store_true")
    parser.add_argument("--calibrate", action="store_true", help="quantize after the training instead")
    parser.add_argument("--learned", action="store_true", help="learn scales that start from the first batch instead")
    parser.add_argument("--prune", metavar="CRITERION", help="prune instead")
    parser.add_argument("--channels", choices=["end", "during", "reconstruct"], help="remove channels instead")
    parser.add_argument("--distil", action="store_true", help="with the uncompressed model as teacher")
    options = parser.parse_args()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    counts: dict[str, int] = {}
    counting(LowRankCompression, "plan", counts)
    for decomposition in ("truncated_svd", "truncated_svd_by_energy"):
        counting(_truncated_svd, decomposition, counts)
    torch.manual_seed(10 + rank)
    model = ConvNet()
    if options.nan:
        model.head.weight.data.fill_(torch.nan)
    callbacks: list[Callback] = [LowRankCallback(energy=0.6), QATCallback(bits=8)]
    if options.calibrate:
        callbacks = [PTQCallback()]
    if options.learned:
        rest = {"quantizer": "lsq", "num_samples": 0, "min_saving": 0.0, "scale_lr": 1e-6}
        callbacks = [QATCallback(bits=4, initial_bits=6, **rest)]
    if options.prune:
        callbacks = [PruningCallback(sparsity=0.8, criterion=options.prune, include=["*"], min_saving=0.0)]
    if options.channels:
        repairs = {"reconstruct": True, "num_samples": 16} if options.channels == "reconstruct" else {}
        remove = "during" if options.channels == "during" else "end"
        callbacks = [StructuredPruningCallback(sparsity=0.5, round_to=1, remove=remove, **repairs)]
    if options.distil:
        callbacks.append(DistillationCallback())
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=options.epochs,
        callbacks=callbacks,
        default_root_dir=options.root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ConvNet.loader(), ckpt_path=options.ckpt)
    trainer.save_checkpoint(options.root / "last.ckpt")
    kinds = {name: layer.kind for name, layer in compressed_layers(model).items()}
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    share = zeros / sum(p.numel() for p in model.parameters() if p.dim() > 1)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = {"rank": trainer.global_rank, "digest": digest(model), "kinds": kinds, "counts": counts, "zeros": share}
    found["metrics"] = metrics
    (options.root / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # so that neither process leaves while the other still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
