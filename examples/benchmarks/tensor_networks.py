"""Tensor networks beside tltorch and TensorLy: forward passes, decompositions, and what a tensor train is good for.

    python examples/benchmarks/tensor_networks.py [--rounds 11] [--only forward|conv|decompose|trained|scratch]

Times are CPU time on one thread, the median over the rounds of the ratio within a round; each round takes the
contenders in another order. `pip install tensorly-torch` adds tltorch's rows. `trained` cuts a trained 1024 x 1024
layer by SVD and as a tensor train at equal parameters; `scratch` trains digits with that layer as a tensor train of 60
times fewer.
"""

import argparse
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import tensorly
import torch
from common import print_table, relative_times
from lightning.pytorch import Callback, Trainer, seed_everything
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from torch import Tensor, nn

from pquant_lightning import TensorTrainCallback, compress_model
from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.methods.tensor_networks._contraction import multiply
from pquant_lightning.methods.tensor_networks.tensor_train import train_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import DigitsClassifier, DigitsDataModule, accuracy, quiet

RANK, CONV_RANK = 8, 64
SHAPES = [(1024, 1024), (3072, 768)]  # (out, in)
BATCHES = [1, 32, 512]


def power_law(out: int, in_: int) -> Tensor:
    """A random matrix (out, in) with singular values i^-0.5."""
    k, generator = min(out, in_), torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator)).Q for n in (out, in_))
    return (left * torch.arange(1, k + 1) ** -0.5) @ right.T


def linear(out: int, in_: int) -> nn.Linear:
    layer = nn.Linear(in_, out)
    layer.weight.data = power_law(out, in_)
    return layer


def conv() -> nn.Conv2d:
    layer = nn.Conv2d(256, 256, 3, padding=1)
    layer.weight.data = power_law(256, 256 * 9).reshape(256, 256, 3, 3)
    return layer


def compressed(layer: nn.Module, method: str, **options: Any) -> Any:
    """The layer that the public API puts in its place."""
    return compress_model(nn.Sequential(layer), method, inplace=True, **options)[0]


def tltorch_linear(ours: Any, implementation: str) -> nn.Module:
    """tltorch's layer with the same modes, ranks and cores."""
    import tltorch

    shape = ours.shape
    peer = tltorch.FactorizedLinear(
        shape.in_modes, shape.out_modes, factorization="blocktt", rank=shape.ranks, implementation=implementation
    )
    for own, core in zip(peer.weight.factors, ours.cores(), strict=True):
        own.data = core.detach().clone()
    peer.bias.data = ours.bias.detach().clone()
    return peer  # type: ignore[no-any-return]


