"""The specification's default configuration on the digits conv net: compress, fine-tune, quantize, evaluate.

    python examples/pipeline.py [--config configs/pipeline_digits.yaml]

It trains a dense network to start from, runs the configuration, and prints accuracy (on the test images, once), bytes
and latency before and after.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch
from digits import DigitsConvNet, DigitsDataModule, quiet
from lightning.pytorch import Trainer, seed_everything

from pquant_lightning import CompressionPipeline, ConfigManager, EvaluationPipeline, load_compressed


def dense(data: DigitsDataModule) -> DigitsConvNet:
    """The conv net after 40 epochs."""
    model = DigitsConvNet()
    with quiet():
        trainer = Trainer(
            max_epochs=40,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
    model.trainer = None
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="of the specification's layout; default: ConfigManager's")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0)
    torch.set_num_threads(1)
    data = DigitsDataModule()
    started = time.perf_counter()
    model = dense(data)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = CompressionPipeline.from_config(ConfigManager.load_config(options.config))
        result = pipeline.run(model, data, dirpath=folder)
        loaded = load_compressed(DigitsConvNet, result.artifact)
    seconds = time.perf_counter() - started
    data.setup("test")
    metrics = ["accuracy", "size", "latency", "macs"]
    print(EvaluationPipeline(metrics).run(model, loaded, data.test_dataloader()))
    print(f"{seconds:.0f} s, the dense training among them")


if __name__ == "__main__":
    main()
