"""Print the README's table: accuracy and file size of the digits networks, dense and compressed.

    python examples/digits_results.py                      # about ten minutes on a CPU
    python examples/digits_results.py --only fp32 qat8     # some methods only
    python examples/digits_results.py --validate           # train on 80 % and score the other 20 %, to choose recipes

Each dense network is trained for 40 epochs; every method starts from those weights and fine-tunes for 20 more, pruning
for 60 where nothing else is said, but for post-training quantization (PTQ), which trains nothing. Final weights are
finalized, written by `save_compressed`, read back and scored once, on the 540 test images: what is scored is the file.
LoRA starts from a network that was trained on images turned by 90 degrees, and adapts it to upright ones.
Accuracies are means over the seeds.
"""

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from digits import DigitsClassifier, DigitsConvNet, DigitsDataModule, DigitsMLP, accuracy, quiet
from lightning.pytorch import Callback, Trainer, seed_everything

from pquant_lightning import (
    FactorizationCallback,
    LoRACallback,
    LowRankCallback,
    PruningCallback,
    QATCallback,
    StructuredPruningCallback,
    compress_model,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.deploy import count_params

DENSE_EPOCHS, DENSE_LR = 40, 2e-3
FINE_TUNE_EPOCHS, FINE_TUNE_LR = 20, 1e-3
PRUNING_EPOCHS = 60
LORA_LR = 1e-2


@dataclass(frozen=True)
class Network:
    """A network of the table."""

    title: str
    build: type[DigitsClassifier]


NETWORKS = (Network("MLP", DigitsMLP), Network("conv net", DigitsConvNet))


def low_rank(**options: Any) -> Callback:
    """Every layer keeps a quarter of its parameters, where `options` say nothing else.

    The output layer stays dense by itself, and so does the stem of the conv net, whose matrix of 16 x 9 would be left
    with rank 1.
    """
    return LowRankCallback(**(options or {"param_ratio": 0.25}))


def factorization(kind: str) -> Callback:
    """Every layer but those keeps a tenth of its weights."""
    return FactorizationCallback(kind=kind, param_ratio=0.1)


def pruning(sparsity: float) -> Callback:
    """That share of all weights is zero; the gradients of the training say which."""
    return PruningCallback(sparsity=sparsity, criterion="snip", include=["*"])


class Method(NamedTuple):
    """A row of the table: the callbacks of the fine-tuning, which is all that a method needs, and its epochs."""

    title: str
    callbacks: Callable[[], list[Callback]]
    epochs: int = FINE_TUNE_EPOCHS
    lr: float = FINE_TUNE_LR


METHODS: dict[str, Method] = {
    "fp32+20": Method("fp32, 20 more epochs", lambda: []),
    "low_rank": Method("low rank, 25 %", lambda: [low_rank()]),
    "low_rank10": Method("low rank, 10 %", lambda: [low_rank(param_ratio=0.1)]),
    "low_rank10shared": Method("low rank, 10 %, shared", lambda: [low_rank(budget={"params": 0.1})]),
    "sparse_low_rank10": Method("sparse plus low rank, 10 %", lambda: [factorization("sparse_low_rank")]),
    "qat8": Method("QAT, 8 bit", lambda: [QATCallback(bits=8)]),
    "qat4": Method("QAT, 4-bit weights", lambda: [QATCallback(weight_bits=4, act_bits=8)]),
    "qat2": Method("QAT, 2-bit weights", lambda: [QATCallback(weight_bits=2, act_bits=8)]),
    "qat3mixed": Method("QAT, 3-bit weights on average", lambda: [QATCallback(average_bits=3, act_bits=8)]),
    "low_rank+qat8": Method("low rank, 25 % + QAT, 8 bit", lambda: [low_rank(), QATCallback(bits=8)]),
    "prune90": Method("pruning, 90 % zeros", lambda: [pruning(0.9)], PRUNING_EPOCHS),
    "prune95": Method("pruning, 95 % zeros", lambda: [pruning(0.95)], PRUNING_EPOCHS),
    "prune98": Method("pruning, 98 % zeros", lambda: [pruning(0.98)], PRUNING_EPOCHS),
    "prune98short": Method("pruning, 98 % zeros, 20 epochs", lambda: [pruning(0.98)]),
    "prune90+qat8": Method(
        "pruning, 90 % zeros + QAT, 8 bit", lambda: [pruning(0.9), QATCallback(bits=8)], PRUNING_EPOCHS
    ),
    "channels50": Method("half of the channels", lambda: [StructuredPruningCallback(sparsity=0.5)]),
    "channels50+qat8": Method(
        "half of the channels + QAT, 8 bit",
        lambda: [StructuredPruningCallback(sparsity=0.5), QATCallback(bits=8)],
    ),
}

# These start from the network that was trained on turned images.
ADAPTING: dict[str, Method] = {
    "turned+20": Method("trained on turned digits, 20 more epochs", lambda: []),
    "lora": Method(
        "trained on turned digits, LoRA r=8",
        lambda: [LoRACallback(r=8, alpha=16, init="pissa", bias="all")],
        lr=LORA_LR,
    ),
    "lora+qat8": Method(
        "trained on turned digits, LoRA r=8 + QAT, 8 bit",
        lambda: [LoRACallback(r=8, alpha=16, init="pissa", bias="all"), QATCallback(bits=8)],
        lr=LORA_LR,
    ),
}

# The options of post-training quantization, which calibrates on training images and trains nothing.
POST_TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "ptq8": ("PTQ, 8 bit", {}),
    "ptq8dynamic": ("PTQ, 8 bit, dynamic", {"scheme": "dynamic"}),
    "ptq4": ("PTQ, 4-bit weights", {"weight_bits": 4, "act_bits": 8}),
    "ptq3": ("PTQ, 3-bit weights", {"weight_bits": 3, "act_bits": 8}),
    "ptq2": ("PTQ, 2-bit weights", {"weight_bits": 2, "act_bits": 8}),
}
# Low rank fitted to training images, without training.
FITTED: dict[str, tuple[str, dict[str, Any]]] = {
    "low_rank50": ("low rank, 50 %, not trained", {"param_ratio": 0.5}),
    "low_rank50plain": ("low rank, 50 %, not trained, without data", {"param_ratio": 0.5, "data_aware": False}),
}
TITLES = {"fp32": "fp32"} | {name: row[0] for name, row in (METHODS | ADAPTING | POST_TRAINING | FITTED).items()}


