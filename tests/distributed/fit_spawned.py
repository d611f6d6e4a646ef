"""Run by test_spawn.py: the process that calls fit must end with the compressed and trained model."""

import argparse
import json
from pathlib import Path

from lightning.pytorch import Trainer

from pquant_lightning import LowRankCallback, QATCallback, load_compressed, prepare
from pquant_lightning.core.compressed_layer import compressed_layers
from tests.models import MLP


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--unprepared", action="store_true")
    options = parser.parse_args()
    model = MLP() if options.unprepared else prepare(MLP())
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        callbacks=[LowRankCallback(rank=4), QATCallback(bits=8)],
        default_root_dir=options.root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, MLP.loader())
    kinds = {name: layer.kind for name, layer in compressed_layers(model).items()}
    artefact = load_compressed(MLP, options.root / "compressed.safetensors")
    x = MLP.inputs()[0]
    best = float((artefact(x) - model.eval()(x)).abs().max())
    (options.root / "main.json").write_text(json.dumps({"kinds": kinds, "difference": best}))


if __name__ == "__main__":
    main()