class Chain(nn.Module):
    """The bare chain of a tensor train's cores, whatever the number of rows."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.cores = nn.ParameterList(part.weight for part in layer.parts)
        self.bias, self.shape = layer.bias, layer.shape

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, list(self.cores), self.shape, len(self.cores) - 1) + self.bias


def forward_rows(rounds: int) -> Iterator[list[str]]:
    yield ["layer, rows", "dense", "ours", "tltorch factorized", "tltorch reconstructed", "ours / best of tltorch"]
    for out, in_ in SHAPES:
        dense = linear(out, in_)
        ours = compressed(dense, "tensor_train", rank=RANK)
        peers = {mode: tltorch_linear(ours, mode) for mode in ("factorized", "reconstructed")}
        for rows in BATCHES:
            x = torch.randn(rows, in_, requires_grad=True)
            layers = {"dense": dense, "ours": ours, **peers}
            assert all((peer(x) - ours(x)).abs().max() < 1e-3 for peer in peers.values())
            times = relative_times({name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()}, rounds)
            best = min(times[mode] for mode in peers)
            figures = [f"{time:.2f}" for time in (*times.values(), times["ours"] / best)]
            yield [f"{out} x {in_}, {rows}", *figures]


def eval_rows(rounds: int) -> Iterator[list[str]]:
    yield ["layer, rows", "dense", "ours", "chain", "ours / better of the two"]
    for out, in_ in SHAPES:
        dense = linear(out, in_).eval()
        ours = compressed(dense, "tensor_train", rank=RANK).eval()
        chain = Chain(ours)
        for rows in BATCHES:
            x = torch.randn(rows, in_)
            runs = {
                "dense": lambda x=x, dense=dense: dense(x),
                "ours": lambda x=x, ours=ours: ours(x),
                "chain": lambda x=x, chain=chain: chain(x),
            }
            with torch.no_grad():
                times = relative_times(runs, rounds)
            figures = [*times.values(), times["ours"] / min(1.0, times["chain"])]
            yield [f"{out} x {in_}, {rows}", *(f"{figure:.2f}" for figure in figures)]


def conv_rows(rounds: int) -> Iterator[list[str]]:
    yield ["images of 16 x 16", "dense", f"Tucker-2, rank {CONV_RANK}", f"CP, rank {CONV_RANK}", "tltorch Tucker"]
    dense = conv().eval()
    layers = {"dense": dense, **{name: compressed(dense, name, rank=CONV_RANK) for name in ("tucker", "cp")}}
    if find_spec("tltorch"):
        import tltorch

        rank, make = (CONV_RANK, CONV_RANK, 3, 3), tltorch.FactorizedConv.from_conv
        layers["tltorch"] = make(dense, rank=rank, factorization="tucker", implementation="factorized")
    for images in (1, 8):
        x = torch.randn(images, 256, 16, 16)
        with torch.no_grad():
            times = relative_times({name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()}, rounds)
        yield [str(images), *(f"{time:.2f}" for time in times.values())]


Decompose = Callable[[], Any]


def contest(
    name: str, layer: nn.Module, options: dict[str, Any], peer: Decompose, dense: Any, rounds: int
) -> list[str]:
    """One row: our time through the public API / TensorLy's, and both errors. `dense` gives TensorLy's tensors."""
    results: dict[str, Any] = {}

    def ours() -> None:
        results["ours"] = compressed(layer, name, min_saving=0.0, **options)

    def theirs() -> None:
        with warnings.catch_warnings(), tensorly.backend_context("pytorch"), torch.no_grad():
            warnings.simplefilter("ignore")  # an SVD of more vectors than a mode has
            results["peer"] = peer()

    times = relative_times({"peer": theirs, "ours": ours}, rounds)
    weight = weight_of(layer).detach()
    error = torch.dist(weight_of(results["ours"]), weight) / weight.norm()
    with tensorly.backend_context("pytorch"):
        before, after = dense(results["peer"])
    peer_error = torch.dist(before, after) / before.norm()
    return [f"{name}, {list(weight.shape)}, {options}", f"{times['ours']:.3f}", f"{error:.4f}", f"{peer_error:.4f}"]


def decomposition_rows(rounds: int) -> Iterator[list[str]]:
    yield ["decomposition", "time / TensorLy's", "error", "TensorLy's error"]
    for out, in_ in SHAPES:
        layer = linear(out, in_)
        for rank in (8, 32):
            tensor = train_tensor(layer, compressed(layer, "tensor_train", rank=rank).spec)[0]
            limits = [1, rank, rank, 1]
            yield contest(
                "tensor_train",
                layer,
                {"rank": rank},
                lambda tensor=tensor, limits=limits: tensor_train(tensor, list(limits)),
                lambda train, tensor=tensor: (tensor, tensorly.tt_to_tensor(train)),
                rounds,
            )
    kernel = conv().weight.detach()
    yield contest(
        "tucker",
        conv(),
        {"rank": CONV_RANK},
        lambda: partial_tucker(kernel, rank=[CONV_RANK] * 2, modes=[0, 1])[0],
        lambda parts: (kernel, tensorly.tenalg.multi_mode_dot(parts[0], parts[1], modes=[0, 1])),
        rounds,
    )
    small = nn.Conv2d(64, 128, 3)
    small.weight.data = power_law(128, 64 * 9).reshape(128, 64, 3, 3)
    for layer, rank, times in (
        (small, 32, rounds),
        (conv(), CONV_RANK, 1),
    ):  # TensorLy takes half a minute for the last
        weight = layer.weight.detach()
        yield contest(
            "cp",
            layer,
            {"rank": rank},
            lambda weight=weight, rank=rank: parafac(weight, rank),
            lambda terms, weight=weight: (weight, tensorly.cp_to_tensor(terms)),
            times,
        )


class WideMLP(DigitsClassifier):
    """64-1024-1024-10 with ReLU; `features.3` is the 1024 x 1024 layer."""

    def __init__(self, lr: float = 2e-3, weight_decay: float = 1e-4) -> None:
        super().__init__(lr, weight_decay)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
        self.head = nn.Linear(1024, 10)


def trained(seed: int, epochs: int, callbacks: list[Callback], val_share: float) -> tuple[WideMLP, Any]:
    """A digits network after that many epochs, and the batches to score it on."""
    seed_everything(seed, verbose=False)
    data, model = DigitsDataModule(val_share=val_share, seed=seed), WideMLP()
    quiet_options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with quiet(), tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            accelerator="cpu",
            devices=1,
            default_root_dir=root,
            limit_val_batches=0,
            enable_checkpointing=False,
            **quiet_options,  # type: ignore[arg-type]
        )
        trainer.fit(model, datamodule=data)
    return model, data.val_dataloader() if val_share else data.test_dataloader()


def trained_rows() -> Iterator[list[str]]:
    yield ["weights kept", "SVD: error, accuracy", "tensor train: error, accuracy"]
    model, batches = trained(0, 20, [], 0.2)
    yield ["all", *[f"0, {accuracy(model, batches):.1%}"] * 2]
    weight = model.features[3].weight.detach()  # type: ignore[union-attr]
    for ratio in (0.5, 0.25, 0.1):
        row = [f"{ratio:.0%}"]
        for method in ("low_rank", "tensor_train"):
            small = compress_model(model, method, param_ratio=ratio, include=["features.3"])
            error = torch.dist(weight_of(small.features[3]), weight) / weight.norm()
            row.append(f"{error:.3f}, {accuracy(small, batches):.1%}")
        yield row


def scratch_rows(seeds: list[int], epochs: int, val_share: float) -> Iterator[list[str]]:
    yield ["the 1024 x 1024 layer, trained from scratch", "its weights", "accuracy"]
    train = {"param_ratio": 1 / 60, "init": "random", "include": ["features.3"]}
    for title, options in (("dense", None), ("tensor train, 60 times fewer", train)):
        scores = []
        for seed in seeds:
            callbacks: list[Callback] = [] if options is None else [TensorTrainCallback(**options)]
            model, batches = trained(seed, epochs, callbacks, val_share)
            scores.append(accuracy(model, batches))
        layer = model.features[3]  # type: ignore[index]
        weights = sum(math.prod(p.shape) for name, p in layer.named_parameters() if "weight" in name)
        yield [title, f"{weights:,}", f"{mean(scores):.2%}"]


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=["forward", "conv", "decompose", "trained", "scratch"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40, help="of `scratch`")
    parser.add_argument(
        "--validate", action="store_true", help="score a validation split in `scratch`, to choose recipes"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("pquant_lightning").setLevel(logging.WARNING)
    chosen = [args.only] if args.only else ["forward", "conv", "decompose", "trained", "scratch"]
    if "forward" in chosen and find_spec("tltorch"):
        print_table("Forward while training, tensor train of rank 8, time / dense", forward_rows(args.rounds))
    if "forward" in chosen:
        print_table("Forward in eval, tensor train of rank 8, time / dense", eval_rows(args.rounds))
    if "conv" in chosen:
        print_table("Forward of Conv2d(256, 256, 3), time / dense", conv_rows(args.rounds))
    if "decompose" in chosen:
        print_table("Decomposition beside TensorLy's defaults", decomposition_rows(min(args.rounds, 5)))
    if "trained" in chosen:
        print_table("A trained 1024 x 1024 layer of digits, cut without fine-tuning", trained_rows())
    if "scratch" in chosen:
        print_table("Digits from scratch", scratch_rows(args.seeds, args.epochs, 0.2 if args.validate else 0.0))


if __name__ == "__main__":
    main()