@dataclass(frozen=True)
class Score:
    """One trained network: its accuracy in [0, 1], its parameters, and the bytes of its file."""

    accuracy: float
    num_params: int
    size_bytes: int


def fit(model: DigitsClassifier, data: DigitsDataModule, epochs: int, callbacks: list[Callback], root: Path) -> None:
    """Train `model` in place, without checkpoints: the final weights count."""
    with quiet():
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            accelerator="cpu",
            devices=1,
            default_root_dir=root,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)


def score(model: DigitsClassifier, data: DigitsDataModule, path: Path) -> Score:
    """Write the deployed form of `model` to `path`, read it back, and score what was read."""
    save_compressed(model, path)
    deployed = load_compressed(type(model), path)
    batches = data.val_dataloader() if data.val_share else data.test_dataloader()
    return Score(accuracy(deployed, batches), count_params(deployed), path.stat().st_size)


def train_dense(network: Network, data: DigitsDataModule, root: Path) -> DigitsClassifier:
    """A network before compression, from the seed of its data."""
    seed_everything(data.seed, verbose=False)
    model = network.build(lr=DENSE_LR)
    fit(model, data, DENSE_EPOCHS, [], root)
    return model


def run(network: Network, methods: Sequence[str], seed: int, val_share: float, root: Path) -> dict[str, Score]:
    """Train `network` from `seed`, then fine-tune it with each of `methods` from those same weights."""
    data = DigitsDataModule(val_share=val_share, seed=seed)
    dense = train_dense(network, data, root)
    scores = {"fp32": score(dense, data, root / "fp32.safetensors")}
    turned = None
    if any(method in ADAPTING for method in methods):
        turned = train_dense(network, DigitsDataModule(val_share=val_share, seed=seed, quarter_turns=1), root)
    for method in methods:
        seed_everything(seed, verbose=False)
        if method in POST_TRAINING:
            model = compress_model(dense, "ptq", train_loader=data, **POST_TRAINING[method][1])
            scores[method] = score(model, data, root / f"{method}.safetensors")
            continue
        if method in FITTED:
            model = compress_model(dense, "low_rank", train_loader=data, **FITTED[method][1])
            scores[method] = score(model, data, root / f"{method}.safetensors")
            continue
        row = (METHODS | ADAPTING)[method]
        model = copy.deepcopy(turned if method in ADAPTING else dense)
        model.hparams["lr"] = row.lr
        fit(model, data, row.epochs, row.callbacks(), root)
        scores[method] = score(model, data, root / f"{method}.safetensors")
    return scores


def print_table(network: Network, runs: list[dict[str, Score]]) -> None:
    """One markdown row per method; `runs` holds one dict of scores per seed."""
    dense_bytes = mean(scores["fp32"].size_bytes for scores in runs)
    for method in runs[0]:
        percent = 100 * mean(scores[method].accuracy for scores in runs)
        size_bytes = mean(scores[method].size_bytes for scores in runs)
        print(
            f"| {network.title} | {TITLES[method]} | {percent:.2f} % | {runs[0][method].num_params:,} "
            f"| {size_bytes:,.0f} | {dense_bytes / size_bytes:.1f}x |",
            flush=True,
        )


def main() -> None:
    """Read the command line, run every network, and print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TITLES), default=list(TITLES), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validate", action="store_true", help="score a validation split instead of the test images")
    options = parser.parse_args()
    logging.getLogger("pquant_lightning").setLevel(logging.WARNING)  # no table per fit
    methods = [method for method in (*POST_TRAINING, *FITTED, *METHODS, *ADAPTING) if method in options.only]
    val_share = 0.2 if options.validate else 0.0

    print("| model | method | accuracy | parameters | bytes | smaller |\n|---|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for network in NETWORKS:
            runs = [run(network, methods, seed, val_share, Path(root)) for seed in options.seeds]
            print_table(network, runs)


if __name__ == "__main__":
    main()
